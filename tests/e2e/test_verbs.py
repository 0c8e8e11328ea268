"""The command line from argv to exit code, on a tiny base."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest

from lora_tune.cli.app import run
from lora_tune.recipe.loader import load_recipe
from tests.tiny import home_rows, write_jsonl, write_recipe


def _json(capsys, *arguments):
    capsys.readouterr()
    code = run([*map(str, arguments), "--json"])
    printed = capsys.readouterr().out
    return code, json.loads(printed.splitlines()[-1])


def test_train_exports_registers_and_reports(trained):
    report = json.loads((trained / "run" / "report.json").read_text())
    assert report["adapter"]["registry"] == "tiny@1"
    assert (trained / "adapters" / "tiny" / "1" / "lora_tune.json").is_file()
    assert report["training"]["steps"] == 6
    assert report["data"]["train"]["rows"] == 24
    names = {path.name for path in (trained / "run").iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "recipe.resolved.yaml",
        "recipe.yaml",
        "report.html",
        "report.json",
        "run.json",
        "run.lock",
    }
    assert (trained / "run" / "recipe.yaml").read_text() == (trained / "recipe.yaml").read_text()
    assert load_recipe(trained / "run" / "recipe.resolved.yaml").recipe.train.max_steps == 6
    facts = json.loads((trained / "run" / "run.json").read_text())
    assert {"versions", "base", "data", "chat_template", "recipe_digest"} <= set(facts)


def test_train_measures_generated_answers(trained):
    evaluation = json.loads((trained / "run" / "report.json").read_text())["evaluation"]
    assert set(evaluation["base"]) == set(evaluation["adapter"])
    assert evaluation["adapter"]["n_answers"] == len(evaluation["answers"]) == 3
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"]


def test_metrics_have_one_line_a_step(trained):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "eta_seconds", "peak_memory_gib"} <= set(
        lines[0]
    )
    assert lines[-1]["eta_seconds"] == 0


def test_json_events_end_with_done(trained, tmp_path, capsys):
    code, last = _json(
        capsys, "train", trained / "recipe.yaml", "--run-dir", tmp_path / "run", "--registry", tmp_path / "r"
    )
    assert code == 0
    assert last["event"] == "done"
    assert last["evaluation"]["adapter"]["exact_match"] is not None


def test_a_dry_run_writes_nothing_and_gives_the_counts(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, found = _json(capsys, "train", trained / "recipe.yaml", "--dry-run")
    assert code == 0
    assert found["data"]["train"]["rows"] == 24
    assert found["steps"] == 6
    assert list(tmp_path.iterdir()) == []


def test_check_counts_steps_as_the_trainer_does(trained, capsys, tmp_path, tiny_bases):
    for epochs, micro, accumulation in ((1.0, 5, 1), (1.5, 4, 4), (2.0, 7, 2)):
        folder = tmp_path / f"{epochs}-{micro}"
        folder.mkdir()
        train = {
            "max_steps": None,
            "epochs": epochs,
            "micro_batch_sequences": micro,
            "gradient_accumulation_steps": accumulation,
        }
        recipe = write_recipe(folder, tiny_bases(), held_out=0, train=train)
        _, planned = _json(capsys, "check", recipe)
        _, done = _json(capsys, "train", recipe, "--run-dir", folder / "run", "--registry", folder / "r")
        assert planned["steps"] == done["training"]["steps"]


def test_eval_measures_the_same_as_training_did(trained, capsys):
    report = json.loads((trained / "run" / "report.json").read_text())["evaluation"]
    code, found = _json(capsys, "eval", trained / "run" / "adapter", "--generate", 6, "--rows", 3)
    assert code == 0
    for who in ("base", "adapter"):
        assert found[who]["loss"] == pytest.approx(report[who]["loss"], abs=1e-6)
        assert found[who]["exact_match"] == report[who]["exact_match"]
    assert [a["adapter"] for a in found["answers"]] == [a["adapter"] for a in report["answers"]]


def test_eval_takes_other_rows_and_needs_some(trained, capsys, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", home_rows(2))
    code, found = _json(capsys, "eval", "tiny", "--registry", trained / "adapters", "--data", rows, "--generate", 0)
    assert code == 0
    assert found["counts"]["rows"] == 2
    code, found = _json(capsys, "eval", "tiny", "--registry", trained / "adapters", "--generate", 0)
    assert code == 0
    assert found["data"].endswith("held.jsonl")
    shutil.copytree(trained / "run" / "adapter", tmp_path / "elsewhere")
    code, found = _json(capsys, "eval", tmp_path / "elsewhere")
    assert code == 2
    assert "--data" in found["error"]["hint"]


def test_eval_finds_the_rows_that_a_split_held_out(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data={"eval_split": 0.25}, train={"seed": 5})
    places = ("--run-dir", tmp_path / "run", "--registry", tmp_path / "r")
    _, done = _json(capsys, "train", recipe, *places)
    code, found = _json(capsys, "eval", "tiny", "--registry", tmp_path / "r", "--generate", 0)
    assert code == 0
    assert found["counts"] == done["data"]["held_out"]
    assert found["adapter"]["loss"] == pytest.approx(done["evaluation"]["adapter"]["loss"], abs=1e-6)


def test_the_base_with_the_adapter_off_is_the_base(trained, tiny_bases):
    import torch

    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.live import open_base, open_live
    from lora_tune.adapter.probes import probe_logits
    from lora_tune.recipe.schema import BaseSection

    live = open_live(open_adapter(trained / "run" / "adapter"), lambda *_: None).model
    base = open_base(BaseSection(name=str(tiny_bases())), lambda *_: None).model
    ids = list(range(3, 30))
    with live.disable_adapter():
        assert torch.equal(probe_logits(live, ids, 1), probe_logits(base, ids, 1))


def test_chat_answers_and_keeps_the_system_message_of_training(trained, capsys):
    code, found = _json(
        capsys, "chat", trained / "run" / "adapter", "--prompt", "turn on the lights", "--max-tokens", 5
    )
    assert code == 0
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    from lora_tune.cli import verbs

    talk = verbs.open_chat(
        str(trained / "run" / "adapter"),
        system=None,
        system_from=None,
        base=None,
        registry=None,
        progress=lambda *_: None,
    )
    assert talk.system == "Reply with one JSON call."


def test_chat_reads_a_piped_conversation(trained, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("turn on the lights\n\nturn off the radio\n"))
    code, found = _json(capsys, "chat", trained / "run" / "adapter", "--max-tokens", 4)
    assert code == 0
    assert [message["content"] for message in found["messages"] if message["role"] == "user"] == [
        "turn on the lights",
        "turn off the radio",
    ]


def test_chat_with_a_base_folder(capsys, tiny_bases):
    code, found = _json(capsys, "chat", tiny_bases(), "--prompt", "hello", "--max-tokens", 3)
    assert code == 0
    assert found["answer"] is not None


def test_streamed_text_equals_the_generated_answer(trained):
    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.live import open_live
    from lora_tune.cli import verbs
    from lora_tune.data.messages import Message
    from lora_tune.data.tokens import prompt_ids
    from lora_tune.model.generate import generate_answers, stop_ids

    talk = verbs.open_chat(
        str(trained / "run" / "adapter"),
        system=None,
        system_from=None,
        base=None,
        registry=None,
        progress=lambda *_: None,
    )
    turns = [{"role": "user", "content": "turn on the lights"}]
    with contextlib.closing(talk):
        streamed = "".join(talk.answer(turns, max_tokens=8, temperature=0.0))
        # Who stops listening in the middle stops the answer, and can ask again.
        next(talk.answer(turns, max_tokens=400, temperature=0.0))
        assert "".join(talk.answer(turns, max_tokens=8, temperature=0.0)) == streamed
    ids = prompt_ids(talk.tokenizer, [Message("system", talk.system), Message("user", "turn on the lights")])
    live = open_live(open_adapter(trained / "run" / "adapter"), lambda *_: None)
    ends = stop_ids(live.model, live.tokenizer)
    whole = generate_answers(live.model, live.tokenizer, [ids], max_tokens=8, ends=ends)[0]
    assert streamed == live.tokenizer.decode(whole, skip_special_tokens=True)


def test_a_batch_answers_as_each_prompt_alone(trained):
    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.live import open_live
    from lora_tune.model.generate import generate_answers

    live = open_live(open_adapter(trained / "run" / "adapter"), lambda *_: None)
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 17, 6)]
    together = generate_answers(live.model, live.tokenizer, prompts, max_tokens=6, ends=[2])
    assert together == [generate_answers(live.model, live.tokenizer, [p], max_tokens=6, ends=[2])[0] for p in prompts]


def test_list_inspect_verify_merge(trained, capsys, tmp_path):
    registry = ("--registry", trained / "adapters")
    code, found = _json(capsys, "adapters", "list", *registry)
    assert (code, [row["adapter"] for row in found["adapters"]]) == (0, ["tiny@1"])
    code, found = _json(capsys, "adapters", "inspect", "tiny@1", *registry)
    assert (code, found["rank"], found["passport"]) == (0, 4, "present")
    code, found = _json(capsys, "adapters", "verify", "tiny", *registry)
    assert (code, found["verdict"], found["max_abs_delta"]) == (0, "equal", 0.0)
    code, found = _json(capsys, "merge", "tiny", tmp_path / "merged", *registry)
    assert code == 0
    assert found["max_abs_delta"] <= 1e-4
    assert json.loads((tmp_path / "merged" / "merge_receipt.json").read_text()) == found


def test_verify_refuses_another_base_and_an_adapter_without_a_passport(trained, capsys, tmp_path, tiny_bases):
    code, found = _json(capsys, "adapters", "verify", trained / "run" / "adapter", "--base", tiny_bases("llama", 1))
    assert (code, found["error"]["where"]) == (77, "base.weights")
    shutil.copytree(trained / "run" / "adapter", tmp_path / "copy")
    (tmp_path / "copy" / "lora_tune.json").unlink()
    code, found = _json(capsys, "adapters", "verify", tmp_path / "copy")
    assert code == 77
    assert "unverified" in found["error"]["message"]


@pytest.mark.parametrize(("arguments", "code"), [
    (["train", "no-such.yaml"], 66), (["check", "no-such.yaml"], 66), (["nonsense"], 2), (["train"], 2), (["check", "--nonsense"], 2),
    (["adapters", "inspect", "no-such"], 66), (["adapters", "verify", "./no-such"], 66), (["recipes", "show", "no-such"], 66),
    (["chat", "builtin:nothing", "--prompt", "x"], 66), (["chat", "no-owner/no-model", "--prompt", "x"], 69),
    (["merge", "x", "y", "--onto", "z"], 2),
])  # fmt: skip
def test_mistakes_have_their_exit_code_and_a_next_step(capsys, arguments, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: " in said.err
    assert "Traceback" not in said.err
    found, value = _json(capsys, *arguments)
    assert found == code
    assert set(value["error"]) == {"code", "message", "hint", "where"}


def test_a_mistake_in_the_rows_leaves_no_run_folder(tmp_path, capsys, tiny_bases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tiny_bases())
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write("{broken\n")
    assert run(["train", str(recipe)]) == 65
    assert f"{tmp_path}/rows.jsonl:25: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_taken_run_folder_is_exit_73(trained, capsys):
    code, found = _json(capsys, "train", trained / "recipe.yaml", "--run-dir", trained / "run")
    assert (code, found["error"]["code"]) == (73, "cannot_create")


def test_early_stopping_keeps_the_best_weights(tmp_path, tiny_bases, capsys):
    # Held-out answers that training leads away from.
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"say {n}", "completion": "9 8 7 6 5 4"} for n in range(4)])
    recipe = write_recipe(
        tmp_path, tiny_bases(), data={"eval_path": "other.jsonl"},
        train={"max_steps": 60, "learning_rate": 0.05, "schedule": "constant"}, eval={"every_steps": 2, "early_stopping_patience": 2},
    )  # fmt: skip
    code, found = _json(capsys, "train", recipe, "--run-dir", tmp_path / "run", "--registry", tmp_path / "r")
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if line["event"] == "held_out"}
    assert found["training"]["steps"] < 60
    best = min(held_out, key=held_out.get)
    assert found["training"]["best_step"] == best
    assert found["evaluation"]["adapter"]["loss"] == pytest.approx(held_out[best], abs=1e-4)


def test_recipes_are_copied_with_their_rows_and_never_over_others(tmp_path, capsys):
    assert run(["recipes", "cp", "quickstart", str(tmp_path / "my" / "r.yaml")]) == 0
    assert run(["check", str(tmp_path / "my" / "r.yaml")]) == 0
    (tmp_path / "my" / "r.yaml").write_text("mine")
    assert run(["recipes", "cp", "quickstart", str(tmp_path / "my" / "r.yaml")]) == 73
    assert (tmp_path / "my" / "r.yaml").read_text() == "mine"


def test_preview_marks_the_trained_tokens(trained, capsys):
    code, found = _json(capsys, "preview", trained / "recipe.yaml", "-n", 1)
    assert code == 0
    tokens = found["rows"][0]["tokens"]
    assert "".join(t["text"] for t in tokens if t["trained"]).endswith('"}<|im_end|>')
    assert run(["preview", str(trained / "recipe.yaml"), "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert "[<|im_end|>]" in printed
    assert "\x1b" not in printed


def test_what_must_answer_at_once_imports_no_torch(trained):
    verbs = [["--help"], ["check", str(trained / "recipe.yaml")], ["recipes", "ls"], ["schema"],
             ["adapters", "list", "--registry", str(trained / "adapters")]]  # fmt: skip
    code = (
        f"import sys\nfrom lora_tune.cli.app import run\nfor arguments in {verbs!r}:\n    assert run(arguments) == 0\n"
        "    assert not {'torch', 'transformers', 'peft'} & set(sys.modules), arguments"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_no_terminal_gets_no_escape_bytes(trained, tmp_path, capfd):
    words = [
        "train",
        str(trained / "recipe.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
        "--registry",
        str(tmp_path / "r"),
    ]
    assert run([*words, "--set", "train.max_steps=2"]) == 0
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "Warning" not in said.err


@pytest.mark.slow
def test_a_pipe_gets_no_escape_bytes(trained, tmp_path):
    command = [sys.executable, "-m", "lora_tune.cli.app", "train", str(trained / "recipe.yaml"),
               "--run-dir", str(tmp_path / "run"), "--registry", str(tmp_path / "r")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [[], ["recipes"], ["adapters"]])
def test_a_verb_without_its_verb_shows_its_help(arguments, capsys):
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("Usage: lora-tune")
    assert said.out == ""


def test_help_begins_with_an_example_and_version_is_told(capsys):
    from lora_tune import __version__

    assert run(["--help"]) == 0
    assert capsys.readouterr().out.splitlines()[2].strip().startswith("Example: ")
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"lora_tune {__version__}\n"
