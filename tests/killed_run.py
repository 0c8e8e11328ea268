"""Runs of the command line in forked children that something else kills: everything is imported once, before the first fork.

As a program it reads one JSON object a line, `{"argv": […], "cache": folder, "log": file, "hold": bool}`, and answers
with the child's pid, then, when it has ended, with its exit code (negative: the signal that killed it). A child that is
held stops itself before its first deed, until it gets SIGCONT.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEEDS = "write,writev,pwrite64,rename,renameat,renameat2,fsync,fdatasync,mkdir,unlink,unlinkat,rmdir,truncate,ftruncate"
"""System calls that change what is on the disk."""


class Children:
    """A server that forks; enter it, and `run` or `begin` children."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.killed_run"], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # the kernel hangs up stopped children of a group whose leader's parent ends
        )  # fmt: skip
        assert self._answer() == "ready"
        return self

    def __exit__(self, *exception):
        self._server.kill()
        self._server.communicate()

    def begin(self, argv, folder, *, hold=False):
        """Start a child and return its pid."""
        wish = {"argv": list(map(str, argv)), "cache": str(folder / "cache"), "log": str(folder / "log"), "hold": hold}
        self._server.stdin.write(json.dumps(wish) + "\n")
        return int(self._answer())

    def end(self):
        """Wait for the child and return its exit code."""
        return int(self._answer())

    def signal(self, pid, number):
        """Send the child a signal, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def until_it_listens(self, pid):
        """Wait until the child answers signals itself: SIGHUP, which Python leaves alone, is caught only by a run."""
        with suppress(OSError):
            while not int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) & 1:
                time.sleep(0.002)

    def run(self, argv, folder):
        """Run a child to its end and return its exit code."""
        self.begin(argv, folder)
        return self.end()

    def traced(self, argv, folder, *words):
        """Run a child under strace, attached before its first deed; return its exit code."""
        pid = self.begin(argv, folder, hold=True)
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.002)
        strace = subprocess.Popen(["strace", "-f", *words, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        line = strace.stderr.readline()
        if "attached" not in line:
            os.kill(pid, signal.SIGKILL)
            self.end()
            raise PermissionError(line.strip())
        os.kill(pid, signal.SIGCONT)
        code = self.end()
        strace.communicate()
        return code

    def _answer(self):
        line = self._server.stdout.readline()
        assert line, "the server of children ended"
        return line.strip()


def _child(wish):
    log = os.open(wish["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ["LORA_TUNE_CACHE"] = wish["cache"]
    if wish["hold"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    from lora_tune.cli.app import main

    try:
        main(wish["argv"])
    except SystemExit as err:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(err.code or 0))
    os._exit(99)


def _serve():
    import lora_tune.cli.recipe_verbs
    import lora_tune.evaluation.evaluate
    import lora_tune.training.run  # noqa: F401

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even where the tests run under nohup
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write("ready\n")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(json.loads(line))
        answers.write(f"{pid}\n")
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")


if __name__ == "__main__":
    _serve()
