"""kill -9 at every write, rename and sync of a run, and disks that fail there: what goes on is the run that nothing stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter

import pytest

from lora_tune.adapter import registry
from lora_tune.training.checkpoints import verify
from tests.killed_run import DEEDS, Children
from tests.resuming import figures_of_report, logged
from tests.tiny import write_recipe

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
N_POINTS = 20
"""Kills of the default suite; the slow one makes them all."""
N_FAILURES = 20


@pytest.fixture(scope="module")
def children():
    with Children() as server:
        yield server


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_bases, children):
    """A recipe of four steps, and its run that nothing stopped, with the count of its deeds in the log beside it."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(
        folder, tiny_bases(), rows=8, held_out=2, data={"max_seq_tokens": 128},
        train={"max_steps": 4, "micro_batch_sequences": 2, "save_every_steps": 1, "keep_checkpoints": 2},
        eval={"every_steps": 2, "early_stopping_patience": 3},
    )  # fmt: skip
    try:
        code = children.traced(argv(recipe, folder), folder, "-o", folder / "deeds", "-e", f"trace={DEEDS}")
    except PermissionError as err:
        pytest.skip(f"strace may not attach: {err}")
    assert code == 0, (folder / "log").read_text()
    return recipe


def argv(recipe, folder, *words):
    return ["train", recipe, "--run-dir", folder / "run", "--registry", folder / "adapters", *words]


def deeds(recipe):
    """Return the system calls of the straight run's main thread in their order, each with how many of its kind it makes.

    strace counts each kind for itself.
    """
    lines = (recipe.parent / "deeds").read_text().splitlines()
    ours, counts, found = lines[0].split()[0], Counter(), []
    for line in lines:
        if line.split()[0] == ours and (match := re.match(r"\d+ +(\w+)\(", line)):
            counts[match[1]] += 1
            found.append((match[1], counts[match[1]]))
    assert {"write", "rename", "fsync", "mkdir"} <= set(counts)
    return found


def same_result(recipe, folder):
    ours, theirs = folder / "run", recipe.parent / "run"
    weights = "adapter/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert figures_of_report(ours) == figures_of_report(theirs)
    assert logged(ours) == logged(theirs)
    assert [listed.version.spec for listed in registry.listing(folder / "adapters")] == ["tiny@1"]
    assert not [path for path in ours.rglob(".*") if path.name != ".gitignore"], "nothing half-written is left"


def killed_and_resumed(children, recipe, folder, deed):
    """Kill a run at one deed, resume and compare; return whether it was killed: runs differ by a deed or two in length."""
    folder.mkdir()
    inject = ("-o", "/dev/null", "-e", f"trace={DEEDS}", "-e", f"inject={deed[0]}:signal=KILL:when={deed[1]}")
    code = children.traced(argv(recipe, folder), folder, *inject)
    assert code in {0, -signal.SIGKILL}, (folder / "log").read_text()
    for path in folder.glob("run/checkpoints/step-*"):
        assert verify(path, run_id(folder))
    assert children.run(argv(recipe, folder, "--resume"), folder) == 0, (folder / "log").read_text()
    same_result(recipe, folder)
    shutil.rmtree(folder)
    return code != 0


def run_id(folder):
    return json.loads((folder / "run" / "run.json").read_text())["run_id"]


def test_killed_at_points_all_over_it_goes_on_to_the_bit(children, straight, tmp_path):
    found = deeds(straight)[:-5]
    points = [found[number * (len(found) - 1) // (N_POINTS - 1)] for number in range(N_POINTS)]
    assert len(set(points)) == N_POINTS
    assert all(killed_and_resumed(children, straight, tmp_path / "killed", point) for point in points)


@pytest.mark.slow
def test_killed_at_every_write_rename_and_sync_it_goes_on_to_the_bit(children, straight, tmp_path):
    found = deeds(straight)
    killed = sum(killed_and_resumed(children, straight, tmp_path / "killed", point) for point in found)
    assert killed >= len(found) - 5
    print(f"{killed} of {killed} kills resumed to the bit")


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_leaves_the_last_good_checkpoint_and_goes_on_once_it_is_well(
    children, straight, tmp_path, error
):
    found = deeds(straight)
    first = next(number for number, (kind, _) in enumerate(found) if kind == "fsync")
    codes = []
    for number in range(N_FAILURES):
        at = first + number * (len(found) - first) // N_FAILURES
        begun, folder = Counter(kind for kind, _ in found[:at]), tmp_path / str(at)
        folder.mkdir()
        # From this deed on nothing can be made, synced or renamed any more; writes stay, or nothing could be told either.
        words = [
            f"inject={kind}:error={error}:when={begun[kind] + 1}+" for kind in ("fsync", "rename", "renameat", "mkdir")
        ]
        inject = ["-o", "/dev/null", "-e", f"trace={DEEDS}", *(word for inject in words for word in ("-e", inject))]
        codes.append(children.traced(argv(straight, folder), folder, *inject))
        went_on(children, straight, folder)
    assert set(codes) <= {0, 74}, codes
    assert codes.count(0) <= 1
    print(f"{error}: {len(codes)} of {len(codes)} went on, after exit codes {dict(Counter(codes))}")


def went_on(children, recipe, folder):
    """Check that what is kept verifies, and that the run goes on from it to the bit."""
    for path in folder.glob("run/checkpoints/step-*"):
        assert verify(path, run_id(folder))
    assert children.run(argv(recipe, folder, "--resume"), folder) == 0, (folder / "log").read_text()
    same_result(recipe, folder)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint_and_goes_on_once_there_is_room(children, straight, tmp_path):
    folder, codes = tmp_path / "small", []
    (folder / "run").mkdir(parents=True)
    for number in range(N_FAILURES):
        size = f"size={100 + number * 40}k"
        if (
            os.geteuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder / "run"], check=False).returncode
        ):
            pytest.skip("only root can mount a small disk")
        try:
            codes.append(children.run(argv(straight, folder), folder))
            subprocess.run(["mount", "-o", "remount,size=64m", folder / "run"], check=True)
            went_on(children, straight, folder)
        finally:
            subprocess.run(["umount", folder / "run"], check=True)
            shutil.rmtree(folder / "adapters", ignore_errors=True)
    assert set(codes) == {74}, codes
    print(f"full disk: {len(codes)} of {len(codes)} went on, after exit code 74")
