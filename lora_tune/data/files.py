"""Data files: which ones a recipe's path means (a file, a folder, a hub dataset), and their digest.

Their bytes are unpacked in unpacked.py; what these say is for rows.py, json_rows.py and tables.py.
"""

import errno
import hashlib
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_tune.data.unpacked import (
    PACKINGS,
    READ_BYTES,
    SUFFIXES,
    data_suffix,
    file_mode,
    refuse_special,
    split_suffix,
    unreadable,
)
from lora_tune.errors import DataError, LoraTuneError, MissingInputError, UnreachableError

_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_VALID = {"valid", "validation", "val", "dev", "eval", "evaluation", "heldout", "held"}
_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(_VALID, "valid")}
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)((?:/[\w.=-]+)*)/?")


@dataclass(frozen=True)
class DataFiles:
    """The files that a path means, by what their names say they are for."""

    train: tuple[Path, ...]
    """Files to train on, sorted; never empty."""

    held_out: tuple[Path, ...]
    """Files to measure on: those named valid, else those named test; may be empty."""

    unused: tuple[Path, ...]
    """Test files that are not read because there are valid files too."""

    revision: str | None
    """The commit of a hub dataset; None for local files."""


def find_measured_files(path: str) -> tuple[Path, ...]:
    """Return the files to measure on that `path` means: a file, or a folder's valid files, else its test files, else all.

    Raises:
        MissingInputError: it is not there, or holds no file of rows (exit 66).
    """
    place = Path(path)
    if not stat.S_ISDIR(file_mode(place)):
        return find_files(path).train
    files = _readable(place)
    by_split = {split: tuple(file for file in files if _split(file) == split) for split in ("valid", "test", "train")}
    if not files:
        raise MissingInputError(f"{path} holds no file of rows", hint="name a file in data.eval_path", where=path)
    return by_split["valid"] or by_split["test"] or by_split["train"]


def find_files(path: str, revision: str | None = None) -> DataFiles:
    """Return the files that `path` means: a file, a folder of files, or `hub:OWNER/NAME[/folder]` at a commit.

    Raises:
        MissingInputError: it is not there, or you may not read it (exit 66).
        DataError: it holds no training file, or a hub dataset is not pinned by `revision` (exit 65).
        UnreachableError: a hub dataset is not in the cache and the hub cannot be reached (exit 69).
        CannotCreateError, CannotWriteError: the hub's cache cannot be written, or the disk is full (exit 73, 74).
    """
    if path.startswith("hub:"):
        return _hub_files(path, revision)
    if revision is not None:
        raise DataError(
            f"{path} is on this machine and has no revision; found {revision!r}",
            hint="remove data.revision, or write data.path as hub:OWNER/NAME",
            where="data.revision",
        )
    place = Path(path)
    if stat.S_ISDIR(file_mode(place)):
        return _sorted_out(place, revision=None)
    data_suffix(place)
    refuse_special(place)
    return DataFiles((place,), (), (), None)


def digest_files(paths: Sequence[Path]) -> str:
    """Return the sha256 over how many files there are and, for each, its size and its bytes; names do not count.

    Raises:
        MissingInputError: a file cannot be read (exit 66).
        DataError: a file grew or shrank while it was read (exit 65).
    """
    digest = hashlib.sha256(f"{len(paths)} files\n".encode())
    for path in paths:
        refuse_special(path)
        try:
            size = path.stat().st_size
            digest.update(f"{size} bytes\n".encode())
            with path.open("rb") as stream:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
                    size -= len(block)
        except OSError as err:
            raise unreadable(path, err) from err
        if size != 0:
            raise DataError(f"{path} changed while it was read", hint="wait until it is written", where=str(path))
    return digest.hexdigest()


def _sorted_out(folder: Path, *, revision: str | None) -> DataFiles:
    found: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in _entries(folder):
        if path.is_dir():
            split = _SPLITS.get(path.name.lower())
            found[split or "train"] += _readable(path) if split else []
        elif _is_read(path):
            found[_split(path)].append(path)
    if not any(found.values()) and (folder / "data").is_dir():
        return _sorted_out(folder / "data", revision=revision)  # where hub datasets keep their files
    if not found["train"]:
        raise _no_training_file(folder, found)
    for path in (path for paths in found.values() for path in paths):
        refuse_special(path)
    _refuse_missing_shards([path for paths in found.values() for path in paths])
    train, valid, test = (tuple(found[split]) for split in ("train", "valid", "test"))
    return DataFiles(train, valid or test, test if valid else (), revision)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as err:
        raise unreadable(folder, err) from err


def _readable(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if _is_read(path) and not path.is_dir()]


def _is_read(path: Path) -> bool:
    return split_suffix(path)[0] in SUFFIXES and path.name.lower() not in _METADATA


def _split(path: Path) -> str:
    """Return what the first word of a file's name says it is for, else the last one, else "train"."""
    words = re.split(
        r"[-_. \d]+", path.name.lower().removesuffix(split_suffix(path)[1]).removesuffix(split_suffix(path)[0])
    )
    words = [word for word in words if word not in ("", "of")]
    return next((_SPLITS[word] for word in (*words[:1], *words[-1:]) if word in _SPLITS), "train")


