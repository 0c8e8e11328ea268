"""`adapters/<name>/<version>/` on disk: versions that are added whole and never changed, and a journal of what happened."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lora_tune.adapter.door import AdapterFiles, open_adapter
from lora_tune.errors import CannotCreateError, CannotWriteError, LoraTuneError, MissingInputError, UsageError
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.staging import staged_folder

_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]{0,62})(?:@(?P<version>[0-9]{1,9}|sha256:[0-9a-f]{8,64}))?")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_JOURNAL = "journal.jsonl"
_LOCK = ".lock"


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


def ensure_writable(root: Path) -> None:
    """Check that a version can be added later, so that no training is lost for a folder's permissions.

    Raises:
        CannotCreateError: nothing can be written there (exit 73).
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".probe-", dir=root) as probe:
            probe.write(b"x")
        for name in (_LOCK, _JOURNAL):
            if (root / name).exists():
                (root / name).open("ab").close()
    except OSError as err:
        raise CannotCreateError(
            f"the registry {root} cannot be written: {err.strerror}",
            hint="check the folder's permissions and free space, or give another one with --registry",
            where=str(root),
        ) from err


def add(folder: Path, name: str, *, root: Path) -> Version:
    """Copy a checked adapter into the registry as the next version of `name`.

    A number is never given twice, not even when its folder was removed by hand.

    Raises:
        MissingInputError: there is no such folder (exit 66).
        AdapterError: the folder is no adapter (exit 77).
        CannotCreateError: the registry cannot be written (exit 73).
        CannotWriteError: the disk is full or failing; nothing is left of the new version (exit 74).
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"{name!r} is no adapter's name", hint="lower-case letters, digits and hyphens, at most 63")
    if not folder.is_dir():
        raise MissingInputError(f"no adapter folder at {folder}", hint="train one first", where=str(folder))
    with _translated(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / _LOCK):
            number = max(_used_numbers(name, root), default=0) + 1
            version = Version(name, number, root / name / str(number))
            with staged_folder(version.folder) as stage:
                for path in sorted(folder.iterdir()):
                    if path.is_file() and not path.is_symlink():
                        shutil.copyfile(path, stage / path.name)
                digest = content_digest(open_adapter(stage))
            event = {"event": "added", "name": name, "version": number, "digest": digest, "at": time.time(),
                     "from": str(folder.resolve())}  # fmt: skip
            try:
                _append(root / _JOURNAL, event)
            except OSError:
                shutil.rmtree(version.folder, ignore_errors=True)
                raise
    return version


def origin(folder: Path, *, root: Path) -> Path:
    """Return the folder that a registered adapter was copied from; any other folder is its own origin."""
    if folder.parent.parent.resolve() != root.resolve():
        return folder
    for event in reversed(_events(root)):
        if (event.get("name"), str(event.get("version"))) == (folder.parent.name, folder.name):
            return Path(str(event.get("from", folder)))
    return folder


def find(spec: str, *, root: Path) -> Path:
    """Return the folder that `spec` names: a path, `name` (its newest version), `name@3` or `name@sha256:…`.

    Raises:
        MissingInputError: there is no such adapter; close names are given (exit 66).
    """
    if ("/" in spec or spec.startswith(".")) or (Path(spec).is_dir() and not (root / spec).is_dir()):
        return Path(spec)
    match = _SPEC.fullmatch(spec)
    versions = _versions(root / match["name"]) if match else []
    if match is None or not versions:
        raise _unknown(spec, root)
    wanted = match["version"]
    if wanted is None:
        return versions[-1].folder
    digest = wanted.removeprefix("sha256:") if wanted.startswith("sha256:") else None
    damaged = []
    for version in versions:
        if digest is None:
            if version.number == int(wanted):
                return version.folder
            continue
        try:
            if content_digest(open_adapter(version.folder)).startswith(digest):
                return version.folder
        except LoraTuneError:
            damaged.append(version.number)
    raise MissingInputError(
        f"{match['name']} has no version {wanted}; it has {', '.join(str(version.number) for version in versions)}"
        + (f" ({', '.join(map(str, damaged))} damaged)" if damaged else ""),
        hint="`lora-tune adapters list` shows all",
    )


def list_versions(*, root: Path) -> list[tuple[Version, AdapterFiles | LoraTuneError]]:
    """Return every version, with its checked files or why it is refused."""
    found: list[tuple[Version, AdapterFiles | LoraTuneError]] = []
    for folder in _named_folders(root):
        for version in _versions(folder):
            try:
                found.append((version, open_adapter(version.folder)))
            except LoraTuneError as err:
                found.append((version, err))
    return found


def _versions(folder: Path) -> list[Version]:
    if not folder.is_dir():
        return []
    numbers = sorted(int(path.name) for path in folder.iterdir() if _NUMBER.fullmatch(path.name) and path.is_dir())
    return [Version(folder.name, number, folder / str(number)) for number in numbers]


def _named_folders(root: Path) -> list[Path]:
    """Return the folders whose names are adapters' names."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [folder for folder in folders if re.fullmatch(NAME_PATTERN, folder.name)]


def _used_numbers(name: str, root: Path) -> set[int]:
    """Return the numbers of the versions that are there, and of those that the journal says were."""
    said = {
        event["version"]
        for event in _events(root)
        if event.get("name") == name and type(event.get("version")) is int and _NUMBER.fullmatch(str(event["version"]))
    }
    return said | {version.number for version in _versions(root / name)}


def _events(root: Path) -> list[dict[str, Any]]:
    """Return what the journal says, oldest first; a line that a crash cut off is passed over."""
    journal = root / _JOURNAL
    if not journal.is_file():
        return []
    events = []
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _append(journal: Path, event: Mapping[str, Any]) -> None:
    """Write one line at the journal's end, or nothing."""
    # Unbuffered: what could not be written must not be tried again when the file is closed.
    with journal.open("ab", buffering=0) as stream:
        before = stream.tell()
        # A crash may have cut the last line off; what follows it begins on a line of its own.
        torn = before > 0 and not journal.read_bytes().endswith(b"\n")
        line = (b"\n" if torn else b"") + json.dumps(event, sort_keys=True).encode() + b"\n"
        try:
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(stream.fileno())
        except OSError:
            os.truncate(journal, before)
            raise


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise CannotWriteError(
                f"writing to the registry {root} failed: {err.strerror}; nothing was added",
                hint="free some space, then run it again",
                where=str(root),
            ) from err
        raise CannotCreateError(
            f"the registry {root} cannot be written: {err.strerror or err}",
            hint="check the folder's permissions, or give another one with --registry",
            where=str(root),
        ) from err


def _unknown(spec: str, root: Path) -> MissingInputError:
    import difflib

    names = [folder.name for folder in _named_folders(root) if _versions(folder)]
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
