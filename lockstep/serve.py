"""`lockstep serve`: the whole service in one command, from nothing to an address that answers.

Owns the order of starting and ending, and the demonstration. Ray is embedded and ends with this
process; what must last is in the database and in the service's folder, so the next start goes on.
"""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import configs
from cluster.runtime import Need, session
from configs.errors import EnvironmentFailure
from lockstep.api import train
from lockstep.examples import write_example
from registry.database import Database
from registry.errors import RegistryError
from registry.store import Registry
from serving import deployment
from serving.accounts import Accounts
from serving.assembly import Settings, ending_file
from serving.dispatching import actors_within
from serving.errors import AccountError
from serving.haproxy import FrontProxy

Say = Callable[[str], None]

DEMO_MODEL = "flights"
DEMO_USER = "demo"

_ROW = {
    "dep_delay": 4.0,
    "distance": 1400.0,
    "hour": 9.0,
    "month": 11.0,
    "weekday": 2.0,
    "temp": 48.0,
    "wind_speed": 9.2,
    "precip": 0.0,
    "visib": 10.0,
}


@dataclass(frozen=True)
class Running:
    """A service that answers.

    Attributes:
        url: Where.
        wait: Returns when SIGTERM or SIGINT came.
    """

    url: str
    wait: Callable[[], None]


@contextmanager
def running(settings: Settings, say: Say) -> Iterator[Running]:
    """The service, for the time of a `with` block; ends with requests under way answered.

    Before the end /readyz answers 503 for `unready_s`, while requests are still taken.

    SIGTERM and SIGINT end `wait`. The environment of `serving.haproxy` must be set already.

    Raises:
        EnvironmentFailure: It does not start.
    """
    config = settings.config
    front = FrontProxy(config.host, config.port, config.tls_cert, config.tls_key)
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = {name: signal.signal(name, ask) for name in (signal.SIGTERM, signal.SIGINT)}
    replicas = config.max_replicas or config.replicas
    ending = ending_file(settings)
    try:
        ending.unlink(missing_ok=True)  # of a service that was killed
        # Counts of an earlier service would be added to those of this one's processes.
        shutil.rmtree(Path(settings.folder) / "metrics", ignore_errors=True)
        with session(Need(replicas + actors_within(config), 1, 0)):
            for name in before:
                signal.signal(name, ask)  # Ray takes SIGTERM for itself when it starts
            try:
                deployment.start(settings)
            except RuntimeError as error:
                raise EnvironmentFailure(
                    f"the service does not start: {' '.join(str(error).split())[:300]}. Its log "
                    f"is in {settings.folder}/logs."
                ) from error
            try:
                yield Running(front.url, lambda: _wait(asked))
            finally:
                ending.touch()
                say("ending: requests under way are answered")
                time.sleep(config.unready_s)
                deployment.stop()
    finally:
        ending.unlink(missing_ok=True)
        for name, handler in before.items():
            signal.signal(name, handler)


def _wait(asked: threading.Event) -> None:
    while not asked.wait(0.5):  # a bound, so that signals are handled
        pass


def prepare_demo(settings: Settings, say: Say) -> str:
    """A champion of the flights example and a user to try it with.

    An existing champion is left alone. Without one, the newest finished run below `runs/flights` is
    registered; without that, the example is trained first, which takes a minute.

    Returns:
        The new key of the user `demo`.

    Raises:
        UserError: The example's packages are not there, or training failed for a mistake.
        EnvironmentFailure: Training or storage failed.
    """
    database = Database(settings.config.database)
    try:
        registry = Registry(database, settings.config.artifacts)
        try:
            version = registry.resolve(DEMO_MODEL)
        except RegistryError:
            run = _newest_run() or _train_demo(say)
            say(f"registering {run / 'artifact'}")
            version = registry.register(DEMO_MODEL, run / "artifact", key=run.name)
            registry.set_alias(
                DEMO_MODEL, "champion", version.number, who="lockstep serve --demo", why="demo"
            )
        say(f"model {version}, digest {version.digest[:12]}")
        return _demo_key(Accounts(database))
    finally:
        database.close()


def demo_lines(url: str, key: str) -> list[str]:
    """Commands for a shell that use the service; they work as they stand."""
    rows = json.dumps({"instances": [_ROW]})
    columns = json.dumps({"inputs": {name: [value, value] for name, value in _ROW.items()}})
    tensors = json.dumps(
        {
            "inputs": [
                {"name": name, "shape": [1], "datatype": "FP32", "data": [value]}
                for name, value in _ROW.items()
            ]
        }
    )
    secure = " --insecure" if url.startswith("https") else ""
    ask = f"curl -s{secure} -H 'Authorization: Bearer {key}'"
    return [
        f"{ask} {url}/v1/models/{DEMO_MODEL}:predict -d '{rows}'",
        f"{ask} {url}/v1/models/{DEMO_MODEL}/labels/champion:predict -d '{columns}'",
        f"{ask} {url}/v2/models/{DEMO_MODEL}/infer -d '{tensors}'",
        f"{ask} {url}/v1/models/{DEMO_MODEL}",
        f"curl -s{secure} {url}/readyz",
    ]


def _newest_run() -> Path | None:
    """The newest run of the example in the working folder that ended well."""
    for summary in sorted(Path("runs", DEMO_MODEL).glob("*/summary.json"), reverse=True):
        folder = summary.parent
        if (folder / "artifact" / "manifest.json").exists():
            return folder.absolute()
    return None


def _train_demo(say: Say) -> Path:
    if not Path("data", DEMO_MODEL).is_dir():
        say("writing the example's data into data/flights")
        write_example(DEMO_MODEL, Path("data"))
    say("training the flights example, about a minute")
    job = Path(next(iter(configs.__path__))) / f"{DEMO_MODEL}.yaml"
    return train(job).folder.absolute()


def _demo_key(accounts: Accounts) -> str:
    who = "lockstep serve --demo"
    for name in (DEMO_USER, *(f"{DEMO_USER}-{number}" for number in range(2, 1_000))):
        for key_of in (accounts.add, accounts.rotate):  # neither: a removed user's name stays taken
            with suppress(AccountError):
                return key_of(name, who=who)
    raise AccountError(f"{DEMO_USER} and all its numbered names were removed; add another user.")