def _no_training_file(folder: Path, found: dict[str, list[Path]]) -> DataError:
    others = found["valid"] + found["test"]
    inner = [path.name for path in _entries(folder) if path.is_dir() and _readable(path)]
    if others:
        said, hint = (
            "only " + _listed([path.name for path in others]),
            "name one of them train, or give it as data.path",
        )
    elif inner:
        said, hint = "rows are in its folders " + _listed(inner), "name one of these folders in data.path"
    else:
        said = "it holds " + (_listed([path.name for path in _entries(folder)]) or "nothing")
        hint = f"files ending in {', '.join(SUFFIXES)} are read; convert others first"
    return DataError(f"{folder} has no file to train on: {said}", hint=hint, where=str(folder))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _refuse_missing_shards(paths: Sequence[Path]) -> None:
    """Refuse a set of which `-00000-of-00002` is there and another part is not: an interrupted copy or download."""
    there = {path.name for path in paths}
    for path in paths:
        shard = re.search(r"-(\d{3,6})-of-(\d{3,6})\.", path.name)
        if shard is None or int(shard[2]) > 100_000:
            continue
        start, end = path.name[: shard.start() + 1], path.name[shard.end(1) :]
        names = (f"{start}{number:0{len(shard[1])}}{end}" for number in range(int(shard[2])))
        missing = [name for name in names if name not in there]
        if missing:
            raise MissingInputError(
                f"{path.parent} has {path.name}, but not {_listed(missing)}",
                hint="copy or download the set again",
                where=str(path.parent),
            )


def _hub_files(path: str, revision: str | None) -> DataFiles:
    name = _HUB_NAME.fullmatch(path)
    if name is None or ".." in PurePosixPath(path).parts:
        raise DataError(
            f"{path!r} names no hub dataset", hint="write hub:OWNER/NAME or hub:OWNER/NAME/folder", where="data.path"
        )
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        found = "has no revision" if revision is None else f"has revision {revision!r}, which is no full commit"
        raise DataError(
            f"{path} {found}: a branch can change between two runs",
            hint="set data.revision to the 40 digits of the newest commit: "
            f"https://huggingface.co/datasets/{name[1]}/commits/main",
            where="data.revision",
        )
    folder = name[2].strip("/")
    snapshot = _snapshot(name[1], revision, folder)
    if not (snapshot / folder).is_dir():
        raise DataError(
            f"{path} has no {', '.join(SUFFIXES)} file{' in that folder' if folder else ' at its top or in data/'}",
            hint=f"see https://huggingface.co/datasets/{name[1]}/tree/{revision} and name the folder: "
            f"hub:{name[1]}/folder; a dataset that is a script is never run",
            where="data.path",
        )
    return _sorted_out(snapshot / folder, revision=revision)


def _snapshot(name: str, revision: str, folder: str) -> Path:
    """Return the folder of the commit with the files that the folder rules can read, downloaded when missing."""
    from huggingface_hub import constants, errors, snapshot_download

    from lora_tune.staging import translated

    top = f"{folder}/" if folder else ""
    endings = [f"*{suffix}{packing}" for suffix in SUFFIXES for packing in ("", *PACKINGS)]
    inner = [f"{top}{split}/{end}" for split in (*_SPLITS, "data") for end in endings]
    # fnmatch's * crosses folders: two calls, so that other folders, often other languages, are not fetched.
    calls = (([f"{top}{end}" for end in endings], f"{top}*/*"), (inner, f"{top}*/*/*"))
    try:
        offline = not _answers(name, revision)
        snapshots = [
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=deeper,
                local_files_only=offline,
            )
            for wanted, deeper in calls
        ]
    except (OSError, ValueError, errors.HTTPError) as err:
        if isinstance(err, OSError) and err.errno in _DISK_ERRORS:
            raise translated(err, Path(err.filename or constants.HF_HUB_CACHE)) from err
        raise _hub_refusal(name, revision, err) from err
    return Path(snapshots[-1])


def _answers(name: str, revision: str) -> bool:
    """Return False when the hub is needed and does not answer; snapshot_download alone would try for half a minute."""
    from huggingface_hub import HfApi, errors, get_cached_repo_tree

    try:
        get_cached_repo_tree(name, repo_type="dataset", revision=revision)
    except errors.CachedRepoTreeNotFoundError:
        try:
            HfApi().dataset_info(name, revision=revision, timeout=10)
        except errors.HfHubHTTPError:
            return True  # a refusal is an answer; snapshot_download may still find the files in the cache
        except (OSError, errors.HTTPError):
            return False
    return True


def _hub_refusal(name: str, revision: str, err: Exception) -> LoraTuneError:
    from huggingface_hub import errors

    status = err.response.status_code if isinstance(err, errors.HfHubHTTPError) else None
    token = "set HF_TOKEN to a token that may read it, or run `hf auth login`"  # noqa: S105 - advice
    if isinstance(err, errors.RevisionNotFoundError):
        return MissingInputError(
            f"the hub dataset {name} has no revision {revision}", hint="correct data.revision", where="data.revision"
        )
    if isinstance(err, errors.GatedRepoError):
        return MissingInputError(
            f"the hub dataset {name} is gated: its owner must grant you access", hint=token, where="data.path"
        )
    if isinstance(err, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return MissingInputError(
            f"the hub dataset {name} is not there, or is private",
            hint=f"correct data.path; or {token}",
            where="data.path",
        )
    if isinstance(err, errors.HFValidationError):
        return MissingInputError(
            f"{name!r} is no name that a hub can have: {err}", hint="correct data.path", where="data.path"
        )
    said = f" ({str(err).strip().splitlines()[0]})" if status is not None and str(err).strip() else ""
    return UnreachableError(
        f"the hub dataset {name} is not in the local cache, or not as a whole, and the hub cannot be reached{said}",
        hint="check the network (and HF_HUB_OFFLINE), or download the files and set data.path to their folder",
        where="data.path",
    )
