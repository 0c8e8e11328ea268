"""A checked adapter → a repository on the hub: its four files and nothing else, from the bytes that were checked.

Nothing is sent before every file is staged and has passed the door once more; tokens stand in no message.
"""

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_tune.adapter.card import hub_id, model_card, unverified_card
from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, open_adapter, read_weights
from lora_tune.adapter.manifest import FILE_NAME, dump_manifest
from lora_tune.adapter.registry import content_digest
from lora_tune.errors import (
    AdapterMismatchError,
    CannotWriteError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from lora_tune.model.fingerprint import file_digest
from lora_tune.staging import translated

CARD = "README.md"
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRET = re.compile(r"(hf|api)_\w+|Bearer\s+\S+")
_MAX_TEXT_BYTES = 16 * 1024 * 1024
_LOGIN = "set HF_TOKEN to a token that may write there, or run `hf auth login`"


@dataclass(frozen=True)
class PushedFile:
    """One file of the repository."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class PushReport:
    """What was sent to the hub, or would be."""

    repo: str
    branch: str
    private: bool
    """Whether only those with access see it; of a repository that was there already, as its owner set it."""
    dry_run: bool
    """True: nothing was sent, and the hub was not asked."""
    files: tuple[PushedFile, ...]
    content_digest: str
    """Of weights and config as they are sent."""
    base_model: str | None
    """The base's hub id, as the card names it; None when the hub does not know the base."""
    notes: tuple[str, ...]
    """What was changed on the way, and what the hub remarked."""
    url: str | None
    commit: str | None

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return asdict(self)


def push_adapter(
    adapter: AdapterFiles,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> PushReport:
    """Send the adapter to the hub as one commit and return what is there now.

    The repository is created if it is missing. Of its other files none is touched.

    Args:
        adapter: checked by the door; what changed since is refused.
        repo: `owner/name`.
        private: who may see it. A public repository is never written to when this is True.
        dry_run: say what would be sent; the network is not touched.
        token: None takes HF_TOKEN, or what `hf auth login` saved.
        revision: the branch to commit to, made if it is missing; None is `main`.

    Raises:
        UsageError: `repo` or `revision` is no name that a hub can have (exit 2).
        MissingInputError: no token, or one that the hub does not know (exit 66).
        UnreachableError: the hub cannot be reached or does not answer (exit 69).
        RefusedError: the hub lets this token not write there, or the repository is public (exit 77).
        AdapterMismatchError: the folder was changed after it was checked (exit 77).
        CannotWriteError: the hub holds something else than was sent (exit 74).
    """
    _check_names(repo, revision)
    with _staged(adapter, repo) as (folder, checked, notes):
        names = [name for name in (CONFIG, WEIGHTS, CARD, FILE_NAME) if (folder / name).is_file()]
        report = PushReport(
            repo, revision or "main", private, dry_run,
            tuple(PushedFile(name, (folder / name).stat().st_size, file_digest(folder / name)) for name in names),
            content_digest(checked), _hub_base(checked), tuple(notes), None, None,
        )  # fmt: skip
        return report if dry_run else _upload(report, folder, token)


def _check_names(repo: str, revision: str | None) -> None:
    # The hub's own rules (huggingface_hub 2.4, utils/_validators.py), and an owner is needed to commit.
    wrong = hub_id(repo) is None or any(bad in repo for bad in ("--", "..")) or repo.endswith((".git", "-", "."))
    if wrong:
        raise UsageError(
            f"{repo[:120]!a} is no repository's name; expected OWNER/NAME of letters, digits, `-`, `_` and `.`",
            hint="give your user or organization and a name: me/home-assistant",
        )
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision or _COMMIT.fullmatch(revision)):
        raise UsageError(
            f"{revision[:120]!a} is no branch's name", hint="give the name of a branch, or leave it out for main"
        )


@contextmanager
def _staged(adapter: AdapterFiles, repo: str) -> Iterator[tuple[Path, AdapterFiles, list[str]]]:
    """Give a folder of our own with the files as they will be sent, what the door says of it, and what was changed."""
    with tempfile.TemporaryDirectory(prefix="lora-tune-push-") as name:
        folder = Path(name)
        try:
            (folder / WEIGHTS).write_bytes(read_weights(adapter))
            for part in (CONFIG, FILE_NAME):
                if part == CONFIG or adapter.manifest is not None:
                    (folder / part).write_bytes(_read_again(adapter, part))
        except OSError as err:
            raise translated(err, folder) from err
        copy = open_adapter(folder)
        if content_digest(copy) != content_digest(adapter) or copy.manifest != adapter.manifest:
            raise _changed(adapter)
        notes = _name_base_publicly(copy)
        checked = open_adapter(folder)
        title = repo.rpartition("/")[2]
        card = (
            model_card(checked.manifest, repo=repo)
            if checked.manifest
            else unverified_card(checked, name=title, repo=repo)
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        yield folder, checked, notes


def _read_again(adapter: AdapterFiles, name: str) -> bytes:
    """Return a small file's bytes; the door looks at the copy."""
    try:
        # Never through a link, and never waiting for a pipe.
        descriptor = os.open(adapter.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(_MAX_TEXT_BYTES)
    except OSError as err:
        raise _changed(adapter) from err


def _changed(adapter: AdapterFiles) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{adapter.folder} was changed after it was checked", hint="run the command again", where=str(adapter.folder)
    )


def _hub_base(adapter: AdapterFiles) -> str | None:
    """Return the base's hub id: of a passport only when it recorded the hub's commit."""
    if adapter.manifest is not None:
        return adapter.manifest.base.name if adapter.manifest.base.revision else None
    return hub_id(adapter.base_name)


def _name_base_publicly(staged: AdapterFiles) -> list[str]:
    """Make the staged config name the base as others know it; a path of this machine is cut to its last part."""
    known = _hub_base(staged)
    public = known or _without_folders(staged.base_name)
    if public == staged.base_name:
        return []
    path = staged.folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(config | {"base_model_name_or_path": public}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if staged.manifest is not None:
        manifest = staged.manifest.model_copy(update={"config_digest": file_digest(path)})
        (staged.folder / FILE_NAME).write_text(dump_manifest(manifest), encoding="utf-8")
    return [f"{CONFIG} is sent with another name of its base than the folder has: {public!a}"]


def _without_folders(name: str) -> str:
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name[1:2] == ":"
    if not is_path:
        return name
    return PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name


def _upload(report: PushReport, folder: Path, token: str | None) -> PushReport:
    from huggingface_hub import CommitOperationAdd, HfApi

    repo, branch = report.repo, report.branch
    with _hub_errors(repo, branch, token), _quiet() as remarks:
        _check_token(token)
        api = HfApi(token=token, library_name="lora_tune")
        api.create_repo(repo, private=report.private, exist_ok=True)
        is_private = bool(api.model_info(repo).private)
        if report.private and not is_private:
            raise RefusedError(
                f"{repo} is there already and public, and the adapter was to be private; nothing was sent",
                hint="say that it may be public (--public), make the repository private, or take another name",
            )
        if branch != "main":
            api.create_branch(repo, branch=branch, exist_ok=True)
        # Open files, not paths: the client then takes its plain HTTP upload, the one that is tested, and not Xet.
        streams = {file.name: (folder / file.name).open("rb") for file in report.files}
        try:
            done = api.create_commit(
                repo,
                [CommitOperationAdd(name, stream) for name, stream in streams.items()],
                commit_message=f"Adapter {report.content_digest[:12]}, with lora_tune",
                revision=branch,
            )
        finally:
            for stream in streams.values():
                stream.close()
        _check_arrived(api, report, folder, str(done.oid))
    said = tuple(f"the hub says: {_clean(remark, token)}" for remark in remarks)
    return replace(
        report, private=is_private, notes=report.notes + said, url=f"{api.endpoint}/{repo}", commit=str(done.oid)
    )


def _check_token(token: str | None) -> None:
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise MissingInputError("there is no hub token, and writing to a hub needs one", hint=_LOGIN)


def _check_arrived(api: Any, report: PushReport, folder: Path, commit: str) -> None:
    """Compare what the hub now holds with what was sent: a `.gitignore` there leaves files out without a word."""
    names = [file.name for file in report.files]
    there = {entry.path: entry for entry in api.get_paths_info(report.repo, names, revision=commit)}
    for file in report.files:
        entry = there.get(file.name)
        large = getattr(entry, "lfs", None)
        same = entry is not None and (
            large.sha256 == file.sha256 if large else entry.blob_id == _blob_id((folder / file.name).read_bytes())
        )
        if not same:
            raise CannotWriteError(
                f"{report.repo} {'has no' if entry is None else 'holds another'} {file.name} after the upload",
                hint="see whether a .gitignore in the repository leaves it out, then push again",
            )


def _blob_id(content: bytes) -> str:
    """Return git's name of the content (`git hash-object`)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the hub client's bars and notes off the screen; give the list that its warnings go into."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, shown = logging.get_verbosity(), not are_progress_bars_disabled()
    remarks: list[str] = []
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            disable_progress_bars()
            yield remarks
        remarks += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


@contextmanager
def _hub_errors(repo: str, branch: str, token: str | None) -> Iterator[None]:
    """Translate what the hub's client raises; what a hub says is shown short, and without secrets."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as err:
        raise _answered(err, repo, branch, token) from err
    except (errors.HTTPError, errors.OIDCError, OSError, RuntimeError, ValueError, KeyError) as err:
        # An upload's error stands behind the client's own.
        cause = err.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _answered(cause, repo, branch, token) from err
        if isinstance(err, errors.OfflineModeIsEnabled):
            raise UnreachableError(
                f"{repo} could not be sent: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE, then run it again"
            ) from err
        silent = isinstance(err, errors.HTTPError | OSError)
        raise UnreachableError(
            f"{repo} could not be sent: the hub {'cannot be reached' if silent else 'answers as no hub does'} ({type(err).__name__})",
            hint="check the network and HF_ENDPOINT, then run it again",
        ) from err


def _answered(err: Any, repo: str, branch: str, token: str | None) -> LoraTuneError:
    """Return what the hub's refusal means."""
    from huggingface_hub import errors

    status = int(err.response.status_code)
    said = _clean(err.server_message or "", token)
    words = f" ({status}{': ' + said if said else ''})"
    if isinstance(err, errors.RevisionNotFoundError):
        return MissingInputError(f"{repo} has no branch {branch!a}{words}", hint="give a branch that is there")
    if status == 401:
        return MissingInputError(f"the hub does not know this token, or it has expired{words}", hint=_LOGIN)
    if status == 403:
        return RefusedError(
            f"the hub does not let this token write to {repo}{words}",
            hint=f"{_LOGIN}; or push to a repository of your own",
        )
    if status == 404:
        return MissingInputError(f"the hub has no {repo} that this token may see{words}", hint=_LOGIN)
    if status >= 500 or status in (408, 429):
        return UnreachableError(f"the hub does not answer as it should{words}", hint="wait a little, then run it again")
    return RefusedError(f"the hub refuses the adapter{words}", hint="see what it says; nothing was committed")


def _clean(said: str, token: str | None) -> str:
    """A stranger's words as one short line that no terminal obeys, and no secret in it."""
    if token:
        said = said.replace(token, "…")
    said = _SECRET.sub("…", " ".join(said.split()))
    return "".join(c if c.isprintable() else "?" for c in said)[:300]
