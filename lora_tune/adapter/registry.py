"""`adapters/<name>/<version>/` on disk: versions that are added whole and never changed, and a journal of what happened."""

import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_tune.adapter.door import AdapterFiles, open_adapter
from lora_tune.errors import LoraTuneError, MissingInputError, UsageError
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.staging import staged_folder

_SPEC = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]{0,62})(?:@(?P<version>\d{1,9}|sha256:[0-9a-f]{8,64}))?$")


@dataclass(frozen=True)
class Version:
    """One adapter in the registry."""

    name: str
    number: int
    folder: Path

    @property
    def spec(self) -> str:
        """`name@number`, as every verb takes it."""
        return f"{self.name}@{self.number}"


def registry_root() -> Path:
    """Return where adapters are kept: LORA_TUNE_ADAPTERS, or `adapters/` in the working folder."""
    return Path(os.environ.get("LORA_TUNE_ADAPTERS") or "adapters")


def content_digest(files: AdapterFiles) -> str:
    """Return the sha256 that names an adapter by content: of its weights and its config."""
    return canonical_digest({"config": files.config_digest, "weights": files.weights_digest})


def add(folder: Path, name: str, *, root: Path) -> Version:
    """Copy a checked adapter into the registry as the next version of `name`.

    Raises:
        AdapterError: the folder is no adapter (exit 77).
        CannotCreateError: the registry cannot be written (exit 73).
    """
    if not re.match(NAME_PATTERN, name):
        raise UsageError(f"{name!r} is no adapter's name", hint="lower-case letters, digits and hyphens, at most 63")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        versions = [version.number for version in _versions(root / name)]
        version = Version(name, max(versions, default=0) + 1, root / name / str(max(versions, default=0) + 1))
        with staged_folder(version.folder) as stage:
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.is_symlink():
                    shutil.copyfile(path, stage / path.name)
            digest = content_digest(open_adapter(stage))
        event = {"event": "added", "name": name, "version": version.number, "digest": digest, "at": time.time(),
                 "from": str(folder.resolve())}  # fmt: skip
        with (root / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(event, sort_keys=True) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
    return version


def origin(folder: Path, *, root: Path) -> Path:
    """Return the folder that a registered adapter was copied from; any other folder is its own origin."""
    journal = root / "journal.jsonl"
    if not journal.is_file() or folder.parent.parent.resolve() != root.resolve():
        return folder
    for line in reversed(journal.read_text(encoding="utf-8").splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that was cut off by a crash
        if (event.get("name"), str(event.get("version"))) == (folder.parent.name, folder.name):
            return Path(event.get("from", folder))
    return folder


def find(spec: str, *, root: Path) -> Path:
    """Return the folder that `spec` names: a path, `name` (its newest version), `name@3` or `name@sha256:…`.

    Raises:
        MissingInputError: there is no such adapter; close names are given (exit 66).
    """
    if ("/" in spec or spec.startswith(".")) or (Path(spec).is_dir() and not (root / spec).is_dir()):
        return Path(spec)
    match = _SPEC.match(spec)
    versions = _versions(root / match["name"]) if match else []
    if match is None or not versions:
        raise _unknown(spec, root)
    wanted = match["version"]
    if wanted is None:
        return versions[-1].folder
    for version in versions:
        if wanted.startswith("sha256:"):
            if content_digest(open_adapter(version.folder)).startswith(wanted.removeprefix("sha256:")):
                return version.folder
        elif version.number == int(wanted):
            return version.folder
    raise MissingInputError(
        f"{match['name']} has no version {wanted}; it has {', '.join(str(version.number) for version in versions)}",
        hint="`lora-tune adapters list` shows all",
    )


def list_versions(*, root: Path) -> list[tuple[Version, AdapterFiles | LoraTuneError]]:
    """Return every version, with its checked files or why it is refused."""
    found: list[tuple[Version, AdapterFiles | LoraTuneError]] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        for version in _versions(folder) if re.match(NAME_PATTERN, folder.name) else []:
            try:
                found.append((version, open_adapter(version.folder)))
            except LoraTuneError as err:
                found.append((version, err))
    return found


def _versions(folder: Path) -> list[Version]:
    if not folder.is_dir():
        return []
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    return [Version(folder.name, number, folder / str(number)) for number in numbers]


def _unknown(spec: str, root: Path) -> MissingInputError:
    import difflib

    names = [folder.name for folder in root.iterdir() if _versions(folder)] if root.is_dir() else []
    close = difflib.get_close_matches(spec.partition("@")[0], names, n=3)
    listed = (
        f"; did you mean {', '.join(close)}?"
        if close
        else (f"; known: {', '.join(sorted(names)[:10])}" if names else "")
    )
    return MissingInputError(
        f"no adapter {spec!r} in {root}/{listed}",
        hint="`lora-tune adapters list` shows the registry; a folder works too, as ./path",
    )
