"""A program between us and vLLM: when we are gone, however we went, it ends vLLM and all its workers.

Run by its path, with the standard library only: `python vllm_keeper.py FOLDER COMMAND…`. Its standard input is a pipe
that nobody writes to: it closes when we close it or die. FOLDER is then removed.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 10.0
"""How long vLLM has to stop by itself."""


def main(folder: str, command: list[str]) -> None:
    """Run the command until it ends or standard input closes; then nothing of its process group is left."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    abandoned = threading.Event()

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        abandoned.set()
        child.terminate()
        time.sleep(GRACE_SECONDS)
        child.kill()

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    print(f"vLLM ended with exit code {code}", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # the workers of an API server that was killed
    time.sleep(0.5)
    if abandoned.is_set():
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
