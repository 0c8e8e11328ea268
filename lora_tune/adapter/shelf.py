"""A registry's folder as it is: which versions are there, which one a spec names, and how one process changes it.

A version is there when its folder is, unless the journal says that it was removed. Writers take a lock and first finish
what a killed one left; readers take none and see the state before or after each change.
"""

import errno
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_tune.adapter import journal
from lora_tune.adapter.door import AdapterFiles, open_adapter
from lora_tune.adapter.journal import Key, State
from lora_tune.errors import (
    CannotCreateError,
    CannotWriteError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    UsageError,
)
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.recipe.schema import NAME_PATTERN

LOCK = ".lock"
_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]{0,62})(?:@(?P<version>[0-9]{1,9}|sha256:[0-9a-f]{8,64}))?")
_SHORT_DIGEST = re.compile(r"[a-z0-9][a-z0-9-]{0,62}@sha256:[0-9a-f]{0,7}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_MAX_LINES_SHOWN = 5
_LEFT_BEHIND = re.compile(r"\.[1-9][0-9]{0,8}-.+")
"""What staged_folder and discard call a version that is not there yet, or no longer."""


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

    @property
    def key(self) -> Key:
        """Name and number, as the journal knows it."""
        return self.name, self.number


@dataclass(frozen=True)
class Shelf:
    """What one look at a registry found."""

    root: Path
    state: State
    versions: Mapping[str, tuple[Version, ...]]
    """By name, oldest first; names without a version are left out."""

    def version(self, key: Key) -> Version:
        """Return the version of that name and number, whether it is there or not."""
        return Version(*key, self.root / key[0] / str(key[1]))

    def has(self, version: Version) -> bool:
        """Return whether that version is there."""
        return version in self.versions.get(version.name, ())


def content_digest(files: AdapterFiles) -> str:
    """Return the sha256 that names an adapter by content: of its weights and its config."""
    return canonical_digest({"config": files.config_digest, "weights": files.weights_digest})


def look(root: Path) -> Shelf:
    """Return what is in a registry at one moment, without its lock; nothing when there is none.

    Raises:
        RefusedError: its journal is not what a journal must be (exit 77).
        MissingInputError: it cannot be read, or is a file (exit 66).
    """
    while True:
        n_bytes = journal.journal_bytes(root)
        state = journal.read_state(root)
        try:
            if root.exists() and not root.is_dir():
                raise MissingInputError(
                    f"{root} is no folder, and a registry is one", hint="give another --registry", where=str(root)
                )
            found = {folder.name: _versions(folder, state) for folder in _named_folders(root)}
        except OSError as err:
            raise MissingInputError(f"the registry {root} cannot be read: {err.strerror}", where=str(root)) from err
        # Another process may have promoted and removed meanwhile: what was seen would be neither old nor new.
        if journal.journal_bytes(root) == n_bytes:
            return Shelf(root, state, {name: versions for name, versions in found.items() if versions})


def registered(folder: Path, root: Path) -> Version | None:
    """Return the version whose folder this is; None for any folder elsewhere."""
    if not _NUMBER.fullmatch(folder.name) or folder.parent.parent.resolve() != root.resolve():
        return None
    return Version(folder.parent.name, int(folder.name), folder)


def resolve(spec: str, shelf: Shelf) -> Version:
    """Return the version that `spec` names: an alias, `name` (its newest version), `name@3` or `name@sha256:…`.

    Raises:
        UsageError: it is a folder's path (exit 2).
        MissingInputError: there is no such version; close names are given (exit 66).
        RefusedError: it is both an alias and an adapter's name (exit 77).
    """
    match = _SPEC.fullmatch(spec)
    if match is None and ("/" in spec or spec.startswith(".")):
        raise UsageError(
            f"{spec!r} is a folder's path; only versions in the registry are promoted, removed and exported",
            hint="import it first: `lora-tune adapters import`; `lora-tune adapters list` shows what is there",
        )
    versions = shelf.versions.get(match["name"], ()) if match else ()
    if spec in shelf.state.aliases:
        return _pointed_to(spec, shelf)
    if _SHORT_DIGEST.fullmatch(spec):
        raise UsageError(
            f"{spec}: a version is named by 8 digits of its digest or more",
            hint="`lora-tune adapters list` shows digests to copy",
        )
    if match is None or not versions:
        raise _unknown(spec, shelf)
    wanted = match["version"]
    if wanted is None:
        return versions[-1]
    damaged = []
    for version in versions:
        if not wanted.startswith("sha256:"):
            if version.number == int(wanted):
                return version
            continue
        try:
            if content_digest(open_adapter(version.folder)).startswith(wanted.removeprefix("sha256:")):
                return version
        except LoraTuneError:
            damaged.append(version.number)
    raise MissingInputError(
        f"{match['name']} has no version {wanted}; it has {', '.join(str(version.number) for version in versions)}"
        + (f" ({', '.join(map(str, damaged))} damaged)" if damaged else ""),
        hint="`lora-tune adapters list` shows all",
    )


def next_version(name: str, shelf: Shelf) -> Version:
    """Return the version of `name` that comes next: above every number that was ever given or is in the way.

    Raises:
        CannotCreateError: the name is an alias, its folder is a link, or its numbers are used up (exit 73).
    """
    if name in shelf.state.aliases:
        raise CannotCreateError(
            f"{name} is an alias in {shelf.root}/, of {shelf.version(shelf.state.aliases[name][-1]).spec}",
            hint=f"choose another name, or remove the alias: `lora-tune adapters remove {name}`",
        )
    folder = shelf.root / name
    if folder.is_symlink():
        raise CannotCreateError(f"{folder} is a link; a registry's folders are its own", hint="choose another name")
    in_the_way = (
        [int(path.name) for path in folder.iterdir() if _NUMBER.fullmatch(path.name)] if folder.is_dir() else []
    )
    number = max(shelf.state.last_numbers.get(name, 0), *in_the_way, 0) + 1
    if number > journal.MAX_NUMBER:
        raise CannotCreateError(f"{name} has used up its numbers", hint="choose another name")
    return shelf.version((name, number))


def refuse_taken(name: str, shelf: Shelf, *, source: Path) -> None:
    """Refuse a name that an adapter here has: `source` only says that it is called so, and may be a stranger's.

    Raises:
        CannotCreateError: there are versions of that name (exit 73).
    """
    if name in shelf.versions:
        raise CannotCreateError(
            f"{source} is called {name}, and {shelf.root}/ has an adapter of that name already",
            hint=f"give it a name of its own with --name; `--name {name}` makes it the next version of the one that is there",
            where=str(source),
        )


def unread_lines(shelf: Shelf) -> str:
    """Return which lines of the journal were passed over, as a part of a sentence; empty when none was."""
    lines = shelf.state.unread
    if not lines:
        return ""
    shown = ", ".join(map(str, lines[:_MAX_LINES_SHOWN])) + (", …" if len(lines) > _MAX_LINES_SHOWN else "")
    many = len(lines) > 1
    return (
        f"{'lines' if many else 'line'} {shown} of {shelf.root / journal.FILE_NAME} "
        f"{'are' if many else 'is'} damaged, or of a newer lora_tune"
    )


def doubt(alias: str, shelf: Shelf) -> str:
    """Return why an alias may have been moved by a line that cannot be read; empty when nothing speaks for it."""
    if alias not in shelf.state.doubtful:
        return ""
    version = shelf.version(shelf.state.aliases[alias][-1])
    return (
        f"{alias} is taken to point to {version.spec}, and may not: {unread_lines(shelf)}; "
        f"`lora-tune adapters promote NAME@VERSION {alias}` settles it"
    )


@contextmanager
def writing(root: Path, *, create: bool = False) -> Iterator[Shelf]:
    """Hold a registry's lock and give what is in it, once what a killed writer left is finished.

    Raises:
        MissingInputError: there is no registry, and `create` is false (exit 66).
        CannotCreateError: it cannot be written (exit 73).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    if not create and not root.is_dir():
        raise MissingInputError(
            f"there is no registry at {root}",
            hint="train or import an adapter first, or give --registry",
            where=str(root),
        )
    with _translated(root):
        root.mkdir(parents=True, exist_ok=True)
        journal.check_appendable(root)
        with FileLock(root / LOCK):
            _settle(look(root))
            yield look(root)


def record(root: Path, event: str, version: Version, **facts: object) -> None:
    """Append what happened to a version to the journal.

    Raises:
        OSError: it could not be written; the journal is as it was.
    """
    at = {"event": event, "name": version.name, "version": version.number, "at": time.time()}
    journal.append(root, at | facts)


def discard(version: Version) -> None:
    """Take a version's folder away in one step, then delete it; what cannot be is left to the next writer."""
    with suppress(OSError):
        away = Path(tempfile.mkdtemp(prefix=f".{version.number}-", dir=version.folder.parent))
        version.folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)
        version.folder.parent.rmdir()  # only when it was the last


