"""A server that starts again: it serves what it served, or says in words what it could not and what stands in."""

import json
import shutil
import threading

import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG
from lora_tune.errors import BusyError, ConflictError, MissingInputError
from tests.fleets import adapter, bare_base, fill_registry, opened, served, with_passport


@pytest.fixture
def place(tmp_path):
    """Return a base, a registry with home@1 to home@3, and a state file that is not there yet."""
    fill_registry(tmp_path / "r", tmp_path / "w", {"home": 3})
    return bare_base(tmp_path / "base"), tmp_path / "r", tmp_path / "s.jsonl"


def change(folder):
    path = folder / CONFIG
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 9'))


def meaning(fleet):
    return fleet.pointers(), [(version.id, version.digest) for version in fleet.versions()]


def test_what_was_served_is_served_again_with_its_way_back(place):
    with opened(*place) as fleet:
        for number in (1, 2, 3):
            fleet.load(f"home@{number}")
        fleet.point("prod", split={"home@1": 0.25, "home@2": 0.75}, shadow="home@3")
        fleet.point("prod", target="home@2")
        fleet.point("beta", target="home@1")
        fleet.forget("beta")
        before = meaning(fleet)
    with opened(*place, restore=False) as fleet:
        assert not fleet.ready()
        assert fleet.restore() == []
        assert fleet.ready()
        assert meaning(fleet) == before
        assert fleet.rollback("prod").target == (("home@1", 0.25), ("home@2", 0.75))
        assert fleet.rollback("home").target == (("home@2", 1.0),)
        assert fleet.restore() == []


def test_unloaded_versions_stay_away(place):
    with opened(*place) as fleet:
        fleet.load("home@1")
        fleet.load("home@2")
        fleet.unload("home@1")
    with opened(*place) as fleet:
        assert [version.id for version in fleet.versions()] == ["home@2"]


def test_until_it_is_restored_only_the_base_answers(place):
    with opened(*place) as fleet:
        fleet.load("home@1")
    with opened(*place, restore=False) as fleet:
        fleet.lease("tiny-base", draw=0.0).release()
        for act in (lambda: fleet.lease("home", draw=0.0), lambda: fleet.lease("home@1", draw=0.0), lambda: fleet.load("home@2"), lambda: fleet.point("prod", target="home@1")):  # fmt: skip
            with pytest.raises(BusyError):
                act()
        with pytest.raises(MissingInputError):
            fleet.lease("other", draw=0.0)


def test_a_version_whose_content_changed_gives_way_to_the_one_before(place):
    _, root, _ = place
    with opened(*place) as fleet:
        fleet.load("home@1")
        fleet.load("home@2")
    change(root / "home" / "2")
    with opened(*place, restore=False) as fleet:
        words = fleet.restore()
        assert [word.partition(":")[0] for word in words] == [
            "home@2 was not loaded again", "home pointed to home@2; it now points to home@1",
        ]  # fmt: skip
        lease = fleet.lease("home", draw=0.0)
        assert lease.model == "home@1"
        lease.release()


def test_when_nothing_before_loads_the_alias_is_gone_and_never_the_base(place):
    _, root, _ = place
    with opened(*place) as fleet:
        fleet.load("home@1")
    shutil.rmtree(root / "home" / "1")
    with opened(*place, restore=False) as fleet:
        words = fleet.restore()
        assert words[-1] == "home pointed to home@1; it is gone"
        assert fleet.ready()
        with pytest.raises(MissingInputError):
            fleet.lease("home", draw=0.0)


def test_what_was_lost_for_a_while_comes_back(place):
    _, root, _ = place
    with opened(*place) as fleet:
        fleet.load("home@1")
        fleet.load("home@2")
    (root / "home" / "2").rename(root / "away")
    with opened(*place) as fleet:
        fleet.load("home@3", point=False)
        assert fleet.pointers()["home"].target == (("home@1", 1.0),)
    (root / "away").rename(root / "home" / "2")
    with opened(*place, restore=False) as fleet:
        assert fleet.restore() == []
        assert fleet.pointers()["home"].target == (("home@2", 1.0),)
        assert len(fleet.versions()) == 3


def test_what_is_pointed_to_while_something_is_lost_counts_when_it_comes_back(place):
    _, root, _ = place
    with opened(*place) as fleet:
        for number in (1, 2):
            fleet.load(f"home@{number}")
    (root / "home" / "2").rename(root / "away")
    with opened(*place) as fleet:
        fleet.load("home@3")
        fleet.rollback("home")
    (root / "away").rename(root / "home" / "2")
    with opened(*place) as fleet:
        assert fleet.pointers()["home"].target == (("home@1", 1.0),)


