"""Import of a model file into the registry: from `FILE` to a version with an alias.

Owns the order: artifact first, in a folder that is thrown away afterwards, then the version, then
the alias. What stops it before the version leaves nothing.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from lockstep.models import who
from registry.references import check_alias, check_name
from trainer.importing import Imported, ImportRequest, import_model

if TYPE_CHECKING:
    from registry.store import Registry, Version


@dataclass(frozen=True)
class ImportOptions:
    """How a file is imported.

    Attributes:
        features: The input columns in order.
        label: The label's column.
        input_shape: Lengths of a row's axes, where the file does not tell them.
        is_trusted: Allow code in the file to run.
        alias: An alias to set on the new version; empty for none.
        description: For people.
        timeout_s: How long it may take.
        memory_mb: How much memory it may take.
    """

    features: Sequence[str] = ()
    label: str = ""
    input_shape: Sequence[int] = ()
    is_trusted: bool = False
    alias: str = ""
    description: str = ""
    timeout_s: float = 300.0
    memory_mb: int = 4000


def import_file(
    registry: "Registry", path: str | Path, name: str, options: ImportOptions | None = None
) -> dict[str, Any]:
    """Import a model file as the next version of a model. Blocks.

    Returns:
        `name`, `version`, `aliases`, `digest`, `artifact`, `format`, `can_train` and `warnings`.

    Raises:
        ImportRefused: The file is damaged, could run code, or has no equal in Keras 3.
        ImportFailure: The process that imports crashed, or went over a limit.
        RegistryError: The name or the alias is not allowed.
    """
    options = options or ImportOptions()
    check_name(name)
    if options.alias:
        check_alias(options.alias)
    with tempfile.TemporaryDirectory(prefix="lockstep-import-") as scratch:
        folder = Path(scratch) / "artifact"
        imported = import_model(
            ImportRequest(
                path=str(Path(path).absolute()),
                folder=str(folder),
                features=tuple(options.features),
                label=options.label,
                input_shape=tuple(options.input_shape),
                is_trusted=options.is_trusted,
                timeout_s=options.timeout_s,
                memory_mb=options.memory_mb,
            )
        )
        version = registry.register(
            name,
            folder,
            description=options.description or f"imported from {Path(path).name}",
        )
    if options.alias:
        registry.require_intact(version)
        why = f"imported from {Path(path).name}"
        registry.set_alias(name, options.alias, version.number, who=who(), why=why)
        version = registry.version(name, version.number)
    return _record(version, imported)


def _record(version: "Version", imported: Imported) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "digest": version.digest,
        "artifact": str(version.artifact),
        "format": imported.format,
        "can_train": imported.can_train,
        "warnings": imported.warnings,
    }


def parse_shape(text: str) -> tuple[int, ...]:
    """Lengths with commas.

    Raises:
        UserError: They are not whole numbers of 1 or more.
    """
    if not text.strip():
        return ()
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = (0,)
    if min(shape) < 1:
        raise UserError(
            f"--input-shape received {text!r}; whole numbers of 1 or more with commas are allowed, "
            "such as 28,28,1."
        )
    return shape