def _settle(shelf: Shelf) -> None:
    """Finish what killed writers left: half-made folders go, removed ones too, and whole ones are in the journal."""
    for folder in _named_folders(shelf.root):
        for path in folder.iterdir():
            if _LEFT_BEHIND.fullmatch(path.name) and not path.is_symlink() and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        for version in _versions(folder, State()):
            if version.key in shelf.state.removed:
                discard(version)
            elif version.key not in shelf.state.arrivals:
                record(shelf.root, "added", version, at=version.folder.stat().st_mtime, found=True)


def _named_folders(root: Path) -> list[Path]:
    """Return the folders whose names are adapters' names; links are none of ours."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [
        path for path in folders if re.fullmatch(NAME_PATTERN, path.name) and path.is_dir() and not path.is_symlink()
    ]


def _versions(folder: Path, state: State) -> tuple[Version, ...]:
    try:
        paths = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except FileNotFoundError:  # the last version was removed meanwhile
        return ()
    numbers = sorted(int(path.name) for path in paths if _NUMBER.fullmatch(path.name))
    return tuple(
        Version(folder.name, number, folder / str(number))
        for number in numbers
        if (folder.name, number) not in state.removed
    )


def _pointed_to(alias: str, shelf: Shelf) -> Version:
    version = shelf.version(shelf.state.aliases[alias][-1])
    if alias in shelf.versions:
        raise RefusedError(
            f"{alias} is an adapter's name and an alias of {version.spec}",
            hint=f"say which version: {alias}@{shelf.versions[alias][-1].number} or {version.spec}",
        )
    if not shelf.has(version):
        raise MissingInputError(
            f"{alias} points to {version.spec}, and {version.folder} is not there",
            hint=f"`lora-tune adapters promote NAME@VERSION {alias}` points it elsewhere",
            where=str(version.folder),
        )
    return version


def _unknown(spec: str, shelf: Shelf) -> MissingInputError:
    import difflib

    names = sorted({*shelf.versions, *shelf.state.aliases})
    close = difflib.get_close_matches(spec[:200].partition("@")[0], names, n=3)
    listed = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(names[:10])}" if names else ""
    lost = unread_lines(shelf)
    return MissingInputError(
        f"no adapter {spec[:200]!r} in {shelf.root}/{listed}" + (f" ({lost}, and may have named it)" if lost else ""),
        hint="`lora-tune adapters list` shows the registry; a folder works too, as ./path",
    )


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise CannotWriteError(
                f"writing to the registry {root} failed: {err.strerror}; nothing was changed",
                hint="free some space, then run it again",
                where=str(root),
            ) from err
        raise CannotCreateError(
            f"the registry {root} cannot be written: {err.strerror or err}",
            hint="check the folder's permissions, or give another one with --registry",
            where=str(root),
        ) from err
