"""A version as one file: exported to a tar with digests, and imported from such a tar or from any adapter's folder.

A tar is read by its plain headers only: an allowed name, a regular file, a size under its cap; nothing is extracted by
its own word. What arrives goes through the door like every adapter.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.adapter.door import CONFIG, MAX_WEIGHTS_BYTES, WEIGHTS, AdapterFiles, open_adapter
from lora_tune.adapter.manifest import FILE_NAME, first_problem
from lora_tune.adapter.registry import find_version, register
from lora_tune.adapter.shelf import Version, content_digest, look, refuse_taken, registered
from lora_tune.errors import AdapterError, AdapterMismatchError, CannotCreateError, MissingInputError, UsageError
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.staging import translated

DIGESTS = "digests.json"
CARD = "README.md"
MAX_BYTES = {CARD: 1024**2, CONFIG: 64 * 1024, WEIGHTS: MAX_WEIGHTS_BYTES, DIGESTS: 64 * 1024, FILE_NAME: 8 * 1024**2}
"""The files that travel, and how long each may be."""
_BLOCK_BYTES = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1024**2

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Digests(BaseModel):
    """What `digests.json` says of the files beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1)]
    content: _Digest
    files: dict[str, _Digest]


@dataclass(frozen=True)
class Exported:
    """A version that was written to a tar."""

    path: Path
    version: Version
    digest: str
    """Content digest of the adapter."""
    sha256: str
    """Of the tar; the same whenever and wherever the same version is exported."""
    n_bytes: int
    """Of the tar."""

    def as_dict(self) -> dict[str, str | int]:
        """As `--json` prints it."""
        return asdict(self) | {"path": str(self.path), "version": self.version.number, "adapter": self.version.spec}


@dataclass(frozen=True)
class _Member:
    """Where a file's bytes are in a tar."""

    start: int
    n_bytes: int


def export_version(spec: str, out: Path, *, root: Path) -> Exported:
    """Write a version as a tar: PEFT's files, the passport and `digests.json`, byte for byte the same every time.

    Raises:
        UsageError: `spec` is a folder's path (exit 2).
        MissingInputError: there is no such version (exit 66).
        CannotCreateError: `out` is there already and is never overwritten, or cannot be made (exit 73).
        CannotWriteError: the disk is full or failing; nothing is left (exit 74).
        AdapterError: the version is damaged (exit 77).
    """
    version = find_version(spec, root=root)
    if out.exists() or out.is_symlink():
        raise CannotCreateError(f"{out} exists already and is never overwritten", hint="give another name")
    files = open_adapter(version.folder)
    texts = {name: _read_text_file(version.folder / name) for name in (CARD, CONFIG, FILE_NAME)}
    contents = {name: content for name, content in texts.items() if content is not None}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if digests.get(CONFIG) != files.config_digest:
        raise _changed(version.folder / CONFIG)
    said = _Digests(name=version.name, version=version.number, content=content_digest(files),
                    files={**digests, WEIGHTS: files.weights_digest})  # fmt: skip
    contents[DIGESTS] = (json.dumps(said.model_dump(), sort_keys=True, indent=1) + "\n").encode()
    with _staged_file(out) as stream:
        _write_tar(stream, contents, files)
        stream.seek(0)
        sha256, n_bytes = hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
    return Exported(out, version, said.content, sha256, n_bytes)


def import_adapter(path: Path, name: str | None = None, *, root: Path) -> Version:
    """Copy a folder, or a tar made by `export_version`, into the registry as the next version of `name`.

    Without a name it gets the one that it had: in this registry, of the tar, of its passport, or of the folder. From
    elsewhere it does so only when nothing here has that name: whoever names it bare would get the newcomer.
    An adapter made elsewhere has no passport and is let in after the same checks, unverified.

    Raises:
        UsageError: the name is none, or none was given and it has none (exit 2).
        MissingInputError: there is nothing at `path`, or no adapter in it (exit 66).
        CannotCreateError: the registry cannot be written, the name is an alias, or none was given and an adapter here
            has the one that it had (exit 73).
        CannotWriteError: the disk is full or failing; nothing is left of the new version (exit 74).
        AdapterError: it is not an adapter, not such a tar, or differs from its digests (exit 77).
    """
    try:
        is_folder = path.is_dir()
        stream = path.open("rb") if path.is_file() else None
    except OSError as err:
        raise MissingInputError(f"{path} cannot be read: {err.strerror}", where=str(path)) from err
    if is_folder:
        return _import_folder(path, name, root)
    if stream is None:
        raise MissingInputError(
            f"no adapter at {path}", hint="give an adapter's folder, or a tar from another registry", where=str(path)
        )
    with stream:
        return _import_tar(stream, path, name, root)


