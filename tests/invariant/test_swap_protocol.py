"""The swap against a model of plain lists, against kill -9, and against many streams at once."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.shelf import content_digest
from lora_tune.errors import BusyError, CannotWriteError, ConflictError, MissingInputError
from lora_tune.serving import state as journal
from lora_tune.serving.engine import Sampling, Token, Work
from lora_tune.serving.swap import Fleet
from tests.fleets import bare_base, fill_registry, opened
from tests.scripted_engine import ScriptedEngine, script
from tests.swap_writer import DEEDS, prepare

ROOT = Path(__file__).resolve().parents[2]
N_PLACES = 3
TORN = b'{"event":"pointed","alias":"pr'
IDS = ["home@1", "home@2", "home@3", "other@1", "other@2", "more@1"]
ALIASES = ["prod", "beta"]
NAMES = ["home", "other", "more", *ALIASES]
FIRST_DEEDS = ["load a version", "shadow an alias", "unload"]
"""Those that come, point and go; the others are journalled as these are."""
ids, aliases, numbers = st.sampled_from(IDS), st.sampled_from(ALIASES), st.integers(0, 59)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    fill_registry(folder / "r", folder / "w", {"home": 3, "other": 2, "more": 1})
    shutil.rmtree(folder / "w")
    base = bare_base(folder / "base")
    digests = {id: content_digest(open_adapter(folder / "r" / id.replace("@", "/"))) for id in IDS}
    Machine.stock = (base, folder / "r", digests)
    return base, folder / "r", digests


def some(number, known, anything):
    """Return mostly one that is there, sometimes any."""
    found = sorted(known) if known and number % 5 else anything
    return found[number % len(found)]


class Machine(RuleBasedStateMachine):
    """A fleet beside what it should be: loaded ids, and for each name the aims it had, (targets, shadow)."""

    stock: tuple

    @initialize(folder=st.uuids())
    def begin(self, folder):
        self.base, self.root, self.digests = self.stock
        self.state = self.root.parent / "states" / f"{folder}-{time.monotonic_ns()}.jsonl"
        self.loaded, self.aims, self.leases = set(), {}, []
        self.open()

    def open(self):
        self.engine = ScriptedEngine(max_adapters=N_PLACES)
        self.fleet = Fleet(self.engine, self.base, registry=self.root, state=self.state)
        assert self.fleet.restore() == []

    def teardown(self):
        if hasattr(self, "fleet"):
            self.crash()
            self.fleet.close()
            self.engine.close()

    def needed(self):
        return {id for history in self.aims.values() for id in [*history[-1][0], history[-1][1]] if id}

    def used(self):
        return Counter(v.id for lease in self.leases for v in (lease.version, lease.shadow) if v)

    def aim(self, alias, target, shadow=None):
        history = self.aims.setdefault(alias, [])
        if history[-1:] != [(target, shadow)]:
            history.append((target, shadow))
            del history[: -journal.MAX_HISTORY]

    def gone(self, id):
        self.loaded.discard(id)
        for alias, history in [*self.aims.items()]:
            kept = []
            for target, shadow in history:
                aim = (target, None if shadow == id else shadow)
                if id not in target and kept[-1:] != [aim]:
                    kept.append(aim)
            self.aims[alias] = kept
            if not kept:
                del self.aims[alias]

    @rule(id=ids)
    def load_beside(self, id):
        self.load(id, point=False)

    @rule(id=ids, point=st.booleans())
    def load(self, id, point):
        full = id not in self.loaded and len(self.loaded) == N_PLACES
        free = self.loaded - self.needed() - set(self.used())
        if full and not free:
            with pytest.raises(BusyError):
                self.fleet.load(id, point=point)
            return
        assert self.fleet.load(id, point=point).digest == self.digests[id]
        if full:
            there = {version.id for version in self.fleet.versions()}
            (retired,) = self.loaded - there
            assert retired in free
            self.gone(retired)
        self.loaded.add(id)
        if point:
            self.aim(id.partition("@")[0], {id: 1.0})

    @rule(id=ids, defect=st.sampled_from(["engine", "disk"]))
    def fail_to_load(self, id, defect):
        if id in self.loaded or len(self.loaded) == N_PLACES:
            return
        if defect == "engine":
            self.engine.load_error = MemoryError()
            with pytest.raises(MemoryError):
                self.fleet.load(id)
            return
        write = journal.os.write
        try:
            journal.os.write = lambda descriptor, line: write(descriptor, line[: len(line) // 2])
            with pytest.raises(CannotWriteError):
                self.fleet.load(id)
        finally:
            journal.os.write = write

    @rule(alias=aliases, first=numbers, second=numbers, share=st.sampled_from([0.25, 0.5]), shadow=st.none() | numbers)
    def point(self, alias, first, second, share, shadow):
        first, second = some(first, self.loaded, IDS), some(second, self.loaded, IDS)
        shadow = None if shadow is None else some(shadow, self.loaded, IDS)
        target = {first: 1.0} if first == second else {first: share, second: 1 - share}
        if not {first, second, shadow} - {None} <= self.loaded:
            with pytest.raises(MissingInputError):
                self.fleet.point(alias, split=target, shadow=shadow)
            return
        self.fleet.point(alias, split=target, shadow=shadow)
        self.aim(alias, target, shadow)

    @rule(alias=numbers, shadow=numbers)
    def shadow(self, alias, shadow):
        alias, shadow = some(alias, self.aims, NAMES), some(shadow, self.loaded, IDS)
        if alias not in self.aims or shadow not in self.loaded:
            with pytest.raises(MissingInputError):
                self.fleet.point(alias, shadow=shadow)
            return
        self.fleet.point(alias, shadow=shadow)
        target, _ = self.aims[alias].pop()
        self.aim(alias, target, shadow)

    @rule(alias=numbers)
    def roll_back(self, alias):
        alias = some(alias, self.aims, NAMES)
        history = self.aims.get(alias, [])
        if len(history) < 2:
            with pytest.raises(MissingInputError if not history else ConflictError):
                self.fleet.rollback(alias)
            return
        self.fleet.rollback(alias)
        history.pop()

    @rule(alias=numbers)
    def forget(self, alias):
        alias = some(alias, self.aims, NAMES)
        if alias not in self.aims:
            with pytest.raises(MissingInputError):
                self.fleet.forget(alias)
            return
        self.fleet.forget(alias)
        del self.aims[alias]

    @rule(id=numbers)
    def unload(self, id):
        id = some(id, self.loaded, IDS)
        if id not in self.loaded:
            with pytest.raises(MissingInputError):
                self.fleet.unload(id, timeout=0)
        elif id in self.needed() or self.used()[id]:
            with pytest.raises(ConflictError):
                self.fleet.unload(id, timeout=0)
        else:
            self.fleet.unload(id, timeout=0)
            self.gone(id)

    @rule(model=numbers, draw=st.floats(0, 1, exclude_max=True))
    def ask(self, model, draw):
        self.lease(some(model, self.loaded | set(self.aims), NAMES + IDS), draw)

    def lease(self, model, draw):
        if model not in self.aims and model not in self.loaded:
            with pytest.raises(MissingInputError):
                self.fleet.lease(model, draw=draw)
            return
        lease = self.fleet.lease(model, draw=draw)
        target, shadow = self.aims[model][-1] if model in self.aims else ({model: 1.0}, None)
        assert lease.version.id in target
        assert (lease.shadow.id if lease.shadow else None) == (shadow if shadow != lease.version.id else None)
        self.leases.append(lease)

    @precondition(lambda self: self.loaded)
    @rule(number=numbers)
    def hold(self, number):
        self.lease(sorted(self.loaded)[number % len(self.loaded)], 0.0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def answer_and_release(self, data):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert answered(self.engine, lease.version.key, 3) == script(self.digests[lease.version.id], (9, 8), 3)
        lease.release()
        lease.release()

    def crash(self):
        """As a killed process leaves it: nothing is released, unloaded or written."""
        self.engine.close()
        self.fleet.close()
        self.leases = []

    @rule(torn=st.booleans())
    def crash_and_start_again(self, torn):
        self.crash()
        if torn:
            with self.state.open("ab") as stream:
                stream.write(TORN)
            # What was cut off is said, once; all else is as it was.
            self.engine = ScriptedEngine(max_adapters=N_PLACES)
            self.fleet = Fleet(self.engine, self.base, registry=self.root, state=self.state)
            assert all("damaged" in word for word in self.fleet.restore())
            whole = self.state.read_bytes().splitlines(keepends=True)
            self.crash()
            # Where the journal was made short it is gone already.
            self.state.write_bytes(b"".join(line for line in whole if not line.startswith(TORN)))
        self.open()

    @invariant()
    def everything_agrees(self):
        if not hasattr(self, "fleet"):
            return
        found = {alias: (dict(pointer.target), pointer.shadow) for alias, pointer in self.fleet.pointers().items()}
        assert found == {alias: history[-1] for alias, history in self.aims.items()}
        assert {version.id for version in self.fleet.versions()} == self.loaded
        assert self.engine.keys() == {f"{id.partition('@')[0]}--{self.digests[id][:12]}" for id in self.loaded}
        expected = dict.fromkeys(self.loaded, 0) | {self.base.name: 0} | dict(self.used())
        assert self.fleet.in_flight() == expected
        assert self.engine.violations == []


def answered(engine, key, n_tokens, prompt=(9, 8)):
    done, tokens = threading.Event(), []
    engine.submit(
        Work(prompt, key, Sampling(n_tokens)), lambda e: tokens.append(e.id) if isinstance(e, Token) else done.set()
    )
    assert done.wait(30)
    return tokens


@pytest.mark.parametrize("n_examples", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_the_fleet_is_what_plain_lists_say_it_is(stock, n_examples, monkeypatch):
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(journal, "LONG_JOURNAL_BYTES", 2048)  # so that journals are made short amid the deeds

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=n_examples, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def run(*words):
    command = [sys.executable, "-m", "tests.swap_writer", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def meaning(fleet):
    """Return all that a restart must bring back: what is meant now and before, and what is loaded."""
    return dict(fleet._table.state.histories), sorted(version.id for version in fleet.versions())


def restarted(base, root, state):
    with opened(base, root, state, restore=False) as fleet:
        words = fleet.restore()
        assert all("damaged line" in word for word in words)
        for alias in ("home", *fleet.pointers()):
            lease = fleet.lease(alias, draw=0.0)
            assert answered(fleet.engine, lease.version.key, 4) == script(lease.version.digest, (9, 8), 4)
            lease.release()
        return meaning(fleet)


@pytest.mark.parametrize("deeds", [FIRST_DEEDS, pytest.param([*DEEDS], marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_server_killed_at_any_step_on_disk_serves_the_old_or_the_new(stock, tmp_path, deeds):
    base, root, _ = stock
    template = tmp_path / "template.jsonl"
    with opened(base, root, template) as fleet:
        prepare(fleet)
        before = meaning(fleet)
    after = {}
    for deed in deeds:
        act, state = DEEDS[deed], tmp_path / f"{deed}.jsonl"
        shutil.copyfile(template, state)
        with opened(base, root, state) as fleet:
            act(fleet)
            after[deed] = meaning(fleet)
        assert after[deed] != before
        assert restarted(base, root, state) == after[deed]
    (tmp_path / "work").mkdir()
    killed = run("step", base.files.folder, root, template, tmp_path / "work", *deeds)
    assert set(killed) == set(deeds)
    for deed, states in killed.items():
        ends = [restarted(base, root, Path(state)) for state in states]
        assert len(ends) >= 5
        assert all(end in (before, after[deed]) for end in ends)
        # The sweep reaches over the moment of the commit.
        assert ends[0] == before
        assert ends[-1] == after[deed]


def test_a_server_killed_while_it_shortens_its_journal_finds_the_long_one_or_the_short_one(stock, tmp_path):
    base, root, _ = stock
    template = tmp_path / "template.jsonl"
    with opened(base, root, template) as fleet:
        prepare(fleet)
        for n in range(80):
            fleet.point("prod", target=f"home@{n % 2 + 1}")
        before = meaning(fleet)
    (tmp_path / "work").mkdir()
    killed = [Path(state) for state in run("shorten", base.files.folder, root, template, tmp_path / "work")]
    assert len(killed) >= 8
    long, sizes = template.stat().st_size, [state.stat().st_size for state in killed]
    assert sizes[0] == long
    assert sizes[-1] < long / 2
    assert all(size == long or size < long / 2 for size in sizes)
    assert all(restarted(base, root, state) == before for state in killed)


@pytest.mark.parametrize("n_kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_a_server_killed_at_any_moment_of_many_swaps_serves_the_last_that_it_said_or_the_next(stock, tmp_path, n_kills):
    base, root, _ = stock
    killed = run("any", base.files.folder, root, tmp_path, n_kills)
    assert len(killed) == n_kills
    said = [count for _, count in killed]
    assert max(said) > 3
    for state, count in killed:
        histories, _ = restarted(base, root, Path(state))
        last, following = f"home@{(count - 1) % 3 + 1}", f"home@{count % 3 + 1}"
        assert dict(histories["home"][-1].target).keys() <= {last, following}


def test_200_swaps_under_eight_streams_mix_nothing_and_drop_nothing(stock, tmp_path):
    base, root, digests = stock
    with opened(base, root, tmp_path / "s.jsonl", max_adapters=3) as fleet:
        fleet.load("home@1")
        prompts = {n: (20 + n, 30 + n) for n in range(8)}
        allowed = {n: {id: script(digests[id], prompt, 12) for id in IDS} for n, prompt in prompts.items()}
        stop, wrong, n_answers = threading.Event(), [], Counter()

        def stream(n):
            while not stop.is_set():
                lease = fleet.lease("home", draw=0.0)
                try:
                    if answered(fleet.engine, lease.version.key, 12, prompts[n]) != allowed[n][lease.version.id]:
                        wrong.append(lease.model)
                    n_answers[lease.model] += 1
                finally:
                    lease.release()

        threads = [threading.Thread(target=stream, args=(n,)) for n in prompts]
        for thread in threads:
            thread.start()
        for n in range(200):
            fleet.load(f"home@{n % 3 + 1}")
            if n % 5 == 4:
                fleet.unload(f"home@{(n - 1) % 3 + 1}")
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert set(n_answers) == {"home@1", "home@2", "home@3"}
        assert set(fleet.in_flight().values()) == {0}
        assert fleet.engine.facts().n_adapters == len(fleet.versions())
        assert fleet.swaps() >= 199
