"""The registry's deeds: versions are added whole and never changed; aliases name one, move forward and back.

`adapters/<name>/<version>/` holds a version's files, `journal.jsonl` what happened, in the order in which it did.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_tune.adapter import journal
from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, open_adapter
from lora_tune.adapter.journal import Key, State
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.shelf import (
    LOCK,
    Version,
    content_digest,
    discard,
    doubt,
    look,
    next_version,
    record,
    refuse_taken,
    registered,
    resolve,
    unread_lines,
    writing,
)  # fmt: skip
from lora_tune.errors import (
    AdapterError,
    AdapterMismatchError,
    CannotCreateError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    UsageError,
)  # fmt: skip
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.staging import staged_folder

__all__ = [
    "DEFAULT_ALIAS", "Listed", "Pointed", "Version", "add", "aliases", "content_digest", "ensure_writable", "find",
    "find_version", "is_folder", "journal_damage", "list_versions", "listing", "open_found", "origin", "promote", "register",
    "registry_root", "remove", "rollback", "why_doubtful",
]  # fmt: skip

DEFAULT_ALIAS = "prod"
KEPT_FILES = (CONFIG, WEIGHTS, FILE_NAME, "README.md")
"""What a version is copied from: nothing else of a folder is an adapter's."""
_NAME_HINT = "lower-case letters, digits and hyphens, at most 63"


@dataclass(frozen=True)
class Listed:
    """A version as `adapters list` shows it."""

    version: Version
    files_or_error: AdapterFiles | LoraTuneError
    """Its checked files, or why it is refused."""
    aliases: tuple[str, ...]
    """Those that point to it, sorted."""
    added_at: float | None
    """Seconds since 1970; None when the journal does not say."""
    n_bytes: int
    """Of all its files."""


@dataclass(frozen=True)
class Pointed:
    """An alias after it was promoted or rolled back."""

    alias: str
    version: Version
    previous: Version | None
    """Where it pointed before; None for a new alias."""

    def as_dict(self) -> dict[str, str | None]:
        """As `--json` prints it."""
        return {"alias": self.alias, "adapter": self.version.spec, "folder": str(self.version.folder),
                "previous": self.previous.spec if self.previous else None}  # fmt: skip


def registry_root() -> Path:
    """Return where adapters are kept: LORA_TUNE_ADAPTERS, or `adapters/` in the working folder."""
    return Path(os.environ.get("LORA_TUNE_ADAPTERS") or "adapters")


def ensure_writable(root: Path, *, name: str | None = None) -> None:
    """Check that a version (of `name`) can be added later, so that no training is lost for a folder's permissions.

    Raises:
        UsageError: the name is none (exit 2).
        CannotCreateError: nothing can be written there, or the name is an alias (exit 73).
    """
    if name is not None:
        _check_name(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".probe-", dir=root) as probe:
            probe.write(b"x")
        if (root / LOCK).exists():
            (root / LOCK).open("ab").close()
        journal.check_appendable(root)
    except OSError as err:
        raise CannotCreateError(
            f"the registry {root} cannot be written: {err.strerror or err}",
            hint="check the folder's permissions and free space, or give another one with --registry",
            where=str(root),
        ) from err
    if name is not None:
        next_version(name, look(root))


def add(folder: Path, name: str, *, root: Path) -> Version:
    """Copy a checked adapter into the registry as the next version of `name`.

    A number is never given twice, not even when its folder was removed by hand.

    Raises:
        MissingInputError: there is no such folder (exit 66).
        AdapterError: the folder is no adapter (exit 77).
        CannotCreateError: the registry cannot be written, or the name is an alias (exit 73).
        CannotWriteError: the disk is full or failing; nothing is left of the new version (exit 74).
    """
    _check_name(name)
    if not folder.is_dir():
        raise MissingInputError(f"no adapter folder at {folder}", hint="train one first", where=str(folder))

    def fill(stage: Path) -> None:
        for path in (folder / kept for kept in KEPT_FILES):
            if path.is_file() and not path.is_symlink():
                shutil.copyfile(path, stage / path.name)

    return register(fill, name, root=root, copied_from=folder)


def register(
    fill: Callable[[Path], None],
    name: str,
    *,
    root: Path,
    copied_from: Path,
    how: Literal["added", "imported"] = "added",
    only_new: bool = False,
) -> Version:
    """Make the next version of `name` from what `fill` writes into the empty folder that it is given.

    The door checks it before it appears. Raises as `add`, what `fill` raises, and with `only_new` a CannotCreateError
    when there is an adapter of that name (exit 73).
    """
    _check_name(name)
    with writing(root, create=True) as shelf:
        if only_new:
            refuse_taken(name, shelf, source=copied_from)
        version = next_version(name, shelf)
        with staged_folder(version.folder) as stage:
            fill(stage)
            try:
                digest = content_digest(open_adapter(stage))
            except LoraTuneError as err:
                # The stage is gone when this is read; what is wrong with it was wrong where it came from.
                message, where = (text.replace(str(stage), str(copied_from)) for text in (err.message, err.where))
                raise type(err)(message, hint=err.hint, where=where) from err
        try:
            record(root, how, version, digest=digest, **{"from": str(copied_from.resolve())})
        except OSError:
            discard(version)
            raise
    return version


