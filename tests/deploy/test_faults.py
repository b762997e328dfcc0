"""A check that finds nothing wrong is worth what it finds where something is: seeded faults.

Each fault is put into a copy of a render that is right, and has to turn the check red by the rule
that is meant to see it.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.checks.objects import Manifest, cluster_spec, of_kind
from tests.deploy.checks.schemas import versions
from tests.deploy.checks.suite import check

Objects = list[Manifest]


def one(objects: Objects, kind: str, name: str | None = None) -> Any:
    return next(each for each in of_kind(objects, kind) if name in (None, each["metadata"]["name"]))


def worker(objects: Objects, kind: str = "RayJob", name: str | None = None) -> Any:
    return cluster_spec(one(objects, kind, name))["workerGroupSpecs"][0]


def pod(objects: Objects, kind: str = "RayJob", name: str | None = None) -> Any:
    return worker(objects, kind, name)["template"]["spec"]


def ray(objects: Objects, kind: str = "RayJob", name: str | None = None) -> Any:
    return pod(objects, kind, name)["containers"][0]


def head(objects: Objects, kind: str = "RayJob", name: str | None = None) -> Any:
    return cluster_spec(one(objects, kind, name))["headGroupSpec"]


def launcher(objects: Objects) -> Any:
    return one(objects, "CronJob", "retraining")["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def put(target: Any, **values: Any) -> None:
    target.update(values)


def deletion(policy: str, ttl_s: int) -> Manifest:
    return {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl_s}}


def cron_job(name: str, schedule: str) -> Manifest:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": {"name": name},
        "spec": {"schedule": schedule, "jobTemplate": {}},
    }


FAULTS: dict[str, tuple[str, str, str, Callable[[Objects], Any]]] = {
    # name: (overlay, rule, part of the text, the fault)
    "another attempt of a run on a cluster that stays": (
        *("dev", "operator", "backoffLimit makes new clusters"),
        lambda o: put(one(o, "RayJob")["spec"], submissionMode="InteractiveMode"),
    ),
    "a cluster that goes before its workers": (
        *("dev", "operator", "workers go first"),
        lambda o: put(
            one(o, "RayJob")["spec"],
            deletionStrategy={
                "deletionRules": [deletion("DeleteCluster", 5), deletion("DeleteWorkers", 9)]
            },
        ),
    ),
    "two rules for one end": (
        *("dev", "operator", "two rules of DeleteSelf for FAILED"),
        lambda o: put(
            one(o, "RayJob")["spec"],
            deletionStrategy={
                "deletionRules": [deletion("DeleteSelf", 5), deletion("DeleteSelf", 9)]
            },
        ),
    ),
    "workers that are deleted beside an autoscaler": (
        *("dev", "operator", "DeleteWorkers fights"),
        lambda o: (
            put(cluster_spec(one(o, "RayJob")), enableInTreeAutoscaling=True),
            put(
                one(o, "RayJob")["spec"],
                deletionStrategy={"deletionRules": [deletion("DeleteWorkers", 5)]},
            ),
        ),
    ),
    "rules beside a time to live": (
        *("dev", "operator", "deletionRules and ttlSecondsAfterFinished exclude"),
        lambda o: put(
            one(o, "RayJob")["spec"],
            deletionStrategy={"deletionRules": [deletion("DeleteSelf", 5)]},
        ),
    ),
    "a schedule of the operator's own": (
        *("dev", "operator", "RayCronJob needs a feature gate"),
        lambda o: o.append(cron_job("nightly", "0 3 * * *")),
    ),
    "a time zone inside of a schedule": (
        *("dev", "operator", "use timeZone"),
        lambda o: o.append(cron_job("nightly", "TZ=Europe/Paris 0 3 * * *")),
    ),
    "a schedule with a long name": (
        *("dev", "operator", "more than 36 characters"),
        lambda o: o.append(cron_job("n" * 37, "0 3 * * *")),
    ),
    "a password of Redis as a parameter": (
        *("prod", "operator", "redis-password belongs"),
        lambda o: put(head(o, "RayService")["rayStartParams"], **{"redis-password": "x"}),
    ),
    "fault tolerance by an annotation of the pods": (
        *("prod", "operator", "ft-enabled and gcsFaultToleranceOptions exclude"),
        lambda o: (
            head(o, "RayService")["template"]["metadata"]
            .setdefault("annotations", {})
            .update({"ray.io/ft-enabled": "true"})
        ),
    ),
    "a wrong key": (
        *("prod", "schema", "concurencyPolicy"),
        lambda o: put(one(o, "CronJob")["spec"], concurencyPolicy="Forbid"),
    ),
    "a number as text": (
        *("prod", "schema", "not of type"),
        lambda o: put(one(o, "CronJob")["spec"], startingDeadlineSeconds="soon"),
    ),
    "a kind that is not": (
        *("prod", "schema", "no kind"),
        lambda o: put(one(o, "PodDisruptionBudget"), apiVersion="policy/v1beta1"),
    ),
    "a wrong key in Ray's pods": (
        *("prod", "definition", "termination"),
        lambda o: put(pod(o), terminationGracePeriod=60),
    ),
    "a wrong key in a RayJob": (
        *("prod", "definition", "backofLimit"),
        lambda o: put(one(o, "RayJob")["spec"], backofLimit=3),
    ),
    "a worker group without a name": (
        *("prod", "definition", "groupName"),
        lambda o: worker(o).pop("groupName"),
    ),
    "a queue without its version's key": (
        *("prod", "definition", "clusterQueues"),
        lambda o: put(one(o, "LocalQueue")["spec"], clusterQueues="lockstep"),
    ),
    "a pod monitor's wrong key": (
        *("prod", "definition", "podMetricEndpoints"),
        lambda o: put(one(o, "PodMonitor")["spec"], podMetricEndpoints=[]),
    ),
    "an enum": (
        *("prod", "enum", "Forbidd"),
        lambda o: put(one(o, "CronJob")["spec"], concurrencyPolicy="Forbidd"),
    ),
    "an enum inside Ray's pods": (
        *("prod", "enum", "Alwayss"),
        lambda o: put(ray(o), imagePullPolicy="Alwayss"),
    ),
    "a submission mode that is not": (
        *("prod", "enum", "K8JobMode"),
        lambda o: put(one(o, "RayJob")["spec"], submissionMode="K8JobMode"),
    ),
    "a name too long": (
        *("prod", "operator", "more than 47"),
        lambda o: put(one(o, "RayService")["metadata"], name="l" * 48),
    ),
    "a name that begins with a digit": (
        *("prod", "operator", "DNS-1035"),
        lambda o: put(one(o, "RayService")["metadata"], name="1lockstep"),
    ),
    "Ray not in the first container": (
        *("prod", "operator", "has to be the first container"),
        lambda o: pod(o)["containers"].insert(0, {**ray(o), "name": "sidecar"}),
    ),
    "resources given twice": (
        *("prod", "operator", "exclude each other"),
        lambda o: put(worker(o), resources={"CPU": "1"}, rayStartParams={"num-cpus": "1"}),
    ),
    "more replicas than the most": (
        *("prod", "operator", "lie outside"),
        lambda o: put(worker(o), replicas=9),
    ),
    "no Ray version": (
        *("prod", "operator", "rayVersion is missing"),
        lambda o: cluster_spec(one(o, "RayJob")).pop("rayVersion"),
    ),
    "no token": (
        *("prod", "operator", "authOptions.mode"),
        lambda o: put(cluster_spec(one(o, "RayService")), authOptions={}),
    ),
    "a sidecar submitter": (
        *("prod", "operator", "SidecarMode"),
        lambda o: put(one(o, "RayJob")["spec"], submissionMode="SidecarMode"),
    ),
    "no submitter template": (
        *("prod", "operator", "submitterPodTemplate"),
        lambda o: one(o, "RayJob")["spec"].pop("submitterPodTemplate"),
    ),
    "a ttl without shutdown": (
        *("prod", "operator", "ttlSecondsAfterFinished needs"),
        lambda o: one(o, "RayJob")["spec"].pop("shutdownAfterJobFinishes"),
    ),
    "no deadline": (
        *("prod", "operator", "activeDeadlineSeconds"),
        lambda o: one(o, "RayJob")["spec"].pop("activeDeadlineSeconds"),
    ),
    "packages at run time": (
        *("prod", "operator", "pip"),
        lambda o: put(one(o, "RayJob")["spec"], runtimeEnvYAML="pip: [numpy]"),
    ),
    "an entrypoint that the submitter would take apart": (
        *("prod", "operator", "plain words"),
        lambda o: put(one(o, "RayJob")["spec"], entrypoint="cd /etc && lockstep train job.yaml"),
    ),
    "a template that would run": (
        *("prod", "operator", "not suspended"),
        lambda o: put(one(o, "RayJob")["spec"], suspend=False),
    ),
    "a template in the queue": (
        *("prod", "operator", "itself be queued"),
        lambda o: one(o, "RayJob")["metadata"]["labels"].update(
            {"kueue.x-k8s.io/queue-name": "lockstep"}
        ),
    ),
    "a gate that is off": (
        *("prod", "operator", "feature gate"),
        lambda o: put(cluster_spec(one(o, "RayService")), networkPolicy={}),
    ),
    "state given twice": (
        *("prod", "operator", "RAY_REDIS_ADDRESS"),
        lambda o: ray(o, "RayService")["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "r"}),
    ),
    "an autoscaler of no version": (
        *("dev", "operator", "written out as v2"),
        lambda o: cluster_spec(one(o, "RayCluster"))["autoscalerOptions"].pop("version"),
    ),
    "requests to the head": (
        *("prod", "operator", "excludeHeadPodFromServeSvc"),
        lambda o: one(o, "RayService")["spec"].pop("excludeHeadPodFromServeSvc"),
    ),
    "a missing secret": (
        *("prod", "reference", "no secret lockstep-databse"),
        lambda o: put(
            ray(o, "RayService")["env"][0]["valueFrom"]["secretKeyRef"], name="lockstep-databse"
        ),
    ),
    "a missing key of a secret": (
        *("prod", "reference", "no key uri"),
        lambda o: put(ray(o, "RayService")["env"][0]["valueFrom"]["secretKeyRef"], key="uri"),
    ),
    "a missing config map": (
        *("prod", "reference", "no config map lockstep-service"),
        lambda o: o.remove(one(o, "ConfigMap", "lockstep-service")),
    ),
    "a missing account": (
        *("prod", "reference", "no account"),
        lambda o: put(pod(o), serviceAccountName="lockstep-rays"),
    ),
    "a missing claim": (
        *("prod", "reference", "no claim lockstep-data"),
        lambda o: o.remove(one(o, "PersistentVolumeClaim", "lockstep-data")),
    ),
    "a missing volume": (
        *("prod", "reference", "no volume data"),
        lambda o: pod(o)["volumes"].pop(0),
    ),
    "a missing service": (
        *("prod", "reference", "no service redis"),
        lambda o: o.remove(one(o, "Service", "redis")),
    ),
    "an ingress to nowhere": (
        *("prod", "reference", "no service lockstep-svc"),
        lambda o: put(
            one(o, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"],
            name="lockstep-svc",
        ),
    ),
    "a port that nobody listens on": (
        *("dev", "reference", "nobody listens on port 5433"),
        lambda o: put(one(o, "Service", "postgres")["spec"]["ports"][0], targetPort=5433),
    ),
    "a wall with a door to nobody": (
        *("prod", "reference", "nobody listens on port 9000"),
        lambda o: put(
            one(o, "NetworkPolicy", "predictions")["spec"]["ingress"][0]["ports"][0], port=9000
        ),
    ),
    "a probe of a port that nobody listens on": (
        *("prod", "reference", "nobody listens on port serving"),
        lambda o: put(ray(o, "RayService")["readinessProbe"]["httpGet"], port="serving"),
    ),
    "a selector that picks nothing": (
        *("prod", "reference", "picks no pod"),
        lambda o: put(one(o, "PodDisruptionBudget")["spec"]["selector"], matchLabels={"a": "b"}),
    ),
    "a monitor of a port that is not": (
        *("prod", "reference", "no port metric "),
        lambda o: put(one(o, "PodMonitor")["spec"]["podMetricsEndpoints"][0], port="metric"),
    ),
    "a budget that Kubernetes cannot count": (
        *("prod", "reference", "whole number of minAvailable"),
        lambda o: put(
            one(o, "PodDisruptionBudget", "lockstep-serving-workers")["spec"], minAvailable="50%"
        ),
    ),
    "a queue of nobody's": (
        *("prod", "reference", "no cluster queue"),
        lambda o: put(one(o, "LocalQueue")["spec"], clusterQueue="lockstp"),
    ),
    "a priority that is not": (
        *("prod", "reference", "no priority class"),
        lambda o: put(pod(o), priorityClassName="high"),
    ),
    "a role that is not": (
        *("prod", "reference", "no Role"),
        lambda o: o.remove(one(o, "Role", "lockstep-launcher")),
    ),
    "an object of another namespace": (
        *("prod", "reference", "is not here"),
        lambda o: put(one(o, "CronJob")["metadata"], namespace="default"),
    ),
    "a privileged pod": (
        *("prod", "security", "privileged"),
        lambda o: put(ray(o)["securityContext"], privileged=True),
    ),
    "a root user inside Ray's kinds": (
        *("prod", "security", "runAsNonRoot"),
        lambda o: put(pod(o)["securityContext"], runAsNonRoot=False),
    ),
    "a submitter without a security context": (
        *("prod", "security", "submitter"),
        lambda o: one(o, "RayJob")["spec"]["submitterPodTemplate"]["spec"]["containers"][0].pop(
            "securityContext"
        ),
    ),
    "an autoscaler without a security context": (
        *("dev", "security", "autoscalerOptions"),
        lambda o: cluster_spec(one(o, "RayCluster"))["autoscalerOptions"].pop("securityContext"),
    ),
    "a path of the machine": (
        *("prod", "security", "hostPath"),
        lambda o: pod(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    "a token for everybody": (
        *("prod", "security", "token is mounted"),
        lambda o: put(pod(o), automountServiceAccountToken=True),
    ),
    "rights to everything": (
        *("prod", "security", "everything"),
        lambda o: put(one(o, "Role")["rules"][0], verbs=["*"]),
    ),
    "a namespace that lets all in": (
        *("prod", "security", "not enforced"),
        lambda o: one(o, "Namespace")["metadata"]["labels"].pop(
            "pod-security.kubernetes.io/enforce"
        ),
    ),
    "a password written out": (
        *("prod", "secrets", "by reference only"),
        lambda o: ray(o, "RayService")["env"].append({"name": "DB_PASSWORD", "value": "x"}),
    ),
    "a secret in the manifests": (
        *("prod", "secrets", "by reference only"),
        lambda o: o.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s", "namespace": "lockstep"},
                "stringData": {"a": "b"},
            }
        ),
    ),
    "no wall": (
        *("prod", "network", "denies by default"),
        lambda o: o.remove(one(o, "NetworkPolicy", "default-deny")),
    ),
    "no names": (
        *("prod", "network", "port 53"),
        lambda o: o.remove(one(o, "NetworkPolicy", "names")),
    ),
    "an operator that is shut out": (
        *("prod", "network", "operator cannot ask"),
        lambda o: o.remove(one(o, "NetworkPolicy", "operator")),
    ),
    "an image of the day": (
        *("prod", "values", "not pinned"),
        lambda o: put(ray(o), image="registry.example.com/lockstep:latest"),
    ),
    "less memory asked for than used": (
        *("prod", "values", "may be killed"),
        lambda o: put(ray(o)["resources"]["requests"], memory="1Gi"),
    ),
    "training on the head": (
        *("prod", "values", "num-cpus"),
        lambda o: put(head(o), rayStartParams={}),
    ),
    "no time to hand over": (
        *("prod", "values", "no time to hand over"),
        lambda o: pod(o).pop("terminationGracePeriodSeconds"),
    ),
    "a schedule of six fields": (
        *("prod", "values", "five fields"),
        lambda o: put(one(o, "CronJob")["spec"], schedule="0 0 3 * * *"),
    ),
    "a command that is not": (
        *("prod", "command", "No such command"),
        lambda o: put(
            one(o, "RayJob", "training")["spec"], entrypoint="lockstep trian /etc/lockstep/job/j"
        ),
    ),
    "an option that is not": (
        *("prod", "command", "No such option"),
        lambda o: put(
            launcher(o)["containers"][0], command=["lockstep", "launch", "retraining", "--exclusiv"]
        ),
    ),
    "a hook that is not": (
        *("prod", "command", "unknown program"),
        lambda o: put(
            ray(o, name="training")["lifecycle"]["preStop"]["exec"], command=["ray", "stop"]
        ),
    ),
    "a file that is not mounted": (
        *("prod", "file", "has no pipelines.yaml"),
        lambda o: put(
            one(o, "RayJob", "retraining")["spec"],
            entrypoint="lockstep retrain /etc/lockstep/pipeline/pipelines.yaml",
        ),
    ),
    "a service of code that is not": (
        *("prod", "command", "no module serving.app_of_nobody"),
        lambda o: put(
            one(o, "RayService")["spec"],
            serveConfigV2=one(o, "RayService")["spec"]["serveConfigV2"].replace(
                "serving.deployment", "serving.app_of_nobody"
            ),
        ),
    ),
    "a launcher without rights": (
        *("prod", "rights", "may not create rayjobs"),
        lambda o: one(o, "Role", "lockstep-launcher")["rules"][0]["verbs"].remove("create"),
    ),
    "a serve configuration that Ray refuses": (
        *("prod", "ray", "ValidationError"),
        lambda o: put(
            one(o, "RayService")["spec"],
            serveConfigV2=one(o, "RayService")["spec"]["serveConfigV2"].replace(
                "serving.deployment:build", "app"
            ),
        ),
    ),
    "another Ray than the image's": (
        *("prod", "ray", "is not that of the image"),
        lambda o: put(cluster_spec(one(o, "RayService")), rayVersion="2.9.0"),
    ),
    "a group without processors": (
        *("prod", "ray", "CPU"),
        lambda o: put(ray(o), resources={}),
    ),
    "an option that ray start has not": (
        *("prod", "ray", "no option --num-cpu"),
        lambda o: put(worker(o), rayStartParams={"num-cpu": "1"}),
    ),
    "a metric that nobody exports": (
        *("prod", "metric", "ray_serve_requests_per_fortnight"),
        lambda o: put(
            one(o, "PrometheusRule")["spec"]["groups"][1]["rules"][1],
            expr="rate(ray_serve_requests_per_fortnight[5m]) > 1",
        ),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_is_red_for(name, renders, of_cluster):
    overlay, rule, text, fault = FAULTS[name]
    objects = renders(overlay)
    fault(objects)
    found = [str(finding) for finding in check(objects, of_cluster, versions()[-1:])]
    assert [line for line in found if line.startswith(f"[{rule}]") and text in line], found


def test_there_are_faults_enough():
    assert len(FAULTS) >= 25
