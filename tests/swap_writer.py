"""Servers that die while they change what they serve: at a chosen step on disk, or at any moment by another's hand.

Run as a process of its own that forks one server per point, since only then can each die and cost milliseconds.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from lora_tune.serving import state as journal
from lora_tune.serving.swap import Fleet
from tests.fleets import served
from tests.registry_writer import _was_killed, die_at
from tests.scripted_engine import ScriptedEngine

DEEDS: dict[str, Callable[[Fleet], object]] = {
    "load a version": lambda fleet: fleet.load("home@3"),
    "load without pointing": lambda fleet: fleet.load("home@3", point=False),
    "point an alias": lambda fleet: fleet.point("prod", target="home@2"),
    "split an alias": lambda fleet: fleet.point("prod", split={"home@1": 0.5, "home@2": 0.5}),
    "shadow an alias": lambda fleet: fleet.point("prod", shadow="home@2"),
    "roll back": lambda fleet: fleet.rollback("home"),
    "forget": lambda fleet: fleet.forget("prod"),
    "unload": lambda fleet: fleet.unload("other@1"),
}
"""Done by a server that has home@1, then home@2, under home; home@1 under prod; and other@1."""
SHORTEN = "shorten"
"""No deed: what a server does with a long journal when it starts."""


def prepare(fleet: Fleet) -> None:
    """Bring a fleet to where the deeds begin."""
    fleet.load("home@1")
    fleet.load("home@2")
    fleet.load("other@1", point=False)
    fleet.point("prod", target="home@1")


def open_fleet(base: Path, root: Path, state: Path) -> Fleet:
    """Return a restored fleet on an engine of its own."""
    fleet = Fleet(ScriptedEngine(), served(base), registry=root, state=state)
    fleet.restore()
    return fleet


def killed_by_step(base: Path, root: Path, template: Path, work: Path, deed: str) -> Iterator[Path]:
    """Give one state file for each step on disk at which a server died; the last, that did not, must have succeeded."""
    for step in range(1, 1000):
        state = work / f"{deed}-{step}.jsonl"
        shutil.copyfile(template, state)
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(Exception):
                die_at(step)
                if deed == SHORTEN:
                    journal.LONG_JOURNAL_BYTES = 500
                fleet = open_fleet(base, root, state)
                if deed != SHORTEN:
                    DEEDS[deed](fleet)
                code = 0
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        if not _was_killed(status):
            assert status == 0, "the one that was left alive did not do it"
            return
        yield state


def killed_at_any_moment(base: Path, root: Path, work: Path, count: int) -> Iterator[tuple[Path, int]]:
    """Give one state file for each server that was killed while it swapped, and how many swaps it had said were done."""
    chance = random.Random(7)
    for number in range(count):
        state, (reading, writing) = work / f"any-{number}.jsonl", os.pipe()
        pid = os.fork()
        if pid == 0:
            with suppress(Exception):
                fleet = open_fleet(base, root, state)
                for n in range(100_000):
                    swap(fleet, n)
                    os.write(writing, b".")
            os._exit(1)
        os.close(writing)
        said = os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert _was_killed(status)
        while piece := os.read(reading, 65536):
            said += piece
        os.close(reading)
        yield state, len(said)


def swap(fleet: Fleet, n: int) -> None:
    """Do the swap of that number: home goes round over three versions, loaded anew each time."""
    fleet.load(f"home@{n % 3 + 1}")
    if n % 2:
        with suppress(Exception):
            fleet.unload(f"home@{(n + 2) % 3 + 1}", timeout=0)


def main() -> None:
    """Print the state files of those that were killed.

    `step BASE ROOT TEMPLATE WORK DEED…`, `shorten BASE ROOT TEMPLATE WORK` or `any BASE ROOT WORK COUNT`.
    """
    how, *rest = sys.argv[1:]
    if how == "any":
        base, root, work, count = Path(rest[0]), Path(rest[1]), Path(rest[2]), int(rest[3])
        print(json.dumps([[str(state), said] for state, said in killed_at_any_moment(base, root, work, count)]))
        return
    base, root, template, work = map(Path, rest[:4])
    if how == SHORTEN:
        print(json.dumps([*map(str, killed_by_step(base, root, template, work, SHORTEN))]))
        return
    print(json.dumps({deed: [*map(str, killed_by_step(base, root, template, work, deed))] for deed in rest[4:]}))


if __name__ == "__main__":
    main()
