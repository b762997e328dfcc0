"""A thin seam to a cluster's API: the few calls that submitting and following runs needs.

Owns credentials (a kubeconfig, or the account of the pod this runs in), time limits, and the
wording of what the API server refuses. Objects are plain mappings, as in manifests. Needs the extra
`kubernetes`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import config
from kubernetes.client import Configuration
from kubernetes.config.config_exception import ConfigException

from configs.errors import EnvironmentFailure, LockstepError, UserError
from lockstep.kustomize import Manifest

_load_config: Any = config  # without types
_IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_ANSWER_S = (10.0, 30.0)  # to connect, to answer
_PATHS = {
    "RayJob": "/apis/ray.io/v1/namespaces/{}/rayjobs",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Workload": "/apis/kueue.x-k8s.io/v1beta2/namespaces/{}/workloads",
}


class KubernetesError(UserError):
    """The API server refused, for a reason that the user can do something about."""


class NotThere(KubernetesError):
    """No such object."""


class AlreadyThere(KubernetesError):
    """There is an object of that name, and it is not the one that was meant."""


class Unreachable(EnvironmentFailure):
    """The API server does not answer, or not with sense; later it may."""


class KubernetesClient:
    """One namespace of one cluster.

    Args:
        namespace: None: the kubeconfig context's, or the pod's own.
        context: Of the kubeconfig. None: the current one.
        answer_s: Longest wait to connect, and for an answer, in seconds.

    Raises:
        KubernetesError: There are no credentials.
    """

    def __init__(
        self,
        namespace: str | None = None,
        context: str | None = None,
        answer_s: tuple[float, float] = _ANSWER_S,
    ) -> None:
        self._configuration = Configuration()
        found = _load(self._configuration, context)
        self.namespace = namespace or found
        self._answer_s = answer_s
        self._pool = _pool(self._configuration)

    def get(self, kind: str, name: str) -> Manifest:
        """One object.

        Raises:
            NotThere: There is none of that name.
        """
        return self._call("GET", kind, name)

    def find(self, kind: str, name: str) -> Manifest | None:
        """One object; None where there is none of that name."""
        with contextlib.suppress(NotThere):
            return self.get(kind, name)
        return None

    def items(self, kind: str, selector: str = "") -> list[Manifest]:
        """Objects whose labels match, oldest first."""
        found = self._call("GET", kind, query={"labelSelector": selector} if selector else {})
        items: list[Manifest] = found.get("items", [])
        return sorted(items, key=lambda item: str(item["metadata"].get("creationTimestamp", "")))

    def create(self, manifest: Manifest) -> Manifest:
        """Make an object in the namespace of this client.

        Raises:
            AlreadyThere: One of that name exists.
        """
        metadata = {**manifest["metadata"], "namespace": self.namespace}
        return self._call("POST", manifest["kind"], body={**manifest, "metadata": metadata})

    def delete(self, kind: str, name: str, uid: str | None = None) -> None:
        """Delete an object, and what belongs to it, in the background.

        Args:
            kind: Of the object.
            name: Of the object.
            uid: Which one of that name. None: any.

        Raises:
            NotThere: There is none of that name.
            AlreadyThere: One that is not `uid` has the name.
        """
        only = {"preconditions": {"uid": uid}} if uid else {}
        self._call("DELETE", kind, name, body={"propagationPolicy": "Background", **only})

    def log(
        self, pod: str, *, follow: bool, since: str | None = None, idle_s: float = 60.0
    ) -> Iterator[str]:
        """Lines of a pod's log, each with its time in front; with `follow` until the pod ends.

        Ends early, without an error, where nothing came for `idle_s` seconds or the connection
        broke: ask again from the last line's time on.
        """
        query = {"timestamps": "true", "follow": "true" if follow else "false"}
        if since is not None:
            query["sinceTime"] = since
        path = f"{_PATHS['Pod'].format(self.namespace)}/{pod}/log"
        with contextlib.closing(self._request("GET", path, query, None, (10.0, idle_s))) as answer:
            rest = b""
            try:
                for part in answer.stream(2**16):
                    *lines, rest = (rest + part).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
            except (urllib3.exceptions.HTTPError, OSError):
                return  # the cut-off line comes again
            if rest:
                yield rest.decode(errors="replace")

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    def _call(
        self,
        method: str,
        kind: str,
        name: str | None = None,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
    ) -> Manifest:
        path = _PATHS[kind].format(self.namespace) + (f"/{name}" if name else "")
        answer = self._request(method, path, query or {}, body, self._answer_s)
        try:
            value = json.loads(answer.data)
        except ValueError as error:
            raise Unreachable(f"{self._where()} answered with something else than JSON.") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._silence(error) from error
        if not isinstance(value, dict):
            raise Unreachable(f"{self._where()} answered with something else than an object.")
        return value

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Manifest | None,
        answer_s: tuple[float, float],
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json, */*", "Content-Type": "application/json"}
        settings: Any = self._configuration.auth_settings()  # renews expired tokens
        for setting in settings.values():
            headers[setting["key"]] = setting["value"]
        try:
            answer = self._pool.request(
                method,
                f"{self._configuration.host.rstrip('/')}{path}"
                + (f"?{urlencode(query)}" if query else ""),
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                timeout=urllib3.Timeout(*answer_s),
                preload_content=False,
                retries=False,  # who calls decides what is tried again
                redirect=False,
            )
            if answer.status >= 300:
                raise self._refusal(answer.status, answer.data, method, path)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._silence(error) from error
        return answer

    def _silence(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self._where()} does not answer: {error}. Check the network and the kubeconfig."
        )

    def _where(self) -> str:
        return f"the API server at {self._configuration.host}"

    def _refusal(self, status: int, body: bytes, method: str, path: str) -> LockstepError:
        what = path.partition(f"/namespaces/{self.namespace}/")[2]
        reason = _reason(body)
        if status == 404:
            return NotThere(
                f"there is no {what} in the namespace {self.namespace}, or the cluster does not "
                "know its kind. Name the namespace as in --address kubernetes://NAMESPACE, and see "
                "that an overlay is applied."
            )
        if status == 409:
            return AlreadyThere(f"{what} is already there, in the namespace {self.namespace}.")
        if status in (401, 403):
            return KubernetesError(
                f"{method} {what} is not allowed to this user ({reason}). Bind the role "
                f"lockstep-submitter in the namespace {self.namespace}, or set KUBECONFIG to the "
                "file of a user who may."
            )
        if status in (400, 422):
            return KubernetesError(
                f"{self._where()} refused {what}: {reason}. Correct the overlay."
            )
        return Unreachable(f"{self._where()} answered {status} to {method} {what}: {reason}.")


def _reason(body: bytes) -> str:
    """What the server says, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message", text))
    return " ".join(text.split())[:300]