def own_name(files: AdapterFiles, *, root: Path) -> str:
    """Return the name of what is made of an adapter when none is given: its own in the registry, or what it says.

    Raises:
        UsageError: it does not say a name (exit 2).
        CannotCreateError: it is no version of this registry, and another adapter here has its name (exit 73).
    """
    version = registered(files.folder, root)
    name = version.name if version else _said_name(files)
    if version is None:
        refuse_taken(name, look(root), source=files.folder)
    return name


def _said_name(files: AdapterFiles) -> str:
    """Return what an adapter's passport calls it; without one, its folder's name.

    Raises:
        UsageError: that is no name (exit 2).
    """
    name = files.manifest.name if files.manifest else files.folder.resolve().name
    # A registry calls its folders 1, 2, 3.
    if not re.fullmatch(NAME_PATTERN, name) or name.isdecimal():
        raise UsageError(f"{files.folder} does not say what the adapter is called", hint="give it a name with --name")
    return name


def _import_folder(folder: Path, name: str | None, root: Path) -> Version:
    files = open_adapter(folder)

    def fill(stage: Path) -> None:
        for part, cap in sorted(MAX_BYTES.items()):
            source = folder / part
            if part == DIGESTS or source.is_symlink() or not source.is_file():
                continue
            if source.stat().st_size > cap:
                raise AdapterError(f"{source} has more than {cap:,} bytes", where=str(source))
            shutil.copyfile(source, stage / part)

    own = registered(folder, root)
    chosen = name if name is not None else own.name if own else _said_name(files)
    only_new = name is None and own is None
    return register(fill, chosen, root=root, copied_from=folder, how="imported", only_new=only_new)


def _import_tar(stream: BinaryIO, path: Path, name: str | None, root: Path) -> Version:
    try:
        members = _members(stream, path, root)
    except (tarfile.TarError, ValueError) as err:
        raise _no_tar(path, str(err)[:200]) from err
    said = _read_digests(stream, members, path)

    def fill(stage: Path) -> None:
        for part, digest in sorted(said.files.items()):
            if _copy_member(stream, members[part], stage / part) != digest:
                raise AdapterMismatchError(
                    f"{path}: {part} differs from its digest in {DIGESTS}",
                    hint="the file was damaged or changed on its way; fetch it again",
                    where=str(path),
                )

    chosen = name if name is not None else said.name
    return register(fill, chosen, root=root, copied_from=path, how="imported", only_new=name is None)