def promote(spec: str, alias: str = DEFAULT_ALIAS, *, root: Path) -> Pointed:
    """Point `alias` to a version; from then on it names that version wherever an adapter is named.

    Raises:
        UsageError: `alias` is no name or is an adapter's, or `spec` is a folder's path (exit 2).
        MissingInputError: there is no such version (exit 66).
        AdapterError: the version is damaged (exit 77).
    """
    _check_name(alias)
    with writing(root) as shelf:
        version = resolve(spec, shelf)
        if alias in shelf.versions:
            raise UsageError(f"{alias} is an adapter's name and cannot be an alias", hint="choose another alias")
        digest = content_digest(_undamaged(version, shelf.state))
        history = shelf.state.aliases.get(alias)
        previous = shelf.version(history[-1]) if history else None
        # Said again, it settles what an unreadable line may have done to the alias.
        if previous != version or alias in shelf.state.doubtful:
            was = previous.spec if previous else None
            record(root, "promoted", version, alias=alias, digest=digest, previous=was)
    return Pointed(alias, version, previous)


def rollback(alias: str = DEFAULT_ALIAS, *, root: Path) -> Pointed:
    """Point `alias` to what it pointed to before its last promotion; again and again, down its history.

    Raises:
        MissingInputError: there is no such alias, nothing earlier, or the earlier version was removed (exit 66).
        AdapterError: the earlier version is damaged (exit 77).
    """
    with writing(root) as shelf:
        history = shelf.state.aliases.get(alias)
        if history is None:
            known = ", ".join(sorted(shelf.state.aliases)) or "none"
            raise MissingInputError(
                f"no alias {alias[:200]!r} in {root}/; known: {known}", hint="`lora-tune adapters promote` makes one"
            )
        previous, elsewhere = shelf.version(history[-1]), f"`lora-tune adapters promote NAME@VERSION {alias}` moves it"
        if len(history) == 1:
            raise MissingInputError(
                f"{alias} points to {previous.spec}, and nothing earlier is left to go back to", hint=elsewhere
            )
        version = shelf.version(history[-2])
        if not shelf.has(version):
            raise MissingInputError(
                f"{version.spec}, where {alias} pointed before, was removed; it stays at {previous.spec}",
                hint=elsewhere,
            )
        digest = content_digest(_undamaged(version, shelf.state))
        record(root, "rolled_back", version, alias=alias, digest=digest, previous=previous.spec)
    return Pointed(alias, version, previous)


def remove(spec: str, *, root: Path) -> str:
    """Remove one version, or an alias (never what it points to), and return `name@number` or the alias.

    Raises:
        UsageError: a bare name that has several versions, or a folder's path (exit 2).
        MissingInputError: there is no such version (exit 66).
        RefusedError: an alias points to it (exit 77).
    """
    with writing(root) as shelf:
        if spec in shelf.state.aliases and spec not in shelf.versions:
            journal.append(root, {"event": "removed", "alias": spec, "at": time.time()})
            return spec
        version = resolve(spec, shelf)
        if "@" not in spec and len(shelf.versions[version.name]) > 1:
            numbers = ", ".join(str(other.number) for other in shelf.versions[version.name])
            raise UsageError(f"{spec} has versions {numbers}", hint=f"say which one, as {version.spec}")
        pointing = [alias for alias, history in sorted(shelf.state.aliases.items()) if history[-1] == version.key]
        if pointing:
            raise RefusedError(
                f"{version.spec} is what {' and '.join(pointing)} points to",
                hint=f"`lora-tune adapters promote` another version as {pointing[0]}, or give the alias up: "
                f"`lora-tune adapters remove {pointing[0]}`",
            )
        record(root, "removed", version)
        # From here on it is gone for every reader.
        discard(version)
    return version.spec


def aliases(root: Path) -> dict[str, Version]:
    """Return the version that each alias points to, by alias; its folder may have been removed by hand."""
    shelf = look(root)
    return {alias: shelf.version(history[-1]) for alias, history in sorted(shelf.state.aliases.items())}


