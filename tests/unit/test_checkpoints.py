"""Checkpoints on disk: whole or not there, verified to the last bit, ordered by step, and never another run's."""

import errno
import json
import os
import random
import shutil

import pytest

from lora_tune.errors import CannotWriteError, TrainingError
from lora_tune.training import checkpoints
from lora_tune.training.checkpoints import (
    CheckpointError,
    clear_unfinished,
    newest_verified,
    retire,
    set_aside,
    steps_on_disk,
    verify,
    write_checkpoint,
)

RUN = "a" * 32
FILES = {"adapter.safetensors": b"\x00weights\xff" * 40, "state.json": b'{"step": 1}', "empty.safetensors": b""}
N_DAMAGES = 200


def write(root, step, run_id=RUN, files=None):
    def fill(stage):
        for name, content in (files or FILES).items():
            (stage / name).write_bytes(content)

    return write_checkpoint(root, step, run_id, fill, needs_bytes=1000)


def damage(folder, rng):
    """Flip a bit, cut, lengthen or delete a file of a checkpoint; return what was done."""
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    deed = rng.choice(["flip", "cut", "lengthen", "delete"] if content else ["lengthen", "delete"])
    if deed == "flip":
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    elif deed == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif deed == "lengthen":
        path.write_bytes(content + b"\n")
    else:
        path.unlink()
    return f"{deed} {path.name}"


def test_every_damage_is_seen_and_the_checkpoint_before_is_taken(tmp_path):
    write(tmp_path / "sound", 4)
    write(tmp_path / "sound", 6)
    rng = random.Random(6)
    deeds = set()
    for number in range(N_DAMAGES):
        root = shutil.copytree(tmp_path / "sound", tmp_path / str(number))
        deeds.add(deed := damage(root / "step-000006", rng))
        found, passed = newest_verified(root, RUN)
        assert found is not None and found.step == 4, deed
        assert [(item.step, bool(item.why)) for item in passed] == [(6, True)], deed
    assert len(deeds) == 4 * 3 + 2, "each deed on each file"


def test_every_bit_of_a_manifest_counts(tmp_path):
    folder = write(tmp_path, 2)
    sound = (folder / "manifest.json").read_bytes()
    for at in range(len(sound)):
        (folder / "manifest.json").write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(CheckpointError):
            verify(folder, RUN)
    (folder / "manifest.json").write_bytes(sound)
    assert verify(folder, RUN).step == 2


def test_where_none_verifies_the_run_does_not_begin_anew_in_silence(tmp_path):
    for step in (2, 4):
        (write(tmp_path, step) / "state.json").unlink()
    with pytest.raises(TrainingError, match=r"none of the 2 checkpoints.*step-000004: state.json cannot be read"):
        newest_verified(tmp_path, RUN)
    assert newest_verified(tmp_path / "nothing", RUN) == (None, [])


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_a_file_that_is_none_is_damage(tmp_path, what):
    path = write(tmp_path, 2) / "state.json"
    path.rename(tmp_path / "elsewhere")
    {"link": lambda: path.symlink_to(tmp_path / "elsewhere"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[
        what
    ]()
    with pytest.raises(CheckpointError):
        verify(tmp_path / "step-000002", RUN)


def test_a_checkpoint_renamed_to_another_step_is_refused(tmp_path):
    write(tmp_path, 2).rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointError, match="that of step 2"):
        verify(tmp_path / "step-000009", RUN)


def test_another_runs_checkpoints_are_neither_taken_nor_removed(tmp_path):
    write(tmp_path, 30, run_id="b" * 32)
    for step in (2, 4, 6):
        write(tmp_path, step)
    found, passed = newest_verified(tmp_path, RUN)
    assert found.step == 6
    assert [(item.step, item.why) for item in passed] == [(30, "it belongs to another run")]
    retire(tmp_path, RUN, keep=1)
    assert steps_on_disk(tmp_path) == [6, 30]


def test_retirement_goes_by_step_and_never_by_clock(tmp_path):
    for step in range(1, 7):
        folder = write(tmp_path, step)
        os.utime(folder, (2e9 - step * 1e8, 2e9 - step * 1e8))  # the newest looks the oldest
        retire(tmp_path, RUN, keep=2, keep_steps=frozenset({2}))
    assert steps_on_disk(tmp_path) == [2, 5, 6]


def test_what_cannot_be_gone_on_from_is_set_aside_and_its_step_can_be_written_again(tmp_path):
    for again in range(3):
        (write(tmp_path, 4) / "state.json").write_bytes(b"{}")
        write(tmp_path, 2) if not again else None
        found, passed = newest_verified(tmp_path, RUN)
        assert found.step == 2
        set_aside(passed)
    assert steps_on_disk(tmp_path) == [2]
    assert len(list(tmp_path.glob("step-000004.damaged-*"))) == 3


def test_what_a_killed_writer_left_is_cleared_and_nothing_else(tmp_path):
    write(tmp_path, 2)
    (tmp_path / ".step-000004-abc").mkdir()
    (tmp_path / ".step-000004-abc" / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("mine")
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "step-000002"]
    clear_unfinished(tmp_path / "nothing")


def failing(times, code):
    left = [times]

    def fill(stage):
        (stage / "adapter.safetensors").write_bytes(b"begun")
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))

    return fill


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_once_is_tried_again(tmp_path, code):
    write_checkpoint(tmp_path / "c", 2, RUN, failing(1, code), needs_bytes=10)
    assert verify(tmp_path / "c" / "step-000002", RUN).step == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_twice_ends_it_with_what_is_needed_and_free_and_the_last_good_one_stands(tmp_path, code):
    write(tmp_path / "c", 1)
    with pytest.raises(
        CannotWriteError, match=r"needs about .* MiB, .* MiB are free; the last good one is that of step 1"
    ):
        write_checkpoint(tmp_path / "c", 2, RUN, failing(2, code), needs_bytes=10)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000001"]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    with pytest.raises(CannotWriteError, match=r"no room for three checkpoints .* it needs 1125899906842624.0 MiB"):
        checkpoints.check_space(tmp_path / "not" / "there", 2**70, what="three checkpoints")
    assert not list(tmp_path.iterdir())


def test_a_manifest_names_size_and_digest_of_every_file(tmp_path):
    values = json.loads((write(tmp_path, 7) / "manifest.json").read_text())
    assert {name: size for name, (size, _) in values["files"].items()} == {
        name: len(text) for name, text in FILES.items()
    }
    assert (values["step"], values["run_id"]) == (7, RUN)
