"""The fleet: names resolve once and to nothing else, loads are proved before they count, and what is used stays."""

import threading
import time

import pytest

from lora_tune.adapter import registry
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    CannotWriteError,
    ConflictError,
    DrainingError,
    MissingInputError,
)
from lora_tune.serving.engine import BASE, Sampling, Token, Work
from tests.fleets import WEIGHTS_DIGEST, adapter, bare_base, fill_registry, opened
from tests.scripted_engine import script

PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Return a base, and a registry with home@1 to home@3 and other@1; tests only read it."""
    folder = tmp_path_factory.mktemp("stock")
    base = bare_base(folder / "base")
    fill_registry(folder / "registry", folder / "work", {"home": 3, "other": 1, "more": 5})
    return base, folder / "registry"


@pytest.fixture
def fleet(stock, tmp_path):
    base, root = stock
    with opened(base, root, tmp_path / "s.jsonl") as found:
        yield found


def answer(fleet, lease, n_tokens=6):
    """Return the tokens that a lease's version says to PROMPT."""
    done, tokens = threading.Event(), []

    def sink(event):
        if isinstance(event, Token):
            tokens.append(event.id)
        else:
            done.set()

    key = lease.version.key if lease.version else BASE
    fleet.engine.submit(Work(PROMPT, key, Sampling(n_tokens)), sink)
    assert done.wait(10)
    return tokens


def model_of(fleet, name, draw=0.0):
    lease = fleet.lease(name, draw=draw)
    lease.release()
    return lease.model


def everything(fleet):
    """Return all that a look at the fleet and its engine shows."""
    return fleet.versions(), fleet.pointers(), fleet.names(), fleet.engine.keys(), fleet.in_flight()


def refused(fleet, error, act, *words, **more):
    """The act fails with that error and leaves no trace."""
    before = everything(fleet)
    with pytest.raises(error) as caught:
        act(*words, **more)
    assert everything(fleet) == before
    return caught.value


def test_a_loaded_version_answers_under_its_name_its_number_and_its_digest(fleet):
    version = fleet.load("home@2")
    assert (version.id, version.verdict) == ("home@2", "unverified")
    for name in ("home", "home@2", f"home@sha256:{version.digest[:12]}", f"home@sha256:{version.digest}"):
        lease = fleet.lease(name, draw=0.5)
        assert (lease.version, lease.shadow, lease.model) == (version, None, "home@2")
        assert lease.fingerprint == f"base-{WEIGHTS_DIGEST[:12]}+{version.digest[:12]}"
        assert answer(fleet, lease) == script(version.digest, PROMPT, 6)
        lease.release()
    assert fleet.names() == ["tiny-base", "home", "home@2"]


def test_the_base_answers_under_its_own_name_only(fleet):
    lease = fleet.lease("tiny-base", draw=0.0)
    assert (lease.version, lease.model, lease.fingerprint) == (None, "tiny-base", f"base-{WEIGHTS_DIGEST[:12]}")
    assert answer(fleet, lease) == script("", PROMPT, 6)
    lease.release()


@pytest.mark.parametrize(
    "model", ["", "hom", "home@3", "home@9", "home@sha256:" + "0" * 12, "home@sha256:", "other", "HOME", "home\n", "../home", "x" * 10_000]
)  # fmt: skip
def test_an_unknown_model_is_answered_by_nobody(fleet, model):
    fleet.load("home@2")
    error = refused(fleet, MissingInputError, fleet.lease, model, draw=0.0)
    assert error.http_status == 404
    assert error.message.isprintable()
    assert len(error.message) < 1000


def test_close_names_are_given(fleet):
    fleet.load("home@2")
    with pytest.raises(MissingInputError, match="did you mean home"):
        fleet.lease("hoem", draw=0.0)


def test_a_lease_keeps_its_version_through_a_commit_and_holds_its_place(fleet):
    first = fleet.load("home@1")
    lease = fleet.lease("home", draw=0.0)
    second = fleet.load("home@2")
    assert fleet.pointers()["home"].target == (("home@2", 1.0),)
    assert lease.version == first
    assert answer(fleet, lease) == script(first.digest, PROMPT, 6)
    assert model_of(fleet, "home") == second.id
    assert fleet.in_flight() == {"tiny-base": 0, "home@1": 1, "home@2": 0}
    error = refused(fleet, ConflictError, fleet.unload, "home@1", timeout=0.01)
    assert "1 requests" in error.message
    lease.release()
    lease.release()
    assert fleet.in_flight()["home@1"] == 0
    fleet.unload("home@1")
    assert fleet.engine.keys() == {second.key}


