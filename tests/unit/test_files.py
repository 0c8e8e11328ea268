"""Folders that appear whole or not at all, run folders that are never shared, the registry."""

import errno
import json
import os

import pytest

from lora_tune.errors import CannotCreateError, CannotWriteError
from lora_tune.run_dir import create_run_dir
from lora_tune.staging import staged_folder, write_file


def test_a_staged_folder_appears_whole(tmp_path):
    with staged_folder(tmp_path / "a" / "b") as stage:
        (stage / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "b") as stage:
        (stage / "x").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, CannotWriteError), (errno.EIO, CannotWriteError), (errno.EROFS, CannotCreateError)],
)
def test_a_failing_disk_is_told_and_leaves_nothing(tmp_path, number, kind):
    with pytest.raises(kind), staged_folder(tmp_path / "b"):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(CannotCreateError, match="never overwritten"), staged_folder(tmp_path / "b"):
        pass


def test_a_file_is_replaced_in_one_step(tmp_path):
    write_file(tmp_path / "x", "1")
    write_file(tmp_path / "x", "2")
    assert (tmp_path / "x").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_runs_get_folders_of_their_own(tmp_path):
    folders = {create_run_dir("a", root=tmp_path).path for _ in range(3)}
    assert len(folders) == 3


def test_runs_that_race_for_a_name_get_the_next_one(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("lora_tune.run_dir.time.strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: create_run_dir("a", root=tmp_path).path.name, range(16)))
    assert sorted(paths) == sorted(["a-20260101-000000", *(f"a-20260101-000000-{n}" for n in range(2, 17))])


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCreateError):
        create_run_dir("a", root=tmp_path / "file")


def test_a_run_never_writes_into_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CannotCreateError, match="not empty"):
        create_run_dir("a", path=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCreateError):
        create_run_dir("a", path=tmp_path / "file" / "run")


def test_run_files_hold_no_nan(tmp_path):
    run = create_run_dir("a", root=tmp_path)
    with pytest.raises(ValueError, match="Out of range"):
        run.write_json("x.json", {"loss": float("nan")})
    assert not (run.path / "x.json").exists()
    run.write_json("x.json", {"loss": 1.0})
    assert json.loads((run.path / "x.json").read_text()) == {"loss": 1.0}


def test_a_disk_error_that_a_library_tells_in_its_own_words_is_a_disk_error(tmp_path):
    class SafetensorError(Exception):
        pass

    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(CannotWriteError, match="No space left on device"), staged_folder(tmp_path / "a"):
        raise SafetensorError(told)
    with pytest.raises(SafetensorError, match="header"), staged_folder(tmp_path / "a"):
        raise SafetensorError("header too long")
    assert not list(tmp_path.iterdir())
