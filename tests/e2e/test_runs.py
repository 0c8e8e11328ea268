"""The verbs on runs, on a run that was really trained."""

import json
import shutil

from lora_tune.cli.app import run


def called(capsys, *words):
    """What a verb prints as JSON."""
    capsys.readouterr()
    assert run(["runs", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_trained_run_is_listed_shown_and_reported_with_the_numbers_of_its_report(trained, tmp_path, capsys):
    report = json.loads((trained / "run" / "report.json").read_text())
    line = next(one for one in called(capsys, "list", "--runs", str(trained))["runs"] if one["run"] == "run")
    assert (line["state"], line["step"], line["steps"]) == ("done", 6, 6)
    assert line["adapter"] == report["adapter"]["registry"]
    assert line["held_out_loss"] == report["evaluation"]["adapter"]["loss"]
    told = called(capsys, "report", str(trained / "run"), "--out", str(tmp_path / "page.html"))
    assert told["adapter"]["digest"] == report["adapter"]["digest"]
    for who in ("base", "adapter"):
        assert told["evaluation"][who] == report["evaluation"][who]
    assert told["speed"]["tokens"] == report["training"]["tokens"]
    assert told["losses"]["last_tenth"] == report["training"]["last_loss"]
    assert told["adapter"]["passport"]["lora"]["rank"] == 4
    settings = {one["field"]: one["value"] for one in told["recipe"]["differences"]}
    assert (settings["lora.rank"], settings["train.max_steps"]) == (4, 6)
    assert told["warnings"] == []
    shown = called(capsys, "show", "run", "--runs", str(trained))
    assert shown == {key: value for key, value in told.items() if key in shown}
    assert run(["runs", "show", "run", "--runs", str(trained)]) == 0
    assert report["adapter"]["digest"] in capsys.readouterr().out


def test_the_digest_of_an_adapter_without_a_report_is_that_of_its_report(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "copy")
    (tmp_path / "copy" / "report.json").unlink()
    told = called(capsys, "show", str(tmp_path / "copy"))
    assert told["adapter"]["digest"] == json.loads((trained / "run" / "report.json").read_text())["adapter"]["digest"]


def test_a_run_beside_its_copy_differs_in_nothing_and_one_changed_bit_is_found(trained, tmp_path, capsys):
    copy = shutil.copytree(trained / "run", tmp_path / "copy")
    same = called(capsys, "compare", str(trained / "run"), str(copy))
    assert same["differences"] == []
    assert same["verdict"].startswith("nothing differs")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [number for number, line in enumerate(lines) if json.loads(line)["event"] == "step"]
    changed = json.loads(lines[steps[3]])
    changed["loss"] += changed["loss"] * 2**-52
    lines[steps[3]] = json.dumps(changed) + "\n"
    (copy / "metrics.jsonl").write_text("".join(lines))
    found = called(capsys, "compare", str(trained / "run"), str(copy))
    assert found["losses"]["first_differences"][0]["step"] == changed["step"]
    assert run(["runs", "compare", str(trained / "run"), str(copy)]) == 0
    assert f"first differ at step {changed['step']}" in capsys.readouterr().out