def test_releasing_from_many_threads_gives_back_once(fleet):
    fleet.load("home@1")
    kept, lease = fleet.lease("home", draw=0.0), fleet.lease("home", draw=0.0)
    threads = [threading.Thread(target=lease.release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fleet.in_flight()["home@1"] == 1
    kept.release()


def test_unloading_waits_for_the_last_lease_and_lets_no_new_one_in(fleet):
    fleet.load("home@1")
    fleet.load("home@2")
    lease = fleet.lease("home@1", draw=0.0)
    thread = threading.Thread(target=fleet.unload, args=("home@1",))
    thread.start()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            fleet.lease("home@1", draw=0.0).release()
        except MissingInputError:
            break
    else:
        pytest.fail("it went on being given out")
    for act in (lambda: fleet.load("home@1"), lambda: fleet.point("prod", target="home@1"), lambda: fleet.rollback("home"), lambda: fleet.unload("home@1")):  # fmt: skip
        with pytest.raises(ConflictError, match="being unloaded"):
            act()
    assert answer(fleet, lease) == script(lease.version.digest, PROMPT, 6)
    lease.release()
    thread.join(5)
    assert "home@1" not in fleet.names()
    assert fleet.load("home@1").id == "home@1"


def test_a_bare_name_unloads_all_its_versions_and_itself_unless_an_alias_needs_one(fleet):
    for number in (1, 2):
        fleet.load(f"home@{number}")
    fleet.load("other")
    fleet.point("prod", target="home@1")
    refused(fleet, ConflictError, fleet.unload, "home")
    fleet.forget("prod")
    fleet.unload("home")
    assert fleet.names() == ["tiny-base", "other", "other@1"]
    assert len(fleet.engine.keys()) == 1
    refused(fleet, MissingInputError, fleet.forget, "home")


def test_loading_without_pointing_leaves_the_name_alone(fleet):
    fleet.load("home@1", point=False)
    assert fleet.names() == ["tiny-base", "home@1"]
    refused(fleet, MissingInputError, fleet.lease, "home", draw=0.0)
    assert fleet.load("home@1").id == "home@1"
    assert model_of(fleet, "home") == "home@1"
    assert fleet.engine.loads == ["home--" + fleet.versions()[0].digest[:12]]


def test_two_loads_of_one_version_at_once_are_one(fleet):
    fleet.engine.load_seconds = 0.05
    found = []
    threads = [threading.Thread(target=lambda: found.append(fleet.load("home@1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fleet.engine.loads) == 1
    assert [version.id for version in found] == ["home@1"] * 4


def test_requests_never_wait_for_a_load(fleet):
    fleet.load("home@1")
    fleet.engine.load_seconds = 1.0
    thread = threading.Thread(target=fleet.load, args=("home@2",))
    thread.start()
    n_leases = 0
    while thread.is_alive():
        assert model_of(fleet, "home") in ("home@1", "home@2")
        n_leases += 1
    thread.join()
    assert n_leases > 100


def test_one_content_under_two_numbers_has_one_place(fleet, stock, tmp_path):
    root = tmp_path / "twice"
    for _ in range(2):
        registry.add(adapter(tmp_path / "a", 77), "home", root=root)
    with opened(stock[0], root, tmp_path / "t.jsonl", max_adapters=1) as twice:
        first, second = twice.load("home@1"), twice.load("home@2")
        assert (first.key, first.id, second.id) == (second.key, "home@1", "home@2")
        assert len(twice.engine.loads) == 1
        twice.unload("home@1")
        assert twice.engine.keys() == {second.key}
        lease = twice.lease("home", draw=0.0)
        assert answer(twice, lease) == script(second.digest, PROMPT, 6)
        lease.release()
        twice.unload("home")
        assert twice.engine.keys() == set()


def test_one_content_under_two_names_is_two_adapters(fleet):
    fleet.load("home@1")
    renamed = fleet.load("home@1", name="casa")
    assert renamed.id == f"casa@sha256:{renamed.digest[:12]}"
    assert renamed.number is None
    fleet.unload("casa")
    assert model_of(fleet, "home") == "home@1"


def test_a_load_that_fails_in_the_engine_changes_nothing(fleet):
    fleet.load("home@1")
    for error in (BusyError("full"), AdapterMismatchError("no"), RuntimeError("a defect")):
        fleet.engine.load_error = error
        refused(fleet, type(error), fleet.load, "home@2")
    assert fleet.load("home@2").id == "home@2"


def test_a_journal_that_cannot_be_written_changes_nothing(fleet, monkeypatch):
    fleet.load("home@1")
    fleet.load("home@2")
    held = fleet.lease("home@1", draw=0.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_tune.serving.state.os.write", full)
    refused(fleet, CannotWriteError, fleet.load, "home@3")
    refused(fleet, CannotWriteError, fleet.point, "prod", target="home@1")
    refused(fleet, CannotWriteError, fleet.rollback, "home")
    refused(fleet, CannotWriteError, fleet.forget, "home")
    held.release()
    refused(fleet, CannotWriteError, fleet.unload, "home")
    monkeypatch.undo()
    assert fleet.load("home@3").id == "home@3"


def test_when_all_places_are_taken_the_longest_unused_that_nothing_needs_goes(stock, tmp_path):
    base, root = stock
    with opened(base, root, tmp_path / "s.jsonl", max_adapters=4) as fleet:
        for number in (1, 2, 3, 4):
            fleet.load(f"more@{number}")
        fleet.point("prod", target="more@1")
        fleet.lease("more@2", draw=0.0).release()
        fleet.load("more@5")  # more@1 is prod's, more@2 was used last, more@4 was the name's
        assert sorted(version.id for version in fleet.versions()) == ["more@1", "more@2", "more@4", "more@5"]
        held = fleet.lease("more@2", draw=0.0)
        fleet.load("home@1")
        assert sorted(version.id for version in fleet.versions()) == ["home@1", "more@1", "more@2", "more@5"]
        fleet.point("beta", target="more@2")
        refused(fleet, BusyError, fleet.load, "other")
        held.release()
        refused(fleet, BusyError, fleet.load, "other")


def test_what_a_request_uses_is_not_retired_however_long_ago_it_began(stock, tmp_path):
    base, root = stock
    with opened(base, root, tmp_path / "s.jsonl", max_adapters=2) as fleet:
        fleet.load("more@1", point=False)
        held = fleet.lease("more@1", draw=0.0)
        fleet.load("more@2", point=False)
        fleet.load("more@3", point=False)
        assert [version.id for version in fleet.versions()] == ["more@1", "more@3"]
        second = fleet.lease("more@3", draw=0.0)
        refused(fleet, BusyError, fleet.load, "more@4")
        for lease in (held, second):
            lease.release()
        fleet.load("more@4")


def test_a_load_that_is_overtaken_by_the_servers_end_leaves_nothing(fleet):
    fleet.load("home@1")
    fleet.engine.load_seconds = 0.2
    errors = []

    def load():
        try:
            fleet.load("home@2")
        except DrainingError as err:
            errors.append(err)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(0.05)
    before = everything(fleet)
    fleet.drain(0)
    thread.join()
    assert len(errors) == 1
    assert everything(fleet) == before


def test_a_draining_server_takes_nothing_new_and_waits_for_the_rest(fleet):
    fleet.load("home@1")
    assert fleet.ready()
    lease = fleet.lease("home", draw=0.0)
    begun = time.monotonic()
    fleet.drain(0.05)
    assert 0.04 < time.monotonic() - begun < 5
    assert not fleet.ready()
    for act in (lambda: fleet.lease("home", draw=0.0), lambda: fleet.load("home@2"), lambda: fleet.point("prod", target="home@1"), lambda: fleet.rollback("home"), lambda: fleet.unload("home")):  # fmt: skip
        with pytest.raises(DrainingError):
            act()
    threading.Timer(0.05, lease.release).start()
    fleet.drain(10)
    assert fleet.in_flight()["home@1"] == 0


def test_unloading_a_name_in_use_changes_nothing_when_it_times_out(fleet):
    fleet.load("home@1")
    fleet.load("home@2")
    lease = fleet.lease("home@1", draw=0.0)
    journal = fleet._journal.path.read_bytes()
    refused(fleet, ConflictError, fleet.unload, "home", timeout=0.01)
    assert model_of(fleet, "home") == "home@2"
    assert fleet._journal.path.read_bytes() == journal
    lease.release()
    fleet.unload("home")
    assert fleet.names() == ["tiny-base"]
