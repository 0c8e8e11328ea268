"""The fleet: names resolve once and to nothing else, loads are proved before they count, and what is used stays."""

import json
import threading
import time

import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG, open_adapter
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.shelf import content_digest
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    CannotWriteError,
    ConflictError,
    DrainingError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    RequestError,
    UnsupportedError,
)
from lora_tune.serving.deployed import chosen
from lora_tune.serving.engine import BASE, Sampling, Token, Work
from tests.fleets import WEIGHTS_DIGEST, adapter, bare_base, fill_registry, opened, served, with_passport
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


def test_what_an_alias_needs_is_not_unloaded(fleet):
    for number in (1, 2, 3):
        fleet.load(f"home@{number}")
    fleet.point("prod", target="home@1", shadow="home@2")
    assert "prod" in refused(fleet, ConflictError, fleet.unload, "home@1").message
    assert "prod" in refused(fleet, ConflictError, fleet.unload, "home@2").message
    assert "home" in refused(fleet, ConflictError, fleet.unload, "home@3").hint
    refused(fleet, ConflictError, fleet.unload, "prod")
    refused(fleet, MissingInputError, fleet.unload, "other@1")
    refused(fleet, MissingInputError, fleet.unload, "nobody")


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


def test_rolling_back_goes_step_by_step_to_what_is_still_loaded(fleet):
    for number in (1, 2, 3):
        fleet.load(f"home@{number}")
    assert fleet.rollback("home").target == (("home@2", 1.0),)
    assert model_of(fleet, "home") == "home@2"
    assert fleet.rollback("home").target == (("home@1", 1.0),)
    refused(fleet, ConflictError, fleet.rollback, "home")
    refused(fleet, MissingInputError, fleet.rollback, "prod")


def test_unloading_a_retained_version_shortens_the_way_back(fleet):
    for number in (1, 2, 3):
        fleet.load(f"home@{number}")
    fleet.unload("home@2")
    assert fleet.rollback("home").target == (("home@1", 1.0),)


def test_a_split_answers_by_its_shares_and_a_shadow_runs_beside(fleet):
    for number in (1, 2, 3):
        fleet.load(f"home@{number}")
    fleet.point("prod", split={"home@1": 0.25, "home@2": 0.75}, shadow="home@3")
    draws = [n / 100 for n in range(100)]
    models = [model_of(fleet, "prod", draw) for draw in draws]
    assert models == ["home@1"] * 25 + ["home@2"] * 75
    lease = fleet.lease("prod", draw=0.1)
    assert (lease.version.id, lease.shadow.id) == ("home@1", "home@3")
    assert fleet.in_flight() == {"tiny-base": 0, "home@1": 1, "home@2": 0, "home@3": 1}
    lease.release()
    assert set(fleet.in_flight().values()) == {0}


def test_a_shadow_is_set_alone_goes_with_a_new_target_and_never_doubles_the_answer(fleet):
    for number in (1, 2):
        fleet.load(f"home@{number}")
    refused(fleet, MissingInputError, fleet.point, "prod", shadow="home@2")
    fleet.point("prod", target="home@1")
    assert fleet.point("prod", shadow="home@2").target == (("home@1", 1.0),)
    assert fleet.point("prod", shadow="").shadow is None
    fleet.point("prod", shadow="home@2")
    assert fleet.point("prod", target="home@2").shadow is None
    assert fleet.rollback("prod").shadow == "home@2"
    fleet.point("prod", shadow="home@1")
    lease = fleet.lease("prod", draw=0.0)
    assert (lease.version.id, lease.shadow) == ("home@1", None)
    lease.release()