def why_doubtful(alias: str, *, root: Path) -> str:
    """Return why an alias may point elsewhere than is believed, in words for the user; empty when nothing speaks for it."""
    # Any other word names no alias, and costs no look at the registry.
    return doubt(alias, look(root)) if re.fullmatch(NAME_PATTERN, alias) else ""


def journal_damage(root: Path) -> str:
    """Return which lines of the journal are passed over, in words for the user; empty when none is."""
    shelf = look(root)
    lost = unread_lines(shelf)
    moved = ", ".join(sorted(shelf.state.doubtful))
    return lost and lost + (f"; promote again what it may have moved: {moved}" if moved else "")


def origin(folder: Path, *, root: Path) -> Path:
    """Return the folder that a registered adapter was copied from; any other folder is its own origin."""
    version = registered(folder, root)
    arrival = journal.read_state(root).arrivals.get(version.key) if version else None
    return Path(arrival.origin) if arrival and arrival.origin else folder


def find(spec: str, *, root: Path) -> Path:
    """Return the folder that `spec` names: a path, an alias, `name` (its newest version), `name@3` or `name@sha256:…`.

    Raises:
        MissingInputError: there is no such adapter; close names are given (exit 66).
        RefusedError: it is both an alias and an adapter's name (exit 77).
    """
    if "/" in spec or spec.startswith("."):
        return Path(spec)
    shelf = look(root)
    if spec not in shelf.versions and spec not in shelf.state.aliases and is_folder(spec):
        return Path(spec)
    return resolve(spec, shelf).folder


def find_version(spec: str, *, root: Path) -> Version:
    """Return the version in the registry that `spec` names; a folder's path names none.

    Raises:
        UsageError: it is a folder's path (exit 2).
        MissingInputError: there is no such version; close names are given (exit 66).
        RefusedError: it is both an alias and an adapter's name (exit 77).
    """
    return resolve(spec, look(root))


def open_found(spec: str, *, root: Path) -> AdapterFiles:
    """Return the checked files of what `spec` names; a version must hold what it held when it came.

    Raises:
        MissingInputError: there is no such adapter (exit 66).
        AdapterError: it is not what an adapter must be, or was changed since it came (exit 77).
    """
    files = open_adapter(find(spec, root=root))
    version = registered(files.folder, root)
    return _unchanged(files, version, journal.read_state(root)) if version else files


def listing(root: Path) -> list[Listed]:
    """Return every version as `adapters list` shows it, by name and number."""
    shelf = look(root)
    pointing: dict[Key, list[str]] = {}
    for alias, history in sorted(shelf.state.aliases.items()):
        pointing.setdefault(history[-1], []).append(alias)
    found = []
    for version in (version for versions in shelf.versions.values() for version in versions):
        arrival = shelf.state.arrivals.get(version.key)
        listed = Listed(version, _opened(version, shelf.state), tuple(pointing.get(version.key, ())),
                        arrival.at if arrival else None, _folder_bytes(version.folder))  # fmt: skip
        # Another process may have removed it while it was read.
        if version.folder.is_dir():
            found.append(listed)
    return found


def list_versions(*, root: Path) -> list[tuple[Version, AdapterFiles | LoraTuneError]]:
    """Return every version, with its checked files or why it is refused."""
    return [(listed.version, listed.files_or_error) for listed in listing(root)]


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"{name[:200]!r} is no name for an adapter or alias", hint=_NAME_HINT)


def _opened(version: Version, state: State) -> AdapterFiles | LoraTuneError:
    try:
        return _unchanged(open_adapter(version.folder), version, state)
    except LoraTuneError as err:
        return err


def _undamaged(version: Version, state: State) -> AdapterFiles:
    found = _opened(version, state)
    if isinstance(found, LoraTuneError):
        raise AdapterError(
            f"{version.spec} is damaged: {found.message}",
            hint=f"`lora-tune adapters remove {version.spec}`, then train or import it again",
            where=str(version.folder),
        ) from found
    return found


def _unchanged(files: AdapterFiles, version: Version, state: State) -> AdapterFiles:
    """Return the files when they are what the journal says came: a passport may be missing, and cannot say."""
    arrival = state.arrivals.get(version.key)
    if arrival and arrival.digest and arrival.digest != content_digest(files):
        raise AdapterMismatchError(
            f"{version.folder} holds sha256:{content_digest(files)[:12]}…; when it was added, "
            f"it held sha256:{arrival.digest[:12]}…",
            hint="its files were changed; train or import it again",
            where=str(version.folder),
        )
    return files


def _folder_bytes(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.lstat().st_size for path in folder.iterdir())
    return 0


def is_folder(spec: str) -> bool:
    """Return whether these words, all of them, are a folder's path."""
    try:
        return bool(spec) and Path(spec).is_dir()
    except (OSError, ValueError):
        return False
