"""Signals at any moment, two runs for one folder, memory that runs out, and a network that is not there: real processes."""

import random
import signal
import time

import pytest

from tests.killed_run import Children
from tests.resuming import figures_of_report, logged
from tests.tiny import write_recipe

pytestmark = pytest.mark.slow
N_SIGNALS = 50


@pytest.fixture(scope="module")
def children():
    with Children() as server:
        yield server


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_bases, children):
    """A recipe, its run that nothing stopped, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("signals")
    recipe = write_recipe(
        folder, tiny_bases(), rows=40, held_out=6, train={"max_steps": 12, "micro_batch_sequences": 2, "save_every_steps": 5},
        eval={"every_steps": 2, "early_stopping_patience": 6, "generate": 4},
    )  # fmt: skip
    started = time.monotonic()
    assert children.run(argv(recipe, folder), folder) == 0, (folder / "log").read_text()
    return recipe, time.monotonic() - started


def argv(recipe, folder, *words):
    return ["train", recipe, "--run-dir", folder / "run", "--registry", folder / "adapters", *words]


def test_a_signal_at_any_moment_leaves_a_run_that_goes_on_to_the_bit(children, straight, tmp_path):
    (recipe, seconds), rng = straight, random.Random(50)
    stopped = []
    for number in range(N_SIGNALS):
        folder = tmp_path / str(number)
        folder.mkdir()
        kind = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        began = time.monotonic()
        while True:
            pid = children.begin(argv(recipe, folder, "--resume"), folder)
            children.until_it_listens(pid)
            time.sleep(rng.random() * seconds if time.monotonic() - began < 60 else 4 * seconds)
            children.signal(pid, kind)
            code = children.end()
            assert code in {0, 75}, (folder / "log").read_text()
            if code == 0:
                break
            stopped.append(kind)
        weights = "run/adapter/adapter_model.safetensors"
        assert (folder / weights).read_bytes() == (recipe.parent / weights).read_bytes()
        assert figures_of_report(folder / "run") == figures_of_report(recipe.parent / "run")
        assert logged(folder / "run") == logged(recipe.parent / "run")
    assert len(stopped) >= N_SIGNALS
    print(f"{N_SIGNALS} of {N_SIGNALS} runs equal, stopped {len(stopped)} times")


def test_a_second_ctrl_c_ends_it_now_and_the_checkpoint_before_it_stands(children, straight, tmp_path):
    (recipe, seconds), rng, codes = straight, random.Random(2), []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid = children.begin(argv(recipe, folder), folder)
        children.until_it_listens(pid)
        time.sleep(rng.random() * seconds / 2)
        children.signal(pid, signal.SIGINT)
        time.sleep(0.001)
        children.signal(pid, signal.SIGINT)
        codes.append(children.end())
        assert children.run(argv(recipe, folder, "--resume"), folder) == 0, (folder / "log").read_text()
        assert logged(folder / "run") == logged(recipe.parent / "run")
    assert set(codes) <= {75, 130}, codes
    assert 130 in codes