def _members(stream: BinaryIO, path: Path, root: Path) -> dict[str, _Member]:
    """Return the files in a tar by name.

    Each header is parsed by itself, so none of the extensions that hold names or sizes of their own are ever followed.
    """
    size = os.fstat(stream.fileno()).st_size
    found: dict[str, _Member] = {}
    position = 0
    while (block := _read_at(stream, position, _BLOCK_BYTES)).strip(b"\0"):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        # Not in the first releases of Python 3.11; what follows is narrower.
        if (check := getattr(tarfile, "data_filter", None)) is not None:
            check(info, str(root))
        start = position + _BLOCK_BYTES
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.name not in MAX_BYTES or info.linkname:
            raise _no_tar(path, f"it holds {info.name[:80]!a}, which is none of the files of an adapter")
        if info.name in found:
            raise _no_tar(path, f"it holds {info.name} twice")
        if not 0 <= info.size <= MAX_BYTES[info.name]:
            raise _no_tar(path, f"{info.name} has {info.size} bytes; at most {MAX_BYTES[info.name]:,} are read")
        position = start + -(-info.size // _BLOCK_BYTES) * _BLOCK_BYTES
        if position > size:
            raise _no_tar(path, f"it ends within {info.name}")
        found[info.name] = _Member(start, info.size)
    if size - position > tarfile.RECORDSIZE + _BLOCK_BYTES or _read_at(stream, position, size - position).strip(b"\0"):
        raise _no_tar(path, "something follows its end")
    return found


def _read_at(stream: BinaryIO, position: int, n_bytes: int) -> bytes:
    stream.seek(position)
    return stream.read(n_bytes)


def _read_digests(stream: BinaryIO, members: Mapping[str, _Member], path: Path) -> _Digests:
    """Return what `digests.json` says, once it speaks of exactly the files that are there."""
    if DIGESTS not in members:
        raise _no_tar(path, f"it holds no {DIGESTS}")
    try:
        said = _Digests.model_validate_json(_read_at(stream, members[DIGESTS].start, members[DIGESTS].n_bytes))
    except ValidationError as err:
        raise _no_tar(path, f"{DIGESTS}: {first_problem(err)}") from err
    if set(said.files) != set(members) - {DIGESTS} or not {CONFIG, WEIGHTS} <= set(said.files):
        raise _no_tar(path, f"{DIGESTS} does not name exactly the files that are in it")
    if said.content != canonical_digest({"config": said.files[CONFIG], "weights": said.files[WEIGHTS]}):
        raise _no_tar(path, f"the content digest in {DIGESTS} is not that of its files")
    return said


def _no_tar(path: Path, why: str) -> AdapterError:
    return AdapterError(
        f"{path} is not an adapter's tar: {why}",
        hint="tars are made by `lora-tune adapters export`; any other adapter is imported as a folder",
        where=str(path),
    )


def _copy_member(stream: BinaryIO, member: _Member, target: Path) -> str:
    """Copy one file out of a tar and return the sha256 of what was written."""
    digest = hashlib.sha256()
    left = member.n_bytes
    stream.seek(member.start)
    with target.open("xb") as copy:
        while chunk := stream.read(min(_CHUNK_BYTES, left)):
            copy.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _write_tar(stream: BinaryIO, contents: Mapping[str, bytes], files: AdapterFiles) -> None:
    """Write the files in order of their names, all with the same owner, mode and time."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted([*contents, WEIGHTS]):
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            if name != WEIGHTS:
                info.size = len(contents[name])
                tar.addfile(info, io.BytesIO(contents[name]))
                continue
            info.size = files.weights_bytes
            with _open_regular(files.folder / name) as weights:
                hashed = _Hashed(weights)
                if os.fstat(weights.fileno()).st_size == info.size:
                    tar.addfile(info, hashed)
            if hashed.digest.hexdigest() != files.weights_digest:
                raise _changed(files.folder / name)


class _Hashed:
    """A stream that notes the sha256 of what is read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, n_bytes: int = -1) -> bytes:
        """Return the next bytes."""
        content = self._stream.read(n_bytes)
        self.digest.update(content)
        return content


def _changed(path: Path) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{path} was changed after it was checked", hint="run the command again", where=str(path)
    )


def _read_text_file(path: Path) -> bytes | None:
    """Return a small file's bytes; None when there is none."""
    try:
        with _open_regular(path) as stream:
            content = stream.read(MAX_BYTES[path.name] + 1)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise MissingInputError(f"{path} cannot be read: {err.strerror}", where=str(path)) from err
    if len(content) > MAX_BYTES[path.name]:
        raise AdapterError(f"{path} has more than {MAX_BYTES[path.name]:,} bytes", where=str(path))
    return content


def _open_regular(path: Path) -> BinaryIO:
    """Return the file itself opened for reading: never through a link, and never a device or a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path} is not a regular file", where=str(path))
    return os.fdopen(descriptor, "rb")


@contextmanager
def _staged_file(final: Path) -> Iterator[io.BufferedRandom]:
    """Give a file that becomes `final` when the block ends, and vanishes when the block fails.

    Raises:
        CannotCreateError: `final` is there, or cannot be made (exit 73).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=".export-", dir=final.parent)
    except OSError as err:
        raise translated(err, final) from err
    stage = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        stage.chmod(0o644)
        _put_in_place(stage, final)
    except OSError as err:
        raise translated(err, final) from err
    finally:
        stage.unlink(missing_ok=True)


def _put_in_place(stage: Path, final: Path) -> None:
    try:
        os.link(stage, final)  # unlike a rename, it never replaces what came there meanwhile
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        stage.rename(final)