@pytest.mark.parametrize(
    "target", [(("a", 1.0),), (("a", 0.1), ("b", 0.2), ("c", 0.7)), (("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3))]
)
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_every_draw_falls_on_a_version(target, draw):
    assert chosen(target, draw) in {id for id, _ in target}


BAD_AIMS = {
    "nothing said": {}, "both said": {"target": "home@1", "split": {"home@1": 1.0}}, "no shares": {"split": {}},
    "shares above one": {"split": {"home@1": 0.6, "home@2": 0.6}}, "shares below one": {"split": {"home@1": 0.4, "home@2": 0.4}},
    "a negative share": {"split": {"home@1": 1.5, "home@2": -0.5}}, "a share of nothing": {"split": {"home@1": 1.0, "home@2": 0.0}},
    "a share that is no number": {"split": {"home@1": float("nan"), "home@2": 0.5}}, "an endless share": {"split": {"home@1": float("inf")}},
    "one version twice": {"split": {"home@1": 0.5, "home": 0.5}}, "nine versions": {"split": {f"home@{n}": 1 / 9 for n in range(9)}},
}  # fmt: skip


@pytest.mark.parametrize("aim", BAD_AIMS.values(), ids=BAD_AIMS)
def test_an_aim_that_cannot_be_meant_is_refused(fleet, aim):
    fleet.load("home@2")
    fleet.load("home@1")
    refused(fleet, RequestError, fleet.point, "prod", **aim)


@pytest.mark.parametrize("alias", ["", "A", "../x", "a b", "home@1", "a\n", "x" * 64, "-a"])
def test_what_is_no_name_is_no_alias(fleet, alias):
    fleet.load("home@1")
    refused(fleet, RequestError, fleet.point, alias, target="home@1")


def test_names_aliases_and_the_base_never_mean_two_things(fleet, stock):
    fleet.load("home@1")
    fleet.load("other")
    refused(fleet, ConflictError, fleet.point, "tiny-base", target="home@1")
    refused(fleet, ConflictError, fleet.point, "home", target="other@1")
    refused(fleet, ConflictError, fleet.load, "home@1", name="tiny-base")
    fleet.point("prod", target="home@1")
    refused(fleet, ConflictError, fleet.load, "more@1", name="prod")
    fleet.load("home@2")
    assert fleet.point("home", target="home@1").target == (("home@1", 1.0),)


def test_a_split_name_is_no_target(fleet):
    for number in (1, 2):
        fleet.load(f"home@{number}")
    fleet.point("prod", split={"home@1": 0.5, "home@2": 0.5})
    refused(fleet, ConflictError, fleet.point, "beta", target="prod")
    fleet.point("prod", target="home@1")
    assert fleet.point("beta", target="prod").target == (("home@1", 1.0),)


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


def test_a_folder_outside_of_the_registry_is_the_operators_alone(fleet, tmp_path):
    folder = adapter(tmp_path / "mine", 50)
    words = {refused(fleet, RefusedError, fleet.load, str(folder)).message}
    words.add(refused(fleet, RefusedError, fleet.load, str(tmp_path / "not-there")).message)
    words.add(refused(fleet, RefusedError, fleet.load, "../../../etc").message)
    assert len(words) == 1  # nothing is learnt of what is there
    version = fleet.load(str(folder), allow_outside=True)
    assert version.id == f"mine@sha256:{version.digest[:12]}"
    assert fleet.load(str(folder), name="casa", allow_outside=True).name == "casa"


def test_a_way_out_of_the_registry_by_a_link_is_none(stock, tmp_path):
    root = tmp_path / "r"
    fill_registry(root, tmp_path / "w", {"home": 1})
    (root / "out").symlink_to(adapter(tmp_path / "outside", 3))
    (root / "loop").symlink_to(root / "loop")
    with opened(stock[0], root) as fleet:
        refused(fleet, RefusedError, fleet.load, "./out")
        refused(fleet, RefusedError, fleet.load, f"{root}/out")
        refused(fleet, LoraTuneError, fleet.load, "./loop")
        refused(fleet, RefusedError, fleet.load, ".")
        refused(fleet, RefusedError, fleet.load, f"{root}/../{root.name}/../outside")
        assert fleet.load("./home/1").id == fleet.load(f"{root}/home/../home/1/").id == "home@1"


def test_a_folder_in_the_working_folder_is_not_a_registrys_name(fleet, tmp_path, monkeypatch):
    adapter(tmp_path / "casa", 51)
    monkeypatch.chdir(tmp_path)
    refused(fleet, MissingInputError, fleet.load, "casa")


@pytest.mark.parametrize(
    "spec", ["", "\0", "a\0/b", "x" * 5000, "home@", "home@0", "home@@1", "HOME", "home@sha256:zz"]
)
def test_a_spec_that_names_nothing_is_refused(fleet, spec):
    refused(fleet, (RequestError, MissingInputError, RefusedError), fleet.load, spec)


@pytest.mark.parametrize("name", ["", "A", "a/b", "a\0", "x" * 64, "a\n", "a@1"])
def test_a_hostile_name_is_refused(fleet, name):
    refused(fleet, RequestError, fleet.load, "home@1", name=name)


def test_a_version_that_was_changed_on_disk_is_refused(stock, tmp_path):
    root = tmp_path / "r"
    fill_registry(root, tmp_path / "w", {"home": 1})
    path = root / "home" / "1" / CONFIG
    with opened(stock[0], root) as fleet:
        path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
        refused(fleet, AdapterMismatchError, fleet.load, "home@1")


def test_what_does_not_fit_the_base_is_refused_before_the_engine_hears_of_it(fleet, tmp_path):
    from tests.unit.test_door import write

    refused(fleet, AdapterMismatchError, fleet.load, str(write(tmp_path / "narrow")), name="narrow", allow_outside=True)
    assert fleet.engine.loads == []


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


def test_swaps_are_counted(fleet):
    fleet.load("home@1")
    assert fleet.swaps() == 0
    fleet.load("home@2")
    fleet.rollback("home")
    fleet.load("home@1")
    fleet.point("home", shadow="home@2")
    assert fleet.swaps() == 2


@pytest.fixture
def proved(tiny_bases, tmp_path):
    """Return a fleet on a base with a tokenizer, and a function that registers an adapter with a passport."""
    folder = tiny_bases("llama")
    root = tmp_path / "r"
    root.mkdir()

    def register(number, **passport):
        source = with_passport(adapter(tmp_path / f"a{number}", number), folder, **passport)
        return registry.add(source, "home", root=root).spec

    with opened(served(folder), root) as fleet:
        yield fleet, register


def test_an_adapter_that_answers_as_its_passport_says_is_equal(proved):
    fleet, register = proved
    assert fleet.load(register(1)).verdict == "equal"


def test_an_adapter_that_answers_otherwise_never_gets_the_name(proved):
    fleet, register = proved
    fleet.load(register(1))
    other = content_digest(open_adapter(fleet.versions()[0].files.folder))
    error = refused(fleet, AdapterMismatchError, fleet.load, register(2, content=other))
    assert "passport" in error.message
    assert model_of(fleet, "home") == "home@1"


def test_an_engine_that_does_not_apply_the_adapter_is_found_out(proved):
    fleet, register = proved
    spec = register(1)
    digest = content_digest(open_adapter(registry.find(spec, root=fleet.registry)))
    fleet.engine.deaf = {f"home--{digest[:12]}"}
    refused(fleet, AdapterMismatchError, fleet.load, spec)
    fleet.engine.deaf = set()
    assert fleet.load(spec).verdict == "equal"


def test_probes_that_fail_in_the_engine_leave_nothing_staged(proved):
    fleet, register = proved
    spec = register(1)
    fleet.engine.token_error = BusyError("the cache is full")
    refused(fleet, BusyError, fleet.load, spec)
    assert fleet.load(spec).verdict == "equal"


def test_what_one_passport_said_of_the_base_is_believed_of_no_other(proved, tmp_path):
    from tests.unit.test_door import write

    fleet, register = proved
    fleet.load(register(1))
    assert fleet.load(register(2)).verdict == "equal"
    for field, value in (("base", {"weights": "1" * 64}), ("tokenizer", {"chat_template": "2" * 64}), ("tokenizer", {"own_template": "{{ 1 }}"})):  # fmt: skip
        folder = with_passport(adapter(tmp_path / "other", 3), fleet.base.files.folder)
        passport = json.loads((folder / FILE_NAME).read_text())
        passport[field] |= value
        (folder / FILE_NAME).write_text(json.dumps(passport))
        refused(fleet, AdapterMismatchError, fleet.load, str(folder), name="other", allow_outside=True)
    for _ in range(2):
        narrow = write(tmp_path / "narrow")
        refused(fleet, AdapterMismatchError, fleet.load, str(narrow), name="narrow", allow_outside=True)


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


def test_a_template_whose_turns_end_otherwise_is_refused_unless_the_server_stops_there(proved, tmp_path, monkeypatch):
    fleet, register = proved
    spec = register(1)
    monkeypatch.setattr("lora_tune.serving.places.own_template", lambda _: "a template")
    monkeypatch.setattr("lora_tune.serving.places.ends_of", lambda *_: [7])
    assert "--adapter" in refused(fleet, UnsupportedError, fleet.load, spec).hint
    monkeypatch.setattr("lora_tune.serving.places.ends_of", lambda *_: [])
    assert fleet.load(spec).verdict == "equal"
