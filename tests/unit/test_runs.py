"""Runs read from their folders: states, names, damage, comparison. Reading leaves everything as it was."""

import copy
import fcntl
import json
import math
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tune.cli.app import run
from lora_tune.errors import MissingInputError, UsageError
from lora_tune.recipe.schema import SECTIONS
from lora_tune.runs.compare import compare
from lora_tune.runs.curves import MAX_POINTS, curves, smooth
from lora_tune.runs.details import details, recipe_differences
from lora_tune.runs.listing import list_runs
from lora_tune.runs.metrics import Metrics, read_metrics
from lora_tune.runs.naming import find_run, open_run
from lora_tune.runs.records import read_run
from lora_tune.runs.written import StepLine
from tests.run_folders import FACTS, RECIPE, loss_at, step_line, write_checkpoint, write_metrics, write_run

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def held(folder):
    """Lock a run's folder as a living run does, and return the descriptor."""
    descriptor = os.open(folder / "run.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def snapshot(folder):
    """Everything under a folder: names, kinds, times of change and contents."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }  # fmt: skip


def test_a_run_is_running_done_resumable_or_unfinished(tmp_path):
    assert read_run(write_run(tmp_path / "done")).state == "done"
    assert read_run(write_run(tmp_path / "unfinished", done=False, n_steps=3)).state == "unfinished"
    folder = write_run(tmp_path / "stopped", done=False, checkpoints=(5, 10))
    assert read_run(folder).state == "resumable"
    descriptor = held(folder)
    assert read_run(folder).state == "running"
    os.close(descriptor)
    assert read_run(folder).state == "resumable"


def test_a_checkpoint_that_is_damaged_or_anothers_is_said_and_does_not_count(tmp_path):
    folder = write_run(tmp_path / "run", done=False)
    write_checkpoint(folder, 5, run_id="another")
    (write_checkpoint(folder, 10) / "state.bin").write_bytes(b"short")
    (write_checkpoint(folder, 15) / "manifest.json").unlink()
    write_checkpoint(folder, 20).rename(folder / "checkpoints" / "step-000021")
    record = read_run(folder)
    assert record.state == "unfinished"
    assert [one.step for one in record.checkpoints] == [5, 10, 15, 21]
    assert all(one.damage for one in record.checkpoints)
    assert sum("checkpoint of step" in warning for warning in details(record)["warnings"]) == 4


def test_looking_at_runs_writes_nothing_not_even_a_lock(tmp_path, capsys):
    write_run(tmp_path / "a-20260101-000000")
    write_run(tmp_path / "b-20260102-000000", done=False, checkpoints=(5,))
    (tmp_path / "b-20260102-000000" / "run.lock").unlink()
    (tmp_path / "foreign").mkdir()
    before = snapshot(tmp_path)
    for words in (["list"], ["show", "a"], ["show", "b"], ["compare", "a", "b"]):
        for more in ([], ["--json"]):
            assert run(["runs", *words, "--runs", str(tmp_path), *more]) == 0
    assert snapshot(tmp_path) == before
    capsys.readouterr()


def test_the_newest_run_stands_first_and_what_is_no_run_says_why(tmp_path):
    write_run(tmp_path / "b-20260102-000000")
    write_run(tmp_path / "a-20260103-000000", done=False, checkpoints=(20,))
    write_run(tmp_path / "c-20260101-000000")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    (tmp_path / "file").touch()
    lines = list_runs(tmp_path)
    runs = [line for line in lines if not line["damage"]]
    assert [line["run"][0] for line in runs] == ["a", "b", "c"]
    assert [line["run"] for line in lines if line["damage"]] == ["notes"]
    assert "todo.txt" in next(line["damage"] for line in lines if line["damage"])
    assert runs[0]["held_out_loss"] == loss_at(20) + 0.1
    assert (runs[1]["held_out_loss"], runs[1]["adapter"], runs[1]["elapsed_seconds"]) == (2.25, "tiny@1", 10.0)
    assert (runs[0]["step"], runs[0]["steps"], runs[0]["last_loss"]) == (20, 20, loss_at(20))
    assert list_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["run.json", "report.json", "metrics.jsonl", "recipe.resolved.yaml"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["step", "event", "data", "counts", "training", "adapter", "base", "x"]), inner), max_leaves=6).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_whatever_stands_in_a_file_is_an_answer_and_never_a_traceback(tmp_path, content, name):
    folder = tmp_path / "any"
    if not folder.exists():
        write_run(folder, checkpoints=(5,))
    kept = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        record = read_run(folder)
        assert bool(record.damage) == (record.state == "damaged")
        json.dumps({**details(record), "curves": curves(record.metrics)}, allow_nan=False)
    finally:
        (folder / name).write_bytes(kept)


def test_pipes_links_and_deep_nesting_are_damage_at_once(tmp_path):
    elsewhere = tmp_path / "facts.json"
    elsewhere.write_text(json.dumps(FACTS))
    for number, spoil in enumerate((
        os.mkfifo, lambda path: path.symlink_to(elsewhere), lambda path: path.mkdir(),
        lambda path: path.write_text("[" * 200_000), lambda path: path.write_text('{"versions": {"torch": 1e999}}'),
    )):  # fmt: skip
        folder = write_run(tmp_path / f"run-{number}")
        (folder / "run.json").unlink()
        spoil(folder / "run.json")
        record = read_run(folder)
        assert record.state == "damaged", number
        assert "run.json" in record.damage


def test_what_a_resumed_run_did_again_replaces_what_it_did_before(tmp_path):
    folder = write_run(tmp_path / "run", done=False, n_steps=1)
    first = [step_line(step) for step in range(1, 11)] + [{"event": "held_out", "step": 10, "held_out_loss": 9.0}]
    again = [step_line(step, loss=7.0 + step) for step in range(6, 9)]
    write_metrics(folder, [*first, *again])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "step", "st')
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [step.step for step in metrics.steps] == list(range(1, 9))
    assert [step.loss for step in metrics.steps[5:]] == [13.0, 14.0, 15.0]
    assert metrics.held_out == ()
    assert (metrics.n_repeated_steps, metrics.n_unread_lines) == (5, 1)


def test_the_end_of_a_long_file_is_enough_for_the_last_step(tmp_path):
    folder = write_run(tmp_path / "run", done=False, n_steps=20)
    part = read_metrics(folder / "metrics.jsonl", cap_bytes=900)
    assert not part.is_whole
    assert part.n_unread_lines == 0
    assert part.steps[-1] == read_metrics(folder / "metrics.jsonl").steps[-1]


def test_a_run_is_named_by_folder_name_or_a_beginning_that_only_it_has(tmp_path):
    for name in ("home-20260101-000000", "home-20260102-000000", "office-20260101-000000"):
        write_run(tmp_path / name)
    office = tmp_path / "office-20260101-000000"
    for name in ("office", "o", office.name, str(office)):
        assert find_run(name, root=tmp_path) == office
    with pytest.raises(UsageError, match="2 runs"):
        find_run("home", root=tmp_path)
    with pytest.raises(MissingInputError) as caught:
        find_run("ofice", root=tmp_path)
    assert caught.value.hint.startswith(f"the nearest: {office.name}")
    for name in ("", "\0", "../nowhere"):
        with pytest.raises(MissingInputError):
            find_run(name, root=tmp_path)
    (office / "run.json").write_text("{")
    with pytest.raises(MissingInputError, match=r"run\.json is not JSON"):
        open_run("office", root=tmp_path)


def test_only_settings_that_are_not_the_default_are_shown():
    defaults = {
        section: {key: field.get_default(call_default_factory=True) for key, field in model.model_fields.items() if not field.is_required()}
        for section, model in SECTIONS.items()
    }  # fmt: skip
    plain = json.loads(json.dumps(defaults))
    assert recipe_differences(plain) == []
    plain["lora"]["rank"] = 3
    plain["data"]["nonsense"] = "x"
    found = {one["field"]: (one["value"], one["default"]) for one in recipe_differences(plain)}
    assert found == {"lora.rank": (3, SECTIONS["lora"].model_fields["rank"].default), "data.nonsense": ("x", None)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    losses=st.lists(FINITE, min_size=1, max_size=12),
    changes=st.dictionaries(st.integers(0, 11), FINITE, max_size=3),
    nudged=st.integers(0, 20),
)
def test_the_first_differing_step_is_where_the_bits_part(tmp_path, losses, changes, nudged):
    other = [changes.get(number, loss) for number, loss in enumerate(losses)]
    if nudged < len(other):
        other[nudged] = math.nextafter(other[nudged], math.inf)
    records = []
    for name, values in (("one", losses), ("other", other)):
        folder = tmp_path / name
        if not folder.exists():
            write_run(folder, done=False)
        write_metrics(folder, [step_line(number + 1, loss=loss) for number, loss in enumerate(values)])
        records.append(read_run(folder))
    parted = [number + 1 for number, pair in enumerate(zip(losses, other, strict=True)) if len({struct.pack("<d", loss) for loss in pair}) > 1]  # fmt: skip
    found = compare(records)["losses"]
    first = found["first_differences"][0]
    assert (first["step"] if first else None) == (parted[0] if parted else None)
    assert found["n_common_steps"] == len(losses)


def test_a_comparison_names_each_field_and_says_plainly_when_nothing_differs(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "twin")
    changed = copy.deepcopy(RECIPE)
    changed["lora"]["rank"] = 16
    write_run(tmp_path / "other", recipe=changed, n_steps=12)
    one, twin, other = (read_run(tmp_path / name) for name in ("one", "twin", "other"))
    same = compare([one, twin])
    assert same["differences"] == []
    assert same["verdict"].startswith("nothing differs but when they ran")
    assert "bit for bit at all 20" in same["verdict"]
    assert all(figure["differences"][1] in (0, None) for figure in same["figures"])
    three = compare([one, twin, other])
    assert three["differences"] == [{"group": "recipe", "field": "lora.rank", "values": [8, 8, 16]}]
    assert three["losses"]["n_common_steps"] == 12
    assert three["losses"]["same_steps"][-1] == {"step": 12, "values": [loss_at(12)] * 3}
    with pytest.raises(UsageError):
        compare([one])
    with pytest.raises(UsageError):
        compare([one, one])


def test_a_run_that_is_done_does_not_offer_to_go_on_and_one_that_stopped_does(tmp_path):
    def offered(folder):
        return [one["command"] for one in details(read_run(folder))["next"]]

    done = write_run(tmp_path / "done run")
    (done / "adapter").mkdir()
    assert any(command == f"lora-tune serve '{done}'" for command in offered(done))
    assert not any("train" in command for command in offered(done))
    stopped = write_run(tmp_path / "stopped", done=False, checkpoints=(5,))
    assert offered(stopped)[0] == f"lora-tune train {stopped}/recipe.resolved.yaml --resume --run-dir {stopped}"
    descriptor = held(stopped)
    assert offered(stopped) == [f"lora-tune runs report {stopped} --watch"]
    os.close(descriptor)


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_a_smoothed_line_stays_within_its_values_and_begins_with_the_first(values):
    found = smooth(values)
    room = 1e-6 * max(1.0, *(abs(value) for value in values))
    assert found[0] == pytest.approx(values[0], rel=1e-9)
    assert all(min(values) - room <= value <= max(values) + room for value in found)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 50))
def test_a_curve_has_so_many_points_that_a_page_can_show_and_loses_no_step(n_steps, first):
    steps = tuple(StepLine(step=first + number, loss=float(number % 7)) for number in range(n_steps))
    curve = curves(Metrics(steps=steps))["loss"]
    points, width = curve["points"], curve["n_steps_a_point"]
    assert len(points) <= MAX_POINTS
    assert points[-1]["step"] == steps[-1].step
    counted = [point["step"] - before for before, point in zip([first - 1, *(point["step"] for point in points)], points, strict=False)]  # fmt: skip
    assert all(number == width for number in counted[:-1])
    assert sum(number * point["value"] for number, point in zip(counted, points, strict=True)) == pytest.approx(sum(step.loss for step in steps))  # fmt: skip
    assert max(point["highest"] for point in points) == max(step.loss for step in steps)


def test_names_that_would_act_on_a_terminal_are_shown_as_signs(tmp_path, capsys):
    folder = write_run(tmp_path / "bad\x1b[2Jname")
    facts = json.loads((folder / "run.json").read_text())
    facts["versions"]["torch\x1b[31m"] = "1\u202e2"
    (folder / "run.json").write_text(json.dumps(facts))
    for words in (["list"], ["show", "bad"]):
        assert run(["runs", *words, "--runs", str(tmp_path)]) == 0
        shown = capsys.readouterr()
        assert not any(sign in shown.out + shown.err for sign in ("\x1b", "\u202e"))


def test_runs_that_are_not_there_are_missing_and_no_runs_are_no_error(tmp_path, capsys):
    assert run(["runs", "list", "--runs", str(tmp_path / "none")]) == 0
    assert run(["runs", "show", "x", "--runs", str(tmp_path / "none")]) == 66
    assert run(["runs", "list", "--runs", str(Path(__file__))]) == 66
    assert "Traceback" not in capsys.readouterr().err


def test_where_a_run_went_on_and_what_was_changed_is_said(tmp_path):
    folder = write_run(tmp_path / "run")
    resumed = [{"step": 5, "changed": {}}, {"step": 10, "changed": {"train.epochs": [1, 2]}}]
    (folder / "run.json").write_text(json.dumps({**FACTS, "resumed": resumed}))
    said = "; ".join(details(read_run(folder))["warnings"])
    assert "from the checkpoint of step 5;" in said
    assert "from the checkpoint of step 10, with train.epochs changed" in said
