"""The pipeline files that a scheduler looks after: named ones, and those of a folder.

Owns which files these are, and that a file is read again when it has changed. A file that is wrong
is refused at first; later, while the scheduler runs, what it held before goes on to hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.cron import Cron
from cluster.schedule import Schedule
from configs.errors import JobError, LockstepError, UserError
from configs.schedule import load_schedule


@dataclass(frozen=True)
class ScheduledPipeline:
    """A pipeline file with a schedule.

    Attributes:
        path: The file.
        schedule: Of the pipeline's name.
    """

    path: Path
    schedule: Schedule


class PipelineFiles:
    """Named files, and all of a folder that hold a schedule.

    Raises:
        UserError: A named file has no schedule, or two files have one name.
    """

    def __init__(self, paths: Sequence[Path], folder: Path | None = None) -> None:
        if not paths and folder is None:
            raise UserError("received no pipeline. Name pipeline files, or a folder by --folder.")
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"--folder received {folder}, which is no folder. Name one, or make it."
            )
        self._paths = [path.absolute() for path in paths]
        self._folder = folder.absolute() if folder is not None else None
        self._signatures: dict[Path, tuple[int, int]] = {}
        self._pipelines: dict[Path, ScheduledPipeline] = {}
        problems = self.reload()
        if problems:
            raise problems[0]

    @property
    def pipelines(self) -> dict[str, ScheduledPipeline]:
        """What is scheduled, by name."""
        return {each.schedule.name: each for each in self._pipelines.values()}

    def reload(self) -> list[LockstepError]:
        """Look at all files again; returns what is wrong with those that changed."""
        problems: list[LockstepError] = []
        found = self._files()
        for path in set(self._signatures) - set(found):
            del self._signatures[path]
            self._pipelines.pop(path, None)
        for path, signature in found.items():
            if self._signatures.get(path) == signature:
                continue
            self._signatures[path] = signature
            try:
                self._take(path)
            except LockstepError as error:
                problems.append(error)
        return problems

    def _files(self) -> dict[Path, tuple[int, int]]:
        paths = list(self._paths)
        if self._folder is not None:
            paths += sorted(p for p in self._folder.glob("*") if p.suffix in (".yaml", ".yml"))
        found = {}
        for path in paths:
            try:
                status = path.stat()
            except OSError:  # it is told when it is read, if that is the first time
                if path not in self._signatures and path in self._paths:
                    found[path] = (0, 0)
                continue
            found[path] = (status.st_mtime_ns, status.st_size)
        return found

    def _take(self, path: Path) -> None:
        pipeline = _read_pipeline(path)
        if pipeline is None:
            self._pipelines.pop(path, None)
            if path in self._paths:
                raise UserError(
                    f"{path} has no section schedule; with its field cron it is allowed here. Add "
                    "it, or run the pipeline by hand with `lockstep retrain`."
                )
            return
        name = pipeline.schedule.name
        other = self.pipelines.get(name)
        if other is not None and other.path != path:
            raise UserError(
                f"{other.path} and {path} both have the name {name!r}; each name once is allowed. "
                "Rename one of the pipelines."
            )
        self._pipelines[path] = pipeline


def _read_pipeline(path: Path) -> ScheduledPipeline | None:
    """Name and schedule of a pipeline file; None where it has no schedule."""
    named = load_schedule(path)
    if named is None:
        return None
    config = named.config
    try:
        cron = Cron.parse(config.cron, config.timezone)
    except UserError as error:
        raise JobError(f"{path}: schedule: {error}") from None
    return ScheduledPipeline(path, Schedule(named.name, cron, config.jitter_s, config.overlap))
