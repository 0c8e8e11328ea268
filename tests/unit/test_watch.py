"""Following an alias of the registry: what is promoted there is served here, and what fails changes nothing."""

import logging
import time

import pytest

from lora_tune.adapter import registry
from lora_tune.errors import BusyError
from lora_tune.serving.watch import Watch
from tests.fleets import bare_base, fill_registry, opened
from tests.unit.test_swap_restore import change


@pytest.fixture
def place(tmp_path):
    """Return a fleet's base and registry, where prod is home@1."""
    root = tmp_path / "r"
    fill_registry(root, tmp_path / "w", {"home": 3})
    registry.promote("home@1", "prod", root=root)
    return bare_base(tmp_path / "base"), root


@pytest.fixture
def fleet(place):
    with opened(*place) as found:
        yield found


def served(fleet, name="prod"):
    lease = fleet.lease(name, draw=0.0)
    lease.release()
    return lease.model


def test_every_move_of_the_alias_is_followed_and_its_name_is_left_alone(fleet):
    root = fleet.registry
    watch = Watch(fleet, "prod", registry=root)
    watch.look()
    assert served(fleet) == "home@1"
    assert "home" not in fleet.pointers()
    for act, expected in ((lambda: registry.promote("home@3", "prod", root=root), "home@3"), (lambda: registry.rollback("prod", root=root), "home@1")):  # fmt: skip
        act()
        watch.look()
        assert (served(fleet), watch.problem) == (expected, "")


def test_without_a_change_nothing_is_read_and_an_operators_choice_stands(fleet):
    watch = Watch(fleet, "prod", registry=fleet.registry)
    watch.look()
    fleet.load("home@2", point=False)
    fleet.point("prod", target="home@2")
    watch.look()
    registry.promote("home@3", "beta", root=fleet.registry)
    watch.look()
    assert served(fleet) == "home@2"


def test_a_damaged_version_is_logged_once_and_the_old_one_goes_on(fleet, caplog):
    root = fleet.registry
    watch = Watch(fleet, "prod", registry=root)
    watch.look()
    registry.promote("home@2", "prod", root=root)
    change(root / "home" / "2")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            watch.look()
            registry.promote("home@1", "other", root=root)
    assert served(fleet) == "home@1"
    assert "home/2" in watch.problem
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    registry.promote("home@3", "prod", root=root)
    watch.look()
    assert (served(fleet), watch.problem) == ("home@3", "")


def test_for_want_of_room_it_is_tried_again_at_every_look(fleet):
    watch = Watch(fleet, "prod", registry=fleet.registry)
    for _ in range(2):
        fleet.engine.load_error = BusyError("every place is taken")
        watch.look()
        assert watch.problem
    watch.look()
    assert served(fleet) == "home@1"


def test_an_alias_that_is_not_there_yet_is_followed_once_it_is(fleet, caplog):
    watch = Watch(fleet, "beta", registry=fleet.registry)
    watch.look()
    assert "beta" in watch.problem
    registry.promote("home@2", "beta", root=fleet.registry)
    watch.look()
    assert served(fleet, "beta") == "home@2"


def test_an_alias_that_was_removed_leaves_its_last_version_served(fleet):
    watch = Watch(fleet, "prod", registry=fleet.registry)
    watch.look()
    registry.remove("prod", root=fleet.registry)
    watch.look()
    assert watch.problem
    assert served(fleet) == "home@1"


def test_a_name_that_something_else_bears_is_a_problem_not_a_theft(fleet):
    fleet.load("home@3", name="prod")
    watch = Watch(fleet, "prod", registry=fleet.registry)
    watch.look()
    assert "prod" in watch.problem
    assert served(fleet).startswith("prod@sha256:")


def test_the_thread_follows_and_outlives_a_defect(fleet, caplog):
    watch = Watch(fleet, "prod", registry=fleet.registry, every_seconds=0.01)
    fleet.engine.load_error = RuntimeError("a defect")
    watch.start()
    until = time.monotonic() + 10
    while "prod" not in fleet.pointers() and time.monotonic() < until:
        time.sleep(0.01)
    watch.stop()
    assert served(fleet) == "home@1"
    registry.promote("home@2", "prod", root=fleet.registry)
    time.sleep(0.05)
    assert served(fleet) == "home@1"


def test_stopping_waits_for_no_load_and_what_it_loads_is_not_written_any_more(fleet, monkeypatch):
    monkeypatch.setattr("lora_tune.serving.watch._STOP_SECONDS", 0.01)
    fleet.engine.load_seconds = 1.0
    watch = Watch(fleet, "prod", registry=fleet.registry)
    watch.start()
    until = time.monotonic() + 10
    while not fleet.engine._loading and time.monotonic() < until:
        time.sleep(0.01)
    watch.stop()
    assert watch._thread.is_alive()
    before = fleet._journal.path.read_bytes()
    fleet.close()
    watch._thread.join(10)
    assert (fleet.versions(), fleet._journal.path.read_bytes()) == ([], before)
