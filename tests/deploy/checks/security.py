"""The pod security standard `restricted`, on every pod, those inside Ray's kinds too.

Where a namespace enforces it the pods of an operator are refused one by one, long after the object
was accepted; so the rules are applied here to what the operator will make.
"""

import json
import re
from collections.abc import Iterator

from tests.deploy.checks.objects import Finding, Manifest, Pod, cluster_spec, name_of, of_kind, pods

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
SECRET_NAMES = re.compile(r"(?i)password|secret|token|access_key|credential")


def security(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rules `security` and `secrets`."""
    for pod in pods(objects):
        for text in [*_of_pod(pod), *_accounts(pod)]:
            yield Finding("security", pod.where, text)
        for container in pod.containers:
            for text in _of_container(container, pod.spec):
                yield Finding("security", pod.where, f"{container['name']}: {text}")
            for variable in container.get("env") or ():
                if SECRET_NAMES.search(variable["name"]) and "value" in variable:
                    text = (
                        f"{container['name']}: {variable['name']} is written out; by reference only"
                    )
                    yield Finding("secrets", pod.where, text)
    for manifest in of_kind(objects, "RayCluster", "RayJob", "RayService"):
        cluster = cluster_spec(manifest)
        if cluster.get("enableInTreeAutoscaling"):
            beside = cluster.get("autoscalerOptions") or {}
            inherited = {
                "securityContext": {
                    "runAsNonRoot": True,
                    "seccompProfile": {"type": "RuntimeDefault"},
                }
            }
            for text in _of_container(beside, inherited):
                yield Finding("security", name_of(manifest), f"autoscalerOptions: {text}")
    for manifest in objects:
        yield from _of_object(manifest)


def _of_pod(pod: Pod) -> Iterator[str]:
    spec = pod.spec
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is forbidden"
    for volume in spec.get("volumes") or ():
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES:
            yield f"a volume of kind {', '.join(sorted(kinds - VOLUMES))} is forbidden"
    if (spec.get("securityContext") or {}).get("sysctls"):
        yield "sysctls are forbidden"


def _accounts(pod: Pod) -> Iterator[str]:
    needs_token = pod.labels.get("lockstep/role") == "launcher" or (
        pod.node == "head" and cluster_spec(pod.owner).get("enableInTreeAutoscaling")
    )
    mounts = pod.spec.get("automountServiceAccountToken", True)
    if mounts and not needs_token:
        yield "the account's token is mounted, and nothing needs it"


def _of_container(container: Manifest, spec: Manifest) -> Iterator[str]:
    own, of_pod = container.get("securityContext") or {}, spec.get("securityContext") or {}
    if own.get("privileged"):
        yield "privileged is forbidden"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation has to be false"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield "capabilities have to drop ALL"
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if not own.get("runAsNonRoot", of_pod.get("runAsNonRoot")):
        yield "runAsNonRoot has to be true"
    if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
        yield "runAsUser is root"
    profile = own.get("seccompProfile") or of_pod.get("seccompProfile") or {}
    if profile.get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile has to be RuntimeDefault"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem has to be true"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield "hostPort is forbidden"


def _of_object(manifest: Manifest) -> Iterator[Finding]:
    kind, where = manifest["kind"], name_of(manifest)
    if kind == "Secret":
        yield Finding("secrets", where, "a secret is in the manifests; by reference only")
    if kind == "Namespace":
        labels = manifest["metadata"].get("labels") or {}
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield Finding("security", where, "pod security is not enforced as restricted")
    if kind in ("Role", "ClusterRole"):
        for rule in manifest.get("rules") or ():
            if "*" in json.dumps(rule):
                yield Finding("security", where, "a right is given to everything (*)")
            if "secrets" in rule.get("resources", ()):
                yield Finding("security", where, "a right to read secrets is given")
    if kind == "ConfigMap":
        for key, value in (manifest.get("data") or {}).items():
            if SECRET_NAMES.search(key) or re.search(r"(?i)://[^/\s:@]+:[^/\s@]+@", str(value)):
                yield Finding("secrets", where, f"{key} looks like a secret")
    if kind == "Service" and manifest["spec"].get("type", "ClusterIP") != "ClusterIP":
        yield Finding("security", where, "a service is open to the outside")


def walls(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rule `network`: no pod without a wall, and no run without its ways."""
    policies = of_kind(objects, "NetworkPolicy")
    closed = [
        policy
        for policy in policies
        if not policy["spec"].get("podSelector")
        and set(policy["spec"].get("policyTypes", ())) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
    ]
    if not closed:
        yield Finding("network", "NetworkPolicy", "nothing denies by default")
    ports = {
        port.get("port")
        for policy in policies
        if not policy["spec"].get("podSelector")
        for rule in policy["spec"].get("egress") or ()
        for port in rule.get("ports") or ()
    }
    if 53 not in ports:
        yield Finding("network", "NetworkPolicy", "no pod may ask for names (port 53)")
    operators = [policy for policy in policies if "kuberay-system" in json.dumps(policy["spec"])]
    asked = {
        port.get("port")
        for policy in operators
        for rule in policy["spec"].get("ingress") or ()
        for port in rule.get("ports") or ()
    }
    if not {8265, 8000} <= asked:
        yield Finding("network", "NetworkPolicy", "the operator cannot ask heads (8265, 8000)")
