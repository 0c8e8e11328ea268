"""The data settings through the command line: what `check --tokens` says is what `train` uses."""

import csv
import gzip
import json

import pytest

from lora_tune.cli.app import run
from tests.tiny import home_rows, write_jsonl, write_recipe

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _json(capsys, *arguments):
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def _train(capsys, folder, recipe):
    return _json(capsys, "train", recipe, "--run-dir", folder / "run", "--registry", folder / "registry")


@pytest.mark.parametrize("batching", ["grouped", "random", "packed"])
def test_what_is_checked_is_what_is_trained(tmp_path, tiny_bases, capsys, batching):
    recipe = write_recipe(tmp_path, tiny_bases(), train={"batching": batching, "max_steps": None, "epochs": 1.0})
    code, checked = _json(capsys, "check", recipe, "--tokens")
    assert code == 0
    code, report = _train(capsys, tmp_path, recipe)
    assert code == 0
    assert report["training"]["steps"] == checked["steps"]
    assert report["data"] == checked["tokens"]
    assert {**report["data_ledger"], "tokenized": {}} == {**checked["data"], **checked["ledger"], "tokenized": {}}
    assert report["training"]["tokens"] == checked["tokens"]["train"]["tokens"]
    assert set(report["data_ledger"]["tokenized"].values()) == {"kept from before"}


def test_a_table_of_labelled_texts_is_trained_and_answered(tmp_path, tiny_bases, capsys):
    write_recipe(tmp_path, tiny_bases())
    with gzip.open(tmp_path / "rows.csv.gz", "wt", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "intent"])
        writer.writerows([f"where is card {n}", "arrival" if n % 3 else "lost"] for n in range(18))
    recipe = write_recipe(
        tmp_path, tiny_bases(), held_out=0, data={"path": "rows.csv.gz", "columns": {"text": "question"}, "eval_split": 0.2},
        augment={"copies": 1, "case": 1.0, "punctuation": 1.0, "balance_labels": 1.0, "neftune_alpha": 5.0}, eval={"generate": 4, "generate_rows": 2},
    )  # fmt: skip
    code, report = _train(capsys, tmp_path, recipe)
    assert code == 0
    ledger = report["data_ledger"]
    assert ledger["format"] == "labelled"
    assert ledger["labels"] == {"arrival": 12, "lost": 6}
    (own, copies) = ledger["sources"]
    assert own["rows_an_epoch"] >= own["rows"] >= copies["rows"] > 0
    assert report["data"]["train"]["rows"] == own["rows_an_epoch"] + copies["rows_an_epoch"]


def test_tool_calls_and_reasoning_are_trained_with_a_template_that_writes_them(tmp_path, tiny_bases, capsys):
    (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
    call = {"function": {"name": "weather", "arguments": {"town": "Bern"}}}
    turns = [
        {"role": "user", "content": "rain in Bern?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "dry", "name": "weather"}, {"role": "assistant", "content": "No.", "reasoning_content": "it is dry"},
    ]  # fmt: skip
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data={"chat_template": "tools.jinja"})
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [WEATHER]}] * 4)
    code, shown = _json(capsys, "preview", recipe, "-n", 1)
    assert code == 0
    trained = "".join(token["text"] for token in shown["rows"][0]["tokens"] if token["trained"])
    called = '<call>{"name": "weather", "arguments": {"town": "Bern"}}</call><|im_end|>'
    assert trained == f"{called}<think>it is dry</think>No.<|im_end|>"
    assert _train(capsys, tmp_path, recipe)[0] == 0


def test_a_template_without_tools_refuses_rows_with_tools(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0)
    write_jsonl(tmp_path / "rows.jsonl", [{**home_rows(1)[0], "tools": [WEATHER]}])
    code, found = _json(capsys, "check", recipe, "--tokens")
    assert code == 65
    assert "rows.jsonl:1: the chat template does not write tools" in found["error"]["message"]


def test_settings_that_need_held_out_rows_say_so_for_a_folder_without_them(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data={"path": "set"}, eval={"every_steps": 1})
    write_jsonl(tmp_path / "set" / "train.jsonl", home_rows(4))
    code, found = _train(capsys, tmp_path, recipe)
    assert (code, found["error"]["where"]) == (65, "eval.every_steps")
    write_jsonl(tmp_path / "set" / "valid.jsonl", home_rows(6)[4:])
    assert _train(capsys, tmp_path, recipe)[0] == 0


def test_a_mixture_is_named_mistake_by_mistake(tmp_path, tiny_bases, capsys):
    mix = [{"path": "rows.jsonl", "weigth": 2}, {"path": "gone.jsonl"}, {"repeat": 2}]
    recipe = write_recipe(tmp_path, tiny_bases(), data={"path": None, "mix": mix})
    code, found = _json(capsys, "check", recipe)
    assert code == 65
    for part in ("data.mix[1].weigth: unknown key; did you mean `weight`?", "data.mix[3].path: is required"):
        assert part in found["error"]["message"], found["error"]["message"]
