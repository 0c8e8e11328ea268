"""Writers of a registry that die: at a chosen step of their own, or at a system call that strace chooses.

Run as a process of its own that forks one writer per point, since only then can each die and cost milliseconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_tune.adapter import registry

DEEDS: dict[str, Callable[[Path, Path], object]] = {
    "add": lambda root, source: registry.add(source, "home", root=root),
    "promote": lambda root, _: registry.promote("home@3", root=root),
    "roll back": lambda root, _: registry.rollback("prod", root=root),
    "remove": lambda root, _: registry.remove("home@3", root=root),
    "remove the last": lambda root, _: registry.remove("other@1", root=root),
    "give an alias up": lambda root, _: registry.remove("prod", root=root),
    "finish what another left": lambda root, _: registry.promote("left@2", root=root),
}
SYSTEM_CALLS = (
    "openat", "write", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "unlink",
    "unlinkat", "chmod", "fchmod", "fchmodat", "ftruncate", "flock", "sendfile", "copy_file_range", "link", "linkat", "close",
)  # fmt: skip
"""Those that change a file or its place, and those around them."""
_CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.link",
    "os.utime",
    "fcntl.flock",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def die_at(step: int) -> None:
    """Make this process kill itself at its Nth step that changes something on disk.

    Steps are: before anything is opened for writing, renamed, made, deleted or locked; before, within and after each
    write to a descriptor; before and after each sync.
    """
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
            count()

    write, fsync = os.write, os.fsync

    def torn_write(descriptor: int, content: bytes) -> int:
        count()
        if left[0] == 1:
            write(descriptor, content[: len(content) // 2])
        count()
        written = write(descriptor, content)
        count()
        return written

    def watched_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)
        count()

    os.write, os.fsync = torn_write, watched_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def killed_by_step(template: Path, work: Path, source: Path, deed: str) -> Iterator[Path]:
    """Give one registry for each step at which a writer died; the last writer, who did not, must have succeeded."""
    for step in range(1, 10_000):
        root = _copied(template, work / f"{step}")
        pid = os.fork()
        if pid == 0:
            die_at(step)
            _do(deed, root, source)
        _, status = os.waitpid(pid, 0)
        if not _was_killed(status):
            shutil.rmtree(root)
            return
        yield root


def killed_by_strace(template: Path, work: Path, source: Path, deed: str) -> Iterator[Path]:
    """Give one registry for each system call (of SYSTEM_CALLS, the Nth of its kind) at which a writer was killed."""
    for call in SYSTEM_CALLS:
        for number in range(1, 10_000):
            root = _copied(template, work / f"{call}-{number}")
            pid = os.fork()
            if pid == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
                _do(deed, root, source)
            os.waitpid(pid, os.WUNTRACED)
            command = [
                "strace",
                "-p",
                str(pid),
                "-e",
                f"trace={call}",
                "-e",
                f"inject={call}:signal=KILL:when={number}",
            ]
            tracer = subprocess.Popen([*command, "-o", "/dev/null"], stderr=subprocess.PIPE, text=True)
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            if "attached" not in said:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise OSError(f"strace: {said}")
            os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, 0)
            tracer.communicate()
            if not _was_killed(status):
                shutil.rmtree(root)
                break
            yield root


def churn(root: Path, source: Path, seconds: float) -> None:
    """Add, promote and remove for so long, so that the newest version is always promoted and the one before it goes."""
    last = registry.promote(registry.add(source, "home", root=root).spec, root=root).version
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        newest = registry.add(source, "home", root=root)
        registry.promote(newest.spec, root=root)
        registry.remove(last.spec, root=root)
        last = newest


def _copied(template: Path, root: Path) -> Path:
    shutil.copytree(template, root)
    return root


def _do(deed: str, root: Path, source: Path) -> None:
    done = False
    try:
        DEEDS[deed](root, source)
        done = True
    finally:
        os._exit(0 if done else 1)  # a forked writer never goes on to be the sweep


def _was_killed(status: int) -> bool:
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "a writer that was not killed failed"
    return False


def main() -> None:
    """`step|strace TEMPLATES WORK SOURCE`: print each registry whose writer was killed, by deed; or `add|churn ROOT SOURCE N`."""
    how, *rest = sys.argv[1:]
    if how in ("add", "churn"):
        root, source, count = Path(rest[0]), Path(rest[1]), int(rest[2])
        if how == "churn":
            churn(root, source, count)
        else:
            print(json.dumps([registry.add(source, "home", root=root).number for _ in range(count)]))
        return
    templates, work, source = map(Path, rest)
    registry.add(source, "warm", root=work / "warm")  # imports what is imported late, before anything is counted
    sweep = killed_by_step if how == "step" else killed_by_strace
    print(json.dumps({deed: [*map(str, sweep(templates / deed, work / deed, source, deed))] for deed in DEEDS}))


if __name__ == "__main__":
    main()
