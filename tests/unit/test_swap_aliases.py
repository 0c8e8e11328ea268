"""What names and aliases mean: targets, splits, shadows, the way back, and what cannot be meant."""

import pytest

from lora_tune.errors import (
    ConflictError,
    MissingInputError,
    RequestError,
)
from lora_tune.serving.deployed import chosen
from tests.unit import test_swap
from tests.unit.test_swap import model_of, refused

stock = test_swap.stock
fleet = test_swap.fleet


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


def test_swaps_are_counted(fleet):
    fleet.load("home@1")
    assert fleet.swaps() == 0
    fleet.load("home@2")
    fleet.rollback("home")
    fleet.load("home@1")
    fleet.point("home", shadow="home@2")
    assert fleet.swaps() == 2
