"""Who can reach a server: its address, its keys, and what of that is refused before anything is loaded."""

import ipaddress
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import MissingInputError, RefusedError, UsageError

API_KEY, ADMIN_KEY = "LORA_TUNE_API_KEY", "LORA_TUNE_ADMIN_KEY"
MIN_KEY_CHARS = 16
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},512}}")
_MAX_KEY_FILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Exposure:
    """Who may ask, from where, with which keys."""

    host: str
    api_keys: tuple[str, ...]
    admin_keys: tuple[str, ...]
    hosts: tuple[str, ...]
    """What a request's Host header may say."""
    origins: tuple[str, ...]
    warnings: tuple[str, ...]

    def url(self, port: int) -> str:
        """Return where the server is asked, from this machine where it listens everywhere."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{_bracketed(host)}:{port}"

    def settings(self, *, page: bool) -> Any:
        """Return it as the app takes it."""
        from lora_tune.serving.guard import ApiSettings

        return ApiSettings(
            api_keys=self.api_keys, admin_keys=self.admin_keys, allowed_hosts=self.hosts,
            allowed_origins=self.origins, page=page,
        )  # fmt: skip


def read_exposure(
    host: str,
    *,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    allow_hosts: Sequence[str],
    allow_origins: Sequence[str],
    environment: Mapping[str, str],
) -> Exposure:
    """Return who may ask; keys come from files or the environment, never from the command line, which others can read.

    Raises:
        RefusedError: other machines could ask without a key (exit 77).
        UsageError: a key is no key (exit 2).
        MissingInputError: a key file cannot be read (exit 66).
    """
    warnings: list[str] = []
    api_keys = _keys(api_key_file, API_KEY, environment, warnings)
    admin_keys = _keys(admin_key_file, ADMIN_KEY, environment, warnings)
    local = is_loopback(host)
    if not local and not api_keys:
        raise RefusedError(
            f"--host {host} lets other machines ask, and there is no API key",
            hint=f"put a key into a file that only you can read, and name it with --api-key-file (or set {API_KEY}); "
            "or leave out --host",
        )
    if not local and not allow_hosts and _is_everywhere(host):
        warnings.append(
            "other machines are refused (400) until the name they ask for is listed: --allow-host NAME-OR-ADDRESS"
        )
    own = [] if _is_everywhere(host) else [_bracketed(host)]
    hosts = tuple(dict.fromkeys(["localhost", "127.0.0.1", "[::1]", *own, *allow_hosts]))
    return Exposure(host, api_keys, admin_keys, hosts, tuple(allow_origins), tuple(warnings))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach that address; of a name, every address it has."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(str(place[4][0]).split("%")[0]).is_loopback for place in found)


def _keys(path: Path | None, variable: str, environment: Mapping[str, str], warnings: list[str]) -> tuple[str, ...]:
    """Return the keys of a file (one a line) and of an environment variable."""
    found = [] if path is None else _key_lines(path, warnings)
    if environment.get(variable):
        found.append(environment[variable].strip())
    for key in found:
        if not _KEY.fullmatch(key):
            where = variable if path is None else f"{path} or {variable}"
            raise UsageError(
                f"{where} holds a key of {len(key)} characters, or one with spaces in it",
                hint=f"a key has {MIN_KEY_CHARS} to 512 letters, digits and signs; "
                "`python3 -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one",
            )
    return tuple(dict.fromkeys(found))


def _key_lines(path: Path, warnings: list[str]) -> list[str]:
    try:
        with path.open("rb") as stream:
            mode = path.stat().st_mode
            lines = stream.read(_MAX_KEY_FILE_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is no text"
        raise MissingInputError(f"the key file {path} cannot be read: {reason}", where=str(path)) from err
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UsageError(f"the key file {path} is empty", hint="put one key a line into it")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.append(f"others on this machine can read the key file {path}: chmod 600 {path}")
    return keys


def _is_everywhere(host: str) -> bool:
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
