"""A Kubernetes API server for tests, on loopback: a few kinds, labels, logs, and nothing else.

with FakeApi(folder) as api:
    api.kubeconfig      # for KUBECONFIG
    api.objects         # {(kind, name): manifest}
"""

import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "for-tests-only"
KINDS = {
    "rayjobs": "RayJob",
    "configmaps": "ConfigMap",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "pods": "Pod",
    "workloads": "Workload",
}


class FakeApi:
    """The server; what it holds may be changed while it runs.

    Attributes:
        objects: By kind and name.
        logs: Lines of pods by name; None ends a log that is followed.
        failures: Statuses to answer next, whatever is asked.
        requests: (method, path) of all requests.
        made: (kind, name) of all that was created by request, in order.
        held: Kinds that are only marked when they are deleted; `release` lets them go.
    """

    def __init__(self, folder: Path, namespace: str = "lockstep") -> None:
        self.namespace = namespace
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.logs: dict[str, list[str | None]] = {}
        self.failures: list[int] = []
        self.requests: list[tuple[str, str]] = []
        self.made: list[tuple[str, str]] = []
        self.held: set[str] = set()
        self._ownerless: list[str] = []
        self._count = itertools.count()
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._config()))

    def __enter__(self) -> "FakeApi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """An object as it is once it was made."""
        metadata = manifest["metadata"]
        number = next(self._count)
        metadata.setdefault("uid", f"uid-{number}")
        moment = f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z"
        metadata.setdefault("creationTimestamp", moment)
        self.objects[(manifest["kind"], metadata["name"])] = manifest
        return manifest

    def remove(self, kind: str, name: str) -> None:
        """An object goes; what it owned stays until it is collected."""
        gone = self.objects.pop((kind, name))
        self._ownerless.append(gone["metadata"]["uid"])

    def release(self) -> None:
        """Whatever was deleted and held goes."""
        for (kind, name), manifest in list(self.objects.items()):
            if manifest["metadata"].get("deletionTimestamp"):
                self.remove(kind, name)

    def collect(self) -> None:
        """What belonged to objects that have gone goes too, as Kubernetes does in time."""
        with self._lock:
            for key, manifest in list(self.objects.items()):
                owners = manifest["metadata"].get("ownerReferences") or ()
                if any(owner["uid"] in self._ownerless for owner in owners):
                    del self.objects[key]

    def _config(self) -> dict[str, Any]:
        port = self._server.server_address[1]
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "c", "user": "u", "namespace": self.namespace},
                }
            ],
        }

    def _handler(api) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._do("GET")

            def do_POST(self) -> None:
                self._do("POST")

            def do_DELETE(self) -> None:
                self._do("DELETE")

            def log_message(self, *_: Any) -> None:
                pass

            def _do(self, method: str) -> None:
                url = urlsplit(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                api.requests.append((method, url.path))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._say(401, {"message": "who are you"})
                elif api.failures:
                    self._say(api.failures.pop(0), {"message": "not today"})
                elif url.path.endswith("/log"):
                    self._route(method, url.path, parse_qs(url.query), body)
                else:
                    with api._lock:
                        self._route(method, url.path, parse_qs(url.query), body)

            def _route(self, method: str, path: str, query: Any, body: Any) -> None:
                words = path.strip("/").split("/")
                at = words.index("namespaces")
                namespace, plural, *rest = words[at + 1 :]
                kind = KINDS.get(plural)
                if kind is None or namespace != api.namespace:
                    self._say(404, {"message": "no such thing"})
                elif rest[1:] == ["log"]:
                    self._log(rest[0], query)
                elif method == "POST":
                    self._create(kind, body)
                elif not rest:
                    self._list(kind, query.get("labelSelector", [""])[0])
                elif (kind, rest[0]) not in api.objects:
                    self._say(404, {"message": f"{kind} {rest[0]} not found"})
                elif method == "DELETE":
                    self._delete(kind, rest[0], body or {})
                else:
                    self._say(200, api.objects[(kind, rest[0])])

            def _create(self, kind: str, body: Any) -> None:
                if (kind, body["metadata"]["name"]) in api.objects:
                    self._say(409, {"message": "already exists"})
                elif body["kind"] != kind or body["metadata"]["namespace"] != api.namespace:
                    self._say(400, {"message": "wrong place"})
                else:
                    api.made.append((kind, body["metadata"]["name"]))
                    self._say(201, api.add(body))

            def _delete(self, kind: str, name: str, body: Any) -> None:
                found = api.objects[(kind, name)]
                uid = (body.get("preconditions") or {}).get("uid")
                if uid not in (None, found["metadata"]["uid"]):
                    self._say(409, {"message": "Precondition failed: UID"})
                    return
                if kind in api.held:
                    found["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
                else:
                    api.remove(kind, name)
                self._say(200, found)

            def _list(self, kind: str, selector: str) -> None:
                name, _, value = selector.partition("=")
                found = []
                for (of_kind, _), manifest in api.objects.items():
                    labels = manifest["metadata"].get("labels") or {}
                    has = labels.get(name) == value if value else not name or name in labels
                    if of_kind == kind and has:
                        found.append(manifest)
                self._say(200, {"kind": f"{kind}List", "items": found})

            def _log(self, pod: str, query: Any) -> None:
                if ("Pod", pod) not in api.objects:
                    self._say(404, {"message": "no such pod"})
                    return
                follow = query["follow"] == ["true"]
                since = query.get("sinceTime", [""])[0]
                self.send_response(200)
                self.end_headers()
                for line in self._lines(pod, follow):
                    if line[:19] >= since[:19]:  # whole seconds, as kubelets do
                        self.wfile.write(f"{line}\n".encode())
                        self.wfile.flush()

            def _lines(self, pod: str, follow: bool) -> Any:
                at = 0
                while True:
                    lines = api.logs.get(pod, [])
                    while at < len(lines):
                        if lines[at] is None:
                            return
                        yield lines[at]
                        at += 1
                    if not follow:
                        return
                    time.sleep(0.01)

            def _say(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler
