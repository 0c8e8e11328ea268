"""`train --resume`: stopped by signals, killed between export and report, on the wrong recipe, in the wrong folder."""

import json
import os
import shlex
import shutil
import signal
from contextlib import contextmanager

import pytest

from lora_tune.adapter import registry
from lora_tune.cli import recipe_verbs
from lora_tune.cli.app import run
from tests.resuming import figures_of_report, logged
from tests.tiny import write_recipe

STEPS = 6


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_bases):
    """A recipe, and its run that nothing stopped."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = write_recipe(
        folder,
        tiny_bases(),
        rows=24,
        train={"max_steps": STEPS, "save_every_steps": 2, "keep_checkpoints": 3},
        eval={"every_steps": 3, "generate": 2},
    )
    assert train(recipe, folder / "run", folder / "adapters") == 0
    return recipe


def train(recipe, run_dir, adapters, *words):
    return run(["train", str(recipe), "--run-dir", str(run_dir), "--registry", str(adapters), *words])


@contextmanager
def signalled_after_step(step, metrics, number):
    """Send this process a signal soon after a step is logged: its own working time is the clock, however busy the machine."""

    def look(*_):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def same_result(recipe, folder):
    """Check that a resumed run left what the straight one left."""
    ours, theirs = folder / "run", recipe.parent / "run"
    assert (ours / "adapter" / "adapter_model.safetensors").read_bytes() == (theirs / "adapter" / "adapter_model.safetensors").read_bytes()  # fmt: skip
    assert figures_of_report(ours) == figures_of_report(theirs)
    assert logged(ours) == logged(theirs)
    assert [listed.version.spec for listed in registry.listing(folder / "adapters")] == ["tiny@1"]


@pytest.fixture
def hangup():
    """Return a function that sets what happens at SIGHUP; afterwards it is as before (nohup has it ignored)."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_ends_nothing(straight, tmp_path, hangup):
    hangup(signal.SIG_IGN)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with signalled_after_step(2, metrics, signal.SIGHUP):
        assert train(straight, tmp_path / "run", tmp_path / "adapters") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_names_the_command_that_goes_on(straight, tmp_path, capsys, hangup, number):
    hangup(signal.SIG_DFL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with signalled_after_step(2, metrics, number):
        assert train(straight, tmp_path / "run", tmp_path / "adapters") == 75
    told = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step" in told
    command = next(line for line in told.splitlines() if "go on with: " in line).split("go on with: ")[1]
    assert not (tmp_path / "run" / "adapter").exists()
    assert run(shlex.split(command)[1:]) == 0
    same_result(straight, tmp_path)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_killed_after_every_file_of_the_end_it_comes_to_the_same_result(straight, tmp_path):
    # What a kill leaves: everything up to some file of the end, in the order in which they appear.
    for removed in (["report.json"], ["report.json", "adapter"]):
        folder = tmp_path / str(len(removed))
        shutil.copytree(straight.parent / "run", folder / "run")
        if "adapter" not in removed:
            shutil.copytree(straight.parent / "adapters", folder / "adapters")
        for name in removed:
            path = folder / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert train(straight, folder / "run", folder / "adapters", "--resume") == 0
        same_result(straight, folder)


def test_resume_where_nothing_was_begun_begins(straight, tmp_path, capsys):
    assert train(straight, tmp_path / "run", tmp_path / "adapters", "--resume") == 0
    assert "starts from its beginning" in capsys.readouterr().err
    same_result(straight, tmp_path)


def stopped_run(recipe, folder):
    """Copy the straight run as if it had been killed after step 4."""
    shutil.copytree(recipe.parent / "run", folder / "run")
    for name in ("report.json", "adapter", f"checkpoints/step-{STEPS:06d}"):
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "run"


@pytest.mark.parametrize(("setting", "told"), [
    ("train.learning_rate=5e-3", "train.learning_rate was 0.01, is 0.005"),
    ("lora.alpha=9", "lora.alpha was 8.0, is 9.0"),
    ("train.seed=1", "train.seed was 0, is 1"),
    ("data.path=held.jsonl", "digest.rows was"),
])  # fmt: skip
def test_a_changed_recipe_is_refused_by_field(straight, tmp_path, capsys, setting, told):
    folder = stopped_run(straight, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(straight, folder, tmp_path / "adapters", "--resume", "--set", setting) == 77
    assert told in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_allowed_change_goes_on_is_told_and_is_written_down(straight, tmp_path, capsys):
    folder = stopped_run(straight, tmp_path)
    words = ("--resume", "--set", "train.max_steps=9", "--set", "train.learning_rate=0.002")
    assert train(straight, folder, tmp_path / "adapters", *words, "--allow-drift", "train.max_steps") == 77
    assert "--allow-drift train.learning_rate" in capsys.readouterr().err
    allowed = ("--allow-drift", "train.max_steps", "--allow-drift", "train.learning_rate")
    assert train(straight, folder, tmp_path / "adapters", *words, *allowed) == 0
    assert "train.max_steps was 6, is 9 from step 4 on" in capsys.readouterr().err
    steps = [line for line in logged(folder) if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert 0 < steps[4]["learning_rate"] <= 0.002 < steps[3]["learning_rate"]
    assert steps[-1]["learning_rate"] < steps[-2]["learning_rate"]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["resumed"] == [
        {"step": 4, "changed": {"train.max_steps": [6, 9], "train.learning_rate": [0.01, 0.002]}}
    ]
    assert (folder / "recipe.until-step-000004.yaml").exists()


@pytest.mark.parametrize(("settings", "told"), [
    (["train.max_steps=3"], "the run has 3 steps by now, and its checkpoint is of step 4"),
    (["train.max_steps=null", "train.epochs=0.3"], "raise train.epochs until there are 4 steps"),
])  # fmt: skip
def test_a_run_cannot_be_made_shorter_than_its_checkpoint(straight, tmp_path, capsys, settings, told):
    folder = stopped_run(straight, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [word for setting in settings for word in ("--set", setting, "--allow-drift", setting.split("=")[0])]
    assert train(straight, folder, tmp_path / "adapters", "--resume", *words) == 2
    assert told in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("words", "told", "code"), [
    (["--resume", "--allow-drift", "train.epoch"], "there is no such field", 2),
    (["--resume", "--allow-drift", "train.seed"], "cannot go on with that changed", 2),
    (["--allow-drift", "train.epochs"], "add --resume", 2),
])  # fmt: skip
def test_drift_that_cannot_be_meant_is_refused(straight, tmp_path, capsys, words, told, code):
    folder = stopped_run(straight, tmp_path)
    assert train(straight, folder, tmp_path / "adapters", *words) == code
    assert told in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_said_and_kept_aside(straight, tmp_path, capsys):
    folder = stopped_run(straight, tmp_path)
    path = folder / "checkpoints" / "step-000004" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert train(straight, folder, tmp_path / "adapters", "--resume") == 0
    told = capsys.readouterr().err
    assert "passed over the checkpoint of step 4: optimizer.safetensors is not what was written" in told
    assert "going on from step 3" in told
    assert (folder / "checkpoints" / "step-000004.damaged-1" / "optimizer.safetensors").read_bytes() == bytes(content)
    same_result(straight, tmp_path)


def test_where_every_checkpoint_is_damaged_it_stops_and_touches_nothing(straight, tmp_path, capsys):
    folder = stopped_run(straight, tmp_path)
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(straight, folder, tmp_path / "adapters", "--resume") == 65
    assert "can be gone on from: step-000004: state.json is not what was written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", [None, b"", b"\xff\xfe\x00nonsense\n", b'{"event": "step", "step": 1}\n{"event": '])
def test_a_log_that_was_damaged_is_said_so_and_keeps_its_good_lines(straight, tmp_path, capsys, left):
    folder = stopped_run(straight, tmp_path)
    path = folder / "metrics.jsonl"
    path.unlink() if left is None else path.write_bytes(left)
    assert train(straight, folder, tmp_path / "adapters", "--resume") == 0
    kept = 1 if left and b'"step": 1' in left else 0
    assert f"was damaged or cut short: {kept} of its lines up to step 4 are left" in capsys.readouterr().err
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1] * kept + [5, 6]
    assert figures_of_report(folder) == figures_of_report(straight.parent / "run")


@pytest.mark.parametrize(("name", "code", "told"), [
    ("checkpoints", 74, "Not a directory"),
    ("metrics.jsonl", 73, "Is a directory"),
    ("run.json", 66, "nothing tells whose checkpoints these are"),
])  # fmt: skip
def test_a_part_of_a_run_that_is_no_longer_what_it_was_stops_it_without_a_bug_report(
    straight, tmp_path, capsys, name, code, told
):
    folder = stopped_run(straight, tmp_path)
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "checkpoints":
        path.write_text("")
    elif name == "metrics.jsonl":
        path.mkdir()
    assert train(straight, folder, tmp_path / "adapters", "--resume") == code
    err = capsys.readouterr().err
    assert told in err and str(path) in err and "bug" not in err


def test_a_run_whose_resolved_recipe_is_gone_takes_an_allowed_change(straight, tmp_path):
    folder = stopped_run(straight, tmp_path)
    (folder / "recipe.resolved.yaml").unlink()
    words = ("--resume", "--set", "train.max_steps=7", "--allow-drift", "train.max_steps")
    assert train(straight, folder, tmp_path / "adapters", *words) == 0
    assert "max_steps: 7" in (folder / "recipe.resolved.yaml").read_text()


def test_a_finished_run_is_told_and_left_as_it_is(straight, capsys):
    report = json.loads((straight.parent / "run" / "report.json").read_text())
    capsys.readouterr()
    assert train(straight, straight.parent / "run", straight.parent / "adapters", "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "done", **report}
    changed = ("--resume", "--set", "train.max_steps=9", "--allow-drift", "train.max_steps")
    assert train(straight, straight.parent / "run", straight.parent / "adapters", *changed) == 2
    assert "is finished, and its recipe was another" in capsys.readouterr().err


def test_places_that_are_no_runs_are_refused(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("mine")
    assert train(straight, foreign, tmp_path / "adapters", "--resume") == 73
    assert run(["train", str(straight), "--resume", "--registry", str(tmp_path / "adapters")]) == 66
    told = capsys.readouterr().err
    assert "is not the folder of a run" in told
    assert "there is no unfinished run of tiny under runs/" in told
    assert [path.name for path in foreign.iterdir()] == ["thesis.doc"]


def test_without_a_folder_the_newest_unfinished_run_goes_on(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-20260101-000000", "tiny-20260101-000000-2"):
        stopped_run(straight, tmp_path / name)
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / name / "run").rename(tmp_path / "runs" / name)
    assert run(["train", str(straight), "--resume", "--registry", str(tmp_path / "adapters")]) == 0
    assert (tmp_path / "runs" / "tiny-20260101-000000-2" / "report.json").exists()
    assert not (tmp_path / "runs" / "tiny-20260101-000000" / "report.json").exists()


def test_the_command_that_goes_on_can_be_pasted_into_a_shell(tmp_path):
    wish = recipe_verbs.TrainWish(
        tmp_path / "my recipe.yaml", ("train.seed=1", "output.name=x"), registry=tmp_path / "a b"
    )
    words = shlex.split(wish.command(tmp_path / "run 1"))
    assert shlex.split(wish.command())[3:] == words[3:7] + words[9:-1]
    assert words[:3] == ["lora-tune", "train", str(tmp_path / "my recipe.yaml")]
    assert words[3:] == ["--set", "train.seed=1", "--set", "output.name=x", "--run-dir", str(tmp_path / "run 1"),
                         "--registry", str(tmp_path / "a b"), "--resume"]  # fmt: skip