def test_what_is_lost_can_be_unloaded_for_good(place):
    _, root, _ = place
    with opened(*place) as fleet:
        for number in (1, 2):
            fleet.load(f"home@{number}")
    change(root / "home" / "2")
    with opened(*place) as fleet:
        fleet.unload("home@2")
        with pytest.raises(MissingInputError):
            fleet.unload("home@2")
    with opened(*place, restore=False) as fleet:
        assert fleet.restore() == []


def test_a_smaller_engine_keeps_what_is_pointed_to(place):
    with opened(*place) as fleet:
        for number in (1, 2, 3):
            fleet.load(f"home@{number}")
        fleet.point("prod", target="home@1")
    with opened(*place, restore=False, max_adapters=2) as fleet:
        words = fleet.restore()
        assert len(words) == 1
        assert words[0].startswith("home@2 was not loaded again")
        assert [version.id for version in fleet.versions()] == ["home@1", "home@3"]


def test_damaged_lines_are_counted_and_cost_only_themselves(place):
    _, _, state = place
    with opened(*place) as fleet:
        fleet.load("home@1")
        fleet.load("home@2")
    lines = state.read_bytes().splitlines()
    state.write_bytes(lines[0] + b"\nrubbish\n" + lines[1] + b'\n{"event"')
    with opened(*place, restore=False) as fleet:
        words = fleet.restore()
        assert len(words) == 1
        assert words[0].startswith("2 damaged lines")
        assert fleet.pointers()["home"].target == (("home@2", 1.0),)


def test_a_line_that_is_lost_takes_only_its_version_with_it(place):
    _, _, state = place
    with opened(*place) as fleet:
        fleet.load("home@1")
        fleet.load("home@2", point=False)
        fleet.point("prod", target="home@1")
        fleet.point("prod", target="home@2")
    lines = state.read_bytes().splitlines()
    del lines[1]
    state.write_bytes(b"\n".join(lines) + b"\n")
    with opened(*place, restore=False) as fleet:
        assert fleet.restore() == ["prod pointed to home@2; it now points to home@1"]


def test_a_folder_outside_of_the_registry_comes_back_and_inside_it_the_registry_may_move(place, tmp_path):
    base, root, state = place
    with opened(*place) as fleet:
        fleet.load(str(adapter(tmp_path / "casa", 30)), allow_outside=True)
        fleet.load("home@1")
    sources = [json.loads(line)["version"]["source"] for line in state.read_text().splitlines()]
    assert sources == [str(tmp_path / "casa"), "home/1"]
    moved = root.rename(tmp_path / "moved")
    with opened(base, moved, state, restore=False) as fleet:
        assert fleet.restore() == []
        assert len(fleet.versions()) == 2


def test_a_journal_cannot_lead_out_of_the_registry_by_dots(place, tmp_path):
    _, _, state = place
    adapter(tmp_path / "casa", 30)
    with opened(*place) as fleet:
        fleet.load("home@1")
    state.write_text(state.read_text().replace('"home/1"', '"../casa"'))
    with opened(*place, restore=False) as fleet:
        assert "only adapters inside the registry" in fleet.restore()[0]


def test_one_server_holds_a_state_file(place):
    with opened(*place), pytest.raises(ConflictError, match="another server"), opened(*place):
        pass


def test_probes_are_asked_again_after_a_start(tiny_bases, tmp_path):
    folder, root = tiny_bases("llama"), tmp_path / "r"
    root.mkdir()
    registry.add(with_passport(adapter(tmp_path / "a", 1), folder), "home", root=root)
    with opened(served(folder), root) as fleet:
        assert fleet.load("home").verdict == "equal"
        key = fleet.versions()[0].key
    with opened(served(folder), root, restore=False) as fleet:
        fleet.engine.deaf = {key}
        assert len(fleet.restore()) == 2
        assert fleet.engine.keys() == set()


def test_swapping_back_and_forth_many_times_leaves_nothing_behind(place):
    with opened(*place, max_adapters=3) as fleet:
        threads = threading.active_count()
        for n in range(60):
            fleet.load(f"home@{n % 3 + 1}")
        assert fleet.engine.facts().n_adapters == 3
        assert len(fleet.engine.loads) == 3
        assert threading.active_count() == threads
        assert fleet.swaps() == 59
