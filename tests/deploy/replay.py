"""A RayJob's cluster as processes of this machine: the operator's lines, on loopback.

What the pods would have is laid out below one folder, and the paths in manifests are led there:
config maps as files, the claim as a folder, settings as environment.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.deploy.checks.objects import Manifest, cluster_spec, of_kind
from tests.deploy.checks.start_lines import start_line, start_parameters
from tests.support.ray_cluster import BIN, ROOT, RayNode, free_ports

_STORE_BYTES = 100_000_000
TOKEN = "0123456789abcdef" * 4
HOME = "/var/lib/lockstep"


class Replay:
    """Head and workers of one of Ray's kinds; a `with` block ends all of them.

    Args:
        manifest: The RayJob or RayService.
        objects: All others that it refers to.
    """

    def __init__(self, manifest: Manifest, objects: list[Manifest]) -> None:
        self.manifest = manifest
        self.folder = Path(tempfile.mkdtemp(prefix="ls-replay-", dir="/tmp"))
        self.home = self.folder / "home"
        self.home.mkdir()
        self._maps = {each["metadata"]["name"]: each for each in of_kind(objects, "ConfigMap")}
        self._places = {HOME: str(self.home)}
        # Replicas of a service listen where its front does; a run's nodes are told apart.
        self._is_service = manifest["kind"] == "RayService"
        self.nodes: list[RayNode] = []
        self.agents: list[str] = []
        head = cluster_spec(manifest)["headGroupSpec"]["template"]["spec"]
        self._lay_out(head)
        self.environment = self._environment(head["containers"][0])

    def __enter__(self) -> "Replay":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        left = [process for node in self.nodes for process in node.processes()]
        left += [process for process in psutil.process_iter() if self.is_ours(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=20)
        for node in self.nodes:
            node.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("LOCKSTEP_HOME") == str(self.home)
        except psutil.Error:
            return False

    def here(self, text: str) -> str:
        """A text of the manifests with this machine's places."""
        for there, place in sorted(self._places.items(), reverse=True):
            text = text.replace(there, place)
        return text

    def healthz(self) -> list[int]:
        """What the operator's probes would be answered, by node."""
        statuses = []
        for agent in self.agents:
            with urllib.request.urlopen(f"http://{agent}/api/healthz", timeout=10) as answer:
                statuses.append(answer.status)
        return statuses

    def submit(self, timeout_s: float) -> "subprocess.CompletedProcess[str]":
        """What the submitter's script does, to the end of the job."""
        name, entrypoint = "replayed", self.here(self.manifest["spec"]["entrypoint"])
        at = f"--address {self.dashboard}"
        script = (
            f"if ! ray job status {at} {name} >/dev/null 2>&1; then "
            f"ray job submit {at} --no-wait --submission-id={name} -- {entrypoint} ; fi ; "
            f"ray job logs {at} --follow {name} ; ray job status {at} {name}"
        )
        return subprocess.run(
            ["bash", "-c", script],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def node_command(self, node: int, command: list[str]) -> "subprocess.Popen[str]":
        """A command in the environment of a node, such as a hook of its pod."""
        address = self._address(node)
        environment = {**self.environment, "RAY_ADDRESS": self._head, "RAY_NODE_IP": address}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _start(self) -> None:
        port, dashboard = free_ports(2)
        host = self._address(0)
        self._head = f"{host}:{port}"
        self.dashboard = f"http://{host}:{dashboard}"
        cluster = cluster_spec(self.manifest)
        params = start_parameters(cluster["headGroupSpec"], "head", "")
        own = {"port": str(port), "dashboard-host": host, "dashboard-port": str(dashboard)}
        own |= {
            "temp-dir": str(self.folder / "ray"),
            "ray-client-server-port": str(free_ports(1)[0]),
        }
        self._node({**params, **own}, "head")
        for group in cluster["workerGroupSpecs"]:
            for _ in range(group.get("replicas", group["minReplicas"])):
                self._node(start_parameters(group, "worker", self._head), "worker")

    def _address(self, node: int) -> str:
        return "127.0.0.1" if self._is_service else f"127.0.0.{node + 2}"

    def _node(self, params: dict[str, str], kind: str) -> None:
        agent, metrics = free_ports(2)
        address = self._address(len(self.nodes))
        own = {
            "node-ip-address": address,
            "dashboard-agent-listen-port": str(agent),
            "metrics-export-port": str(metrics),
            "object-store-memory": str(_STORE_BYTES),
        }
        log = self.folder / f"node{len(self.nodes)}.log"
        line = start_line({**params, **own}, kind)
        line[0] = str(BIN / "ray")
        self.nodes.append(self._started(line, log))
        self.agents.append(f"{address}:{agent}")

    def _started(self, line: list[str], log: Path) -> RayNode:
        """Ray gives a node 30 s; where the machine is busy it is started again, as pods are."""
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                return RayNode(line, self.environment, log)
        return RayNode(line, self.environment, log)

    def _lay_out(self, pod: Manifest) -> None:
        """Volumes of the pod as folders, so that texts can be led there.

        As a kubelet does it: the files in a folder with a date, reached by links through `..data`.
        """
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in pod["containers"][0]["volumeMounts"]:
            source = volumes[mount["name"]].get("configMap")
            if source is None:
                continue
            folder = self.folder / mount["name"]
            self._places[mount["mountPath"]] = str(folder)
            data = self._maps[source["name"]]["data"]
            items = source.get("items") or [{"key": key, "path": key} for key in data]
            dated = folder / "..2026_01_01_00_00_00.1"
            dated.mkdir(parents=True)
            (folder / "..data").symlink_to(dated.name)
            for item in items:
                path = dated / item["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.here(data[item["key"]]))
            for first in {item["path"].partition("/")[0] for item in items}:
                (folder / first).symlink_to(f"..data/{first}")

    def _environment(self, container: Manifest) -> dict[str, str]:
        found = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                data = self._maps[source["configMapRef"]["name"]]["data"]
                found |= {key: self.here(value) for key, value in data.items()}
        for variable in container.get("env", ()):
            if "value" in variable:
                found[variable["name"]] = self.here(variable["value"])
        return found | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "HOME": str(self.folder),
        }


def until(is_so: Callable[[], bool], timeout_s: float) -> None:
    """Look until something is so."""
    ends_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.2)
