"""A run's folder: made once, locked, probed before anything slow, found again."""

import os
import subprocess
from multiprocessing import get_context

import pytest

from lora_tune import run_dir
from lora_tune.cli.app import run
from lora_tune.errors import CannotCreateError, CannotWriteError, LoraTuneError, MissingInputError
from lora_tune.run_dir import check_place, create_run_dir, newest_unfinished, open_run_dir
from tests.tiny import write_recipe

N_RACES = 50


def _race(folders, barrier, wins, opens):
    for folder in folders:
        barrier.wait()
        try:
            run = opens(folder)
        except CannotCreateError:
            won = 0
        except Exception as err:  # the other one is not to wait for ever
            barrier.abort()
            wins.put((str(folder), repr(err)))
            raise
        else:
            won = 1
        barrier.wait()  # the winner holds it until both have tried
        if won:
            run.close()
        wins.put((str(folder), won))


@pytest.mark.parametrize("opens", ["create", "open"])
def test_of_two_processes_that_race_for_a_folder_exactly_one_starts(tmp_path, opens):
    context = get_context("fork")
    folders = [tmp_path / str(number) for number in range(N_RACES)]
    if opens == "open":
        for folder in folders:
            folder.mkdir()
            (folder / "run.json").write_text("{}")
    barrier, wins = context.Barrier(2, timeout=30), context.SimpleQueue()
    act = open_run_dir if opens == "open" else lambda folder: create_run_dir("a", path=folder)
    racers = [context.Process(target=_race, args=(folders, barrier, wins, act)) for _ in range(2)]
    for racer in racers:
        racer.start()
    found = []
    while len(found) < 2 * N_RACES:
        found.append(wins.get())
        assert found[-1][1] in {0, 1}, found[-1]
    for racer in racers:
        racer.join()
    for folder in folders:
        assert sum(won for place, won in found if place == str(folder)) == 1, folder


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that is mounted read-only."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=False, capture_output=True).returncode:  # fmt: skip
        pytest.skip("only root can mount a read-only file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_place_ends_the_run_before_anything_is_loaded(read_only, tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases())
    assert run(["train", str(recipe), "--run-dir", str(read_only / "run"), "--registry", str(tmp_path / "a")]) == 74
    assert "reading and tokenizing" not in capsys.readouterr().err


def test_a_read_only_place_is_seen_at_the_start(read_only):
    for act in (lambda: check_place(read_only / "run"), lambda: check_place(None, root=read_only / "runs"),
                lambda: check_place(read_only), lambda: create_run_dir("a", path=read_only)):  # fmt: skip
        with pytest.raises(CannotWriteError, match=r"nothing can be written into .*read-only"):
            act()


def test_looking_at_a_place_leaves_nothing_behind(tmp_path):
    check_place(tmp_path / "not" / "yet" / "there")
    check_place(None, root=tmp_path / "runs")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotCreateError, match="a file stands in its way"):
        check_place(tmp_path / "file" / "run")
    with pytest.raises(CannotCreateError, match="not empty"):
        check_place(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_run_was_writing_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for name in (".probe-x", ".recipe.yaml-12", ".run.json-12", ".keep"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".adapter-abc").mkdir()
    open_run_dir(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", "run.json", "run.lock"]


def test_the_newest_unfinished_run_is_found_by_its_name_and_not_by_clocks(tmp_path):
    names = (
        "a-20260102-000000",
        "a-20260102-000000-2",
        "a-20260102-000000-10",
        "a-20260101-235959",
        "a-b-20270101-000000",
    )
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        os.utime(tmp_path / name, (1e9 - number, 1e9 - number))
    assert newest_unfinished("a", root=tmp_path).name == "a-20260102-000000-10"
    (tmp_path / "a-20260102-000000-10" / "report.json").write_text("{}")
    assert newest_unfinished("a", root=tmp_path).name == "a-20260102-000000-2"
    assert newest_unfinished("a-b", root=tmp_path).name == "a-b-20270101-000000"
    with pytest.raises(MissingInputError, match="no unfinished run of c"):
        newest_unfinished("c", root=tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_facts_that_cannot_be_read_are_told(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    opened = open_run_dir(tmp_path)
    try:
        assert opened.facts() == {}
    except LoraTuneError as err:
        assert "cannot be read" in str(err)
    finally:
        opened.close()
    assert run_dir.FACTS == "run.json"
