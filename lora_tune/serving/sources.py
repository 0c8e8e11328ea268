"""What an operator or an admin request calls an adapter → its checked files, and what this server will call it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_tune.adapter import registry
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.shelf import registered
from lora_tune.errors import RefusedError, RequestError
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.serving.deployed import version_id
from lora_tune.serving.state import Record

_MAX_SPEC_CHARS = 4096


@dataclass(frozen=True)
class Found:
    """A version that could be loaded, checked by the door."""

    name: str
    number: int | None
    digest: str
    files: AdapterFiles
    source: str
    """Its folder, relative to the registry where it lies inside."""

    @property
    def id(self) -> str:
        """What it will be called."""
        return version_id(self.name, self.number, self.digest)

    @property
    def record(self) -> Record:
        """It as the journal knows it."""
        return Record(id=self.id, name=self.name, number=self.number, digest=self.digest, source=self.source)


def find(spec: str, *, root: Path, name: str | None, allow_outside: bool) -> Found:
    """Return the adapter that `spec` names, its files checked.

    Args:
        spec: `name`, `name@3`, `name@sha256:…` or an alias of the registry, or a folder inside it.
        root: the registry.
        name: another name to serve it under.
        allow_outside: any folder may be named, relative to the working folder; for the operator's own command line.

    Raises:
        RequestError: spec or name cannot be meant (400).
        RefusedError: the folder is outside of the registry, or is no adapter (412).
        MissingInputError: there is no such adapter; close names are given (404).
    """
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise RequestError(f"{name[:100]!a} is no name for an adapter", hint=NAME_HINT)
    if not spec or len(spec) > _MAX_SPEC_CHARS or "\0" in spec:
        raise RequestError(
            f"an adapter is named by 1 to {_MAX_SPEC_CHARS} characters; these are {len(spec)}, or hold a NUL",
            hint="give NAME, NAME@VERSION, an alias, or a folder",
        )
    if allow_outside:
        folder = registry.find(spec, root=root)
    elif "/" in spec or spec.startswith("."):
        folder = root / spec
        _check_inside(folder, root)
    else:
        folder = registry.find_version(spec, root=root).folder
    return _opened(folder, root=root, name=name)


def recall(record: Record, *, root: Path) -> Found:
    """Return a version that the journal speaks of, its files checked to be those of then.

    Raises:
        RefusedError: its files are others now, or no adapter any more (exit 77).
        MissingInputError: they are gone (exit 66).
    """
    folder = root / record.source
    if not Path(record.source).is_absolute():
        _check_inside(folder, root)
    found = _opened(folder, root=root, name=record.name)
    if found.digest != record.digest:
        raise RefusedError(
            f"{folder} holds sha256:{found.digest[:12]}… now; when it was loaded, it held sha256:{record.digest[:12]}…",
            hint=f"load it again if that is what {record.name} shall be",
            where=str(folder),
        )
    # A number that the registry gave stays, also when the registry was set up anew around the same files.
    return Found(record.name, record.number, found.digest, found.files, record.source)


NAME_HINT = "lower-case letters, digits and hyphens, at most 63"


def _opened(folder: Path, *, root: Path, name: str | None) -> Found:
    # A path of the registry in another spelling is still that version, and must hold what it held when it came.
    folder = Path(os.path.realpath(folder))
    real_root = Path(os.path.realpath(root))
    # A slash makes it a folder's path, never a name.
    files = registry.open_found(f"{folder}/", root=real_root)
    version = registered(folder, real_root)
    inside = folder.is_relative_to(real_root)
    own = version.name if version else _own_name(files, folder)
    number = version.number if version is not None and name in (None, version.name) else None
    source = str(folder.relative_to(real_root)) if inside else str(folder)
    return Found(name or own, number, registry.content_digest(files), files, source)


def _own_name(files: AdapterFiles, folder: Path) -> str:
    said = (files.manifest.name if files.manifest else "", folder.name)
    fitting = [name for name in said if re.fullmatch(NAME_PATTERN, name)]
    if not fitting:
        raise RequestError(f"{folder} does not say a name that can be served", hint=f"give one: {NAME_HINT}")
    return fitting[0]


def _check_inside(folder: Path, root: Path) -> None:
    """Refuse a folder that is not inside the registry, in the same words whether it exists or not."""
    real, real_root = Path(os.path.realpath(folder)), Path(os.path.realpath(root))
    if real == real_root or not real.is_relative_to(real_root):
        raise RefusedError(
            "only adapters inside the registry are loaded",
            hint="import it first: `lora-tune adapters import`, then load it by name",
        )
