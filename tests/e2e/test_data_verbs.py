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
    assert own["rows_an_epoch"] >= copies["rows"] > 0
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


@pytest.mark.parametrize("sections", [
    {"data": {"path": None, "mix": [{"path": "rows.jsonl", "repeat": 10}]}},
    {"data": {"path": None, "mix": [{"path": "rows.jsonl", "weight": 1}, {"path": "held.jsonl", "weight": 2}]}},
])  # fmt: skip
def test_check_counts_the_steps_of_a_mixture_as_training_does(tmp_path, tiny_bases, capsys, sections):
    recipe = write_recipe(
        tmp_path, tiny_bases(), train={"max_steps": None, "epochs": 1.0}, eval={"every_steps": 7}, **sections
    )
    (code, quick), (_, exact) = _json(capsys, "check", recipe), _json(capsys, "check", recipe, "--tokens")
    assert code == 0
    assert quick["steps"] == exact["steps"]
    assert [w for w in quick["warnings"] if "eval.every_steps" in w] == [
        w for w in exact["warnings"] if "eval.every_steps" in w
    ]


@pytest.mark.parametrize("sections", [
    {"train": {"batching": "packed"}}, {"augment": {"copies": 2, "punctuation": 1.0}}, {"augment": {"balance_labels": 1.0}},
])  # fmt: skip
def test_steps_that_only_tokens_tell_are_not_guessed(tmp_path, tiny_bases, capsys, sections):
    sections = {"train": {}, **sections}
    sections["train"] |= {"max_steps": None, "epochs": 1.0}
    recipe = write_recipe(tmp_path, tiny_bases(), eval={"every_steps": 10_000}, **sections)
    code, found = _json(capsys, "check", recipe)
    assert (code, found["steps"], found["warnings"]) == (0, None, [])
    assert run(["check", str(recipe)]) == 0
    said = capsys.readouterr()
    assert "  steps   known with --tokens\n" in said.out
    assert "warning" not in said.err
    assert run(["check", str(recipe), "--tokens"]) == 0
    said = capsys.readouterr()
    assert "known with --tokens" not in said.out
    assert "nothing is measured while training" in said.err


def test_steps_that_the_recipe_names_are_known_whatever_the_batches(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), train={"batching": "packed", "max_steps": 2})
    assert _json(capsys, "check", recipe)[1]["steps"] == 2


def test_eval_reads_other_rows_in_the_format_of_the_recipe(tmp_path, tiny_bases, capsys):
    pairs = [{"q": f"turn {n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(8)]  # looks like kto
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    data = {"path": "pairs.jsonl", "format": "prompt-completion", "columns": {"prompt": "q"}}
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data=data)
    assert _train(capsys, tmp_path, recipe)[0] == 0
    eval_pairs = ["eval", "tiny", "--registry", tmp_path / "registry", "--data", tmp_path / "pairs.jsonl"]
    code, found = _json(capsys, *eval_pairs, "--generate", 0)
    assert code == 0
    assert found["counts"]["rows_read"] == 8
    assert any("column 'label' is not used" in warning for warning in found["warnings"])
    assert run([*map(str, eval_pairs), "--generate", "0"]) == 0
    assert "warning: column 'label' is not used" in capsys.readouterr().err


def test_eval_of_a_mixture_names_where_its_rows_are_from(tmp_path, tiny_bases, capsys):
    renamed = [{"dialog": row["messages"]} for row in home_rows(20)]
    columns = {"messages": "dialog"}
    data = {"path": None, "mix": [{"path": "renamed.jsonl", "repeat": 2, "columns": columns}], "eval_split": 0.2}
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data=data)
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    assert _train(capsys, tmp_path, recipe)[0] == 0
    code, found = _json(capsys, "eval", "tiny", "--registry", tmp_path / "registry", "--generate", 0)
    assert code == 0
    assert found["data"].endswith("renamed.jsonl")
    own = ("--registry", tmp_path / "registry", "--data", tmp_path / "renamed.jsonl", "--generate", 0)
    code, found = _json(capsys, "eval", "tiny", *own)
    assert (code, found["counts"]["rows"]) == (0, 20)


def test_eval_leaves_out_rows_longer_than_those_trained_and_says_so(trained, tmp_path, capsys):
    long = {"messages": [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "y " * 50}]}
    rows = write_jsonl(tmp_path / "long.jsonl", [long, *home_rows(3)])
    code, found = _json(
        capsys, "eval", "tiny", "--registry", trained / "adapters", "--data", rows, "--generate", 0
    )  # fmt: skip
    assert code == 0
    assert (found["counts"]["rows"], found["counts"]["rows_dropped"]) == (3, 1)
    assert any("1 of 4 rows" in warning and "256 tokens" in warning for warning in found["warnings"])
    write_jsonl(rows, [long])
    code, found = _json(capsys, "eval", "tiny", "--registry", trained / "adapters", "--data", rows, "--generate", 0)
    assert code == 65
    assert found["error"]["hint"].startswith("give shorter rows")


def test_a_folder_with_a_dot_in_its_name_may_hold_out_rows_of_its_own(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0, data={"path": "set.v1"}, eval={"every_steps": 1})
    write_jsonl(tmp_path / "set.v1" / "train.jsonl", home_rows(4))
    write_jsonl(tmp_path / "set.v1" / "valid.jsonl", home_rows(6)[4:])
    code, found = _json(capsys, "check", recipe)
    assert code == 0, found
    assert found["data"]["held_out_rows"] == 2


def test_no_escape_of_a_row_reaches_the_terminal_through_an_error(tmp_path, tiny_bases, capsys):
    recipe = write_recipe(tmp_path, tiny_bases(), held_out=0)
    write_jsonl(tmp_path / "rows.jsonl", [{"\x1b[31mevil\x07": "x", "b": "y"}])
    assert run(["check", str(recipe)]) == 65
    said = capsys.readouterr().err
    assert "␛[31mevil␇" in said
    assert not {"\x1b", "\x07"} & set(said)
    assert said.count("\n") > 3


@pytest.mark.parametrize("verb", [["check", "--tokens"], ["train"]])
def test_text_rows_too_need_a_template_and_the_refusal_names_one(tmp_path, tiny_bases, capsys, verb):
    import shutil

    base = shutil.copytree(tiny_bases("gpt2"), tmp_path / "plain-base")
    (base / "chat_template.jinja").unlink()
    recipe = write_recipe(tmp_path, base, held_out=0)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"turn on the lights {n}"} for n in range(8)])
    places = ["--run-dir", tmp_path / "run", "--registry", tmp_path / "registry"] if verb == ["train"] else []
    code, found = _json(capsys, *verb, recipe, *places)
    assert code == 65
    assert "rows of plain text" in found["error"]["message"]
    assert "builtin:plain" in found["error"]["hint"]
    assert not (tmp_path / "run").exists()
    code, _ = _json(capsys, *verb, recipe, *places, "--set", "data.chat_template=builtin:plain")
    assert code == 0
