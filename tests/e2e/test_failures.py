"""What goes wrong half-way, and what is measured: nothing is lost, nothing is claimed that is not so."""

import json
import signal
import subprocess
import sys

import pytest

from lora_tune.cli.app import run
from lora_tune.recipe.loader import load_recipe
from tests.e2e.test_verbs import _json


def test_a_failed_evaluation_loses_no_trained_adapter(trained, tmp_path, capsys, monkeypatch):
    import lora_tune.evaluation.evaluate as evaluation

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(evaluation, "evaluate", fail)
    places = ("--run-dir", tmp_path / "run", "--registry", tmp_path / "r")
    code, found = _json(capsys, "train", trained / "recipe.yaml", *places)
    assert (code, found["error"]["code"]) == (71, "out_of_memory")
    assert "micro_batch_sequences" in found["error"]["hint"]
    monkeypatch.undo()
    assert _json(capsys, "adapters", "verify", tmp_path / "run" / "adapter")[0] == 0


def test_the_allocators_own_error_is_exit_71(trained, tmp_path, capsys, monkeypatch):
    import torch

    from lora_tune.training import trainer

    def allocate(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr(trainer.Trainer, "training_step", allocate)
    code, found = _json(
        capsys, "train", trained / "recipe.yaml", "--run-dir", tmp_path / "run", "--registry", tmp_path / "r"
    )
    assert (code, found["error"]["code"]) == (71, "out_of_memory")


def test_ctrl_c_is_exit_130_and_says_so(trained, tmp_path, capsys, monkeypatch):
    from lora_tune.training import trainer

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "training_step", interrupt)
    arguments = [
        "train",
        str(trained / "recipe.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
        "--registry",
        str(tmp_path / "r"),
    ]
    assert run(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert run([*arguments[:3], str(tmp_path / "run2"), *arguments[4:], "--json"]) == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "interrupted"


def test_exact_match_compares_with_what_the_model_would_write(tmp_path):
    """A template that writes an empty thinking block before the words: a perfect model is 100 % right."""
    from lora_tune.data.dataset import prepare_dataset
    from lora_tune.data.tokens import answer_ids
    from lora_tune.evaluation import evaluate as evaluation
    from lora_tune.recipe.schema import DataSection
    from tests.tiny import TEMPLATES, tiny_tokenizer, write_jsonl

    thinking = tiny_tokenizer()
    thinking.chat_template = TEMPLATES["thinking block"]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"turn {n}", "completion": f"lights {n}"} for n in range(3)]
    )
    held_out = prepare_dataset(DataSection(path=str(path)), thinking, seed=0).train
    rows = list(held_out.rows.conversations())
    perfect = {tuple(row.messages): evaluation._text(thinking, answer_ids(row, thinking)) for row in rows}
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluation, "_answer", lambda model, tok, asked, *_: [perfect[tuple(row.messages)] for row in asked])
    patch.setattr(evaluation, "_score", lambda *_: (1.0, 1, 1))
    found = evaluation.evaluate(None, thinking, held_out, lambda *_: None, max_answer_tokens=8, base_too=False)
    patch.undo()
    assert found.adapter.exact_match == 1.0
    assert "<think>" in found.answers[0].expected


def test_a_wrong_target_leaves_no_run_folder(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, found = _json(capsys, "train", trained / "recipe.yaml", "--set", "lora.targets=[query_key_value]")
    assert (code, found["error"]["where"]) == (65, "lora.targets")
    assert "q_proj" in found["error"]["message"]
    assert not (tmp_path / "runs").exists()


def test_a_gpu_recipe_is_copied_beside_its_rows(tmp_path, capsys):
    assert run(["recipes", "cp", "qwen3-8b-qlora-24gb", str(tmp_path / "my" / "r.yaml")]) == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "my/data/home.heldout.jsonl", "my/data/home.jsonl", "my/r.yaml"
    ]  # fmt: skip
    assert run(["check", str(tmp_path / "my" / "r.yaml")]) == 0


def test_debug_shows_a_traceback_and_keeps_the_exit_code(capsys):
    assert run(["check", "no-such.yaml", "--debug"]) == 66
    assert "Traceback" in capsys.readouterr().err


def test_measurements_that_never_come_are_warned_of(trained, capsys):
    _, found = _json(
        capsys,
        "check",
        trained / "recipe.yaml",
        "--set",
        "eval.every_steps=7",
        "--set",
        "eval.early_stopping_patience=1",
    )
    assert any("early stopping never looks" in warning for warning in found["warnings"])
    _, found = _json(capsys, "check", trained / "recipe.yaml", "--set", "eval.every_steps=6")
    assert found["warnings"] == []


def test_the_held_out_loss_is_the_mean_over_trained_tokens(trained):
    """An independent path: one row at a time, transformers' own loss."""
    import torch

    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.live import open_live
    from lora_tune.data.dataset import prepare_dataset
    from lora_tune.data.tokens import loss_labels

    recipe = load_recipe(trained / "run" / "recipe.resolved.yaml").recipe
    live = open_live(open_adapter(trained / "run" / "adapter"), lambda *_: None)
    rows = prepare_dataset(recipe.data, live.tokenizer, seed=recipe.train.seed).held_out.rows
    summed, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([loss_labels(row.input_ids, row.trained)])
        with torch.no_grad():
            summed += float(live.model(input_ids=ids, labels=labels).loss) * row.n_trained
        count += row.n_trained
    report = json.loads((trained / "run" / "report.json").read_text())
    assert report["evaluation"]["adapter"]["loss"] == pytest.approx(summed / count, abs=1e-5)


def test_a_command_that_is_ended_from_outside_leaves_nothing_half_made(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lora_tune.cli import app\n"
        "from lora_tune.staging import staged_folder\n"
        "def run(_):\n"
        "    with staged_folder(Path(sys.argv[1])) as stage:\n"
        "        (stage / 'half').write_text('x')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "app.run = run\n"
        "app.main([])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=60, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