def _pool(configuration: Any) -> urllib3.PoolManager:
    options: dict[str, Any] = {"num_pools": 2, "maxsize": 4}
    if configuration.host.startswith("https"):
        options |= {
            "cert_reqs": "CERT_REQUIRED" if configuration.verify_ssl else "CERT_NONE",
            "ca_certs": configuration.ssl_ca_cert,
            "cert_file": configuration.cert_file,
            "key_file": configuration.key_file,
        }
        if getattr(configuration, "tls_server_name", None):
            options["server_hostname"] = configuration.tls_server_name
    if configuration.proxy:
        return urllib3.ProxyManager(configuration.proxy, **options)
    return urllib3.PoolManager(**options)


def _load(configuration: Any, context: str | None) -> str:
    """Fill in credentials; returns the namespace that they come with."""
    try:
        if context is None and _IN_POD.exists():
            _load_config.load_incluster_config(client_configuration=configuration)
            return _IN_POD.read_text().strip()
        file = os.environ.get("KUBECONFIG")  # the package reads it once, when it is imported
        _load_config.load_kube_config(
            config_file=file, context=context, client_configuration=configuration
        )
        contexts, current = _load_config.list_kube_config_contexts(config_file=file)
    except ConfigException as error:
        raise KubernetesError(
            f"there are no usable credentials of a cluster: {error}. Set KUBECONFIG to a file "
            "whose current context is the cluster's."
        ) from None
    chosen = next((each for each in contexts if each["name"] == context), current)
    return str(chosen["context"].get("namespace", "default"))
