"""No dead keys: for each setting, a changed value changes something that is built from it."""

from pathlib import Path
from typing import Any

import pytest

from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.verdict import check_rows
from lora_tune.errors import DataError
from lora_tune.model.load import Device, place, read_template
from lora_tune.model.resolve import locate
from lora_tune.recipe.schema import (
    SECTIONS,
    AugmentSection,
    BaseSection,
    DataSection,
    EvalSection,
    LoraSection,
    Recipe,
    TrainSection,
)
from lora_tune.training.callbacks import BestWeights
from tests.tiny import home_rows, write_jsonl

CUDA = Device("cuda", computes_bf16=True)
MAX_KEYS = 80

# Settings whose effect another test shows, by its name.
SHOWN_ELSEWHERE = {
    "base.revision": "tests/unit/test_resolve.py::test_a_revision_reaches_the_hub",
    "base.quantization": "tests/integration/test_architectures.py::test_the_base_is_held_as_asked",
    "eval.generate": "tests/e2e/test_verbs.py::test_train_measures_generated_answers",
    "eval.generate_rows": "tests/e2e/test_verbs.py::test_train_measures_generated_answers",
    "output.name": "tests/e2e/test_verbs.py::test_train_exports_registers_and_reports",
    "train.batching": "tests/invariant/test_training_invariants.py::test_each_step_says_its_padding_and_the_last_says_that_of_the_run",
    "augment.neftune_alpha": "tests/invariant/test_training_invariants.py::test_neftune_is_asked_for_only_when_it_is_wanted",
    "train.save_every_steps": "tests/invariant/test_resume.py::test_checkpoints_are_written_when_due_and_so_many_are_kept",
    "train.keep_checkpoints": "tests/invariant/test_resume.py::test_checkpoints_are_written_when_due_and_so_many_are_kept",
    "train.on_oom": "tests/invariant/test_out_of_memory.py::test_shrinking_trains_the_same_steps",
    "train.method": "the only value today is sft; it is recorded in the passport's recipe",
}
TRAIN = {
    "epochs": 5.0, "max_steps": 7, "micro_batch_sequences": 9, "gradient_accumulation_steps": 3, "learning_rate": 0.5,
    "schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.5, "max_grad_norm": 0.5, "gradient_checkpointing": True,
    "seed": 5,
}  # fmt: skip
LORA = {"rank": 3, "alpha": 5.0, "dropout": 0.5, "targets": ("q_proj",), "variant": "rslora"}


def _all_fields() -> list[str]:
    return [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]


def test_every_field_is_covered_here_and_the_total_is_capped():
    data = {f"data.{field}" for field in DataSection.model_fields}
    covered = {f"train.{key}" for key in TRAIN} | {f"lora.{key}" for key in LORA} | data | set(SHOWN_ELSEWHERE)
    covered |= {f"augment.{key}" for key in (*CHANGES, "balance_labels")}
    covered |= {"base.name", "base.dtype", "eval.every_steps", "eval.early_stopping_patience"}
    assert sorted(covered) == sorted(_all_fields())
    assert len(_all_fields()) <= MAX_KEYS


def test_the_tests_named_here_exist():
    root = Path(__file__).resolve().parents[2]
    for shown in SHOWN_ELSEWHERE.values():
        path, colons, name = shown.partition("::")
        assert not colons or f"def {name}(" in (root / path).read_text(encoding="utf-8"), shown


def test_every_field_says_what_it_is():
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
    assert Recipe.model_json_schema()["properties"]["base"]


@pytest.mark.parametrize("key", TRAIN)
def test_train_settings_reach_the_trainer(key):
    from lora_tune.training.trainer import sft_settings

    def built(section: TrainSection) -> dict[str, Any]:
        return sft_settings(section, EvalSection(), place(CUDA, BaseSection(name="x/y")), CUDA)

    assert built(TrainSection(**{key: TRAIN[key]})) != built(TrainSection())


def test_eval_settings_reach_the_trainer():
    from lora_tune.training.trainer import sft_settings

    placement = place(CUDA, BaseSection(name="x/y"))
    assert sft_settings(TrainSection(), EvalSection(every_steps=3), placement, CUDA)["eval_steps"] == 3
    assert BestWeights(EvalSection(every_steps=3, early_stopping_patience=2).early_stopping_patience).patience == 2


@pytest.mark.parametrize("key", LORA)
def test_lora_settings_reach_peft(key):
    from lora_tune.adapter.apply import apply_lora
    from tests.tiny import tiny_model

    def built(section: LoraSection) -> dict[str, Any]:
        return apply_lora(tiny_model("llama"), section, adapter_dtype="fp32").peft_config["default"].to_dict()

    assert built(LoraSection(**{key: LORA[key]})) != built(LoraSection())


def test_base_settings_choose_place_and_dtype(tmp_path):
    assert locate(BaseSection(name="builtin:smollm2-135m")).kind == "builtin"
    assert place(CUDA, BaseSection(name="x/y", dtype="fp32")) != place(CUDA, BaseSection(name="x/y"))


def _digest(tokenizer: Any, path: Path, *, augment: AugmentSection | None = None, **settings: Any) -> str:
    section = DataSection(**{"path": str(path), "max_lost_tokens": "100%", **settings})
    return prepare_dataset(section, tokenizer, seed=0, augment=augment).digest


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", home_rows(20))


def test_data_settings_change_the_rows(tmp_path, tokenizer, rows):
    held = write_jsonl(tmp_path / "held.jsonl", home_rows(24)[20:])
    two_turns = write_jsonl(tmp_path / "two.jsonl", [
        {"messages": [*row["messages"], {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "bye"}]}
        for row in home_rows(3)
    ])  # fmt: skip
    plain = _digest(tokenizer, rows)
    assert _digest(tokenizer, held) != plain
    assert _digest(tokenizer, rows, eval_path=str(held)) != plain
    assert _digest(tokenizer, rows, eval_split=0.2) != plain
    assert _digest(tokenizer, rows, train_on="all") != plain
    for train_on in ("completion", "last_assistant"):
        assert _digest(tokenizer, two_turns, train_on=train_on) != _digest(tokenizer, two_turns)
    mixed = ({"path": str(rows)}, {"path": str(held), "repeat": 2})
    assert prepare_dataset(DataSection(mix=mixed), tokenizer, seed=0).digest != plain
    (tmp_path / "own.txt").write_text("{{ messages }}")
    assert read_template("builtin:plain") != read_template(str(tmp_path / "own.txt")) == "{{ messages }}"


def test_length_settings_change_the_rows(tokenizer, rows):
    counts = prepare_dataset(DataSection(path=str(rows)), tokenizer, seed=0).train.counts
    short = counts.longest_tokens - 3
    digests = {_digest(tokenizer, rows)}
    for too_long in ("drop", "cut_left", "cut_right", "split"):
        digests.add(_digest(tokenizer, rows, max_seq_tokens=short, too_long=too_long))
    assert len(digests) == 5
    with pytest.raises(DataError, match="too_long is fail"):
        _digest(tokenizer, rows, max_seq_tokens=short, too_long="fail")
    with pytest.raises(DataError, match="max_lost_tokens allows 0%"):
        _digest(tokenizer, rows, max_seq_tokens=short, max_lost_tokens="0%")


def test_format_columns_and_bad_rows_settings_change_what_is_read(tmp_path, rows):
    alpaca = write_jsonl(
        tmp_path / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b", "prompt": "p", "completion": "c"}]
    )
    own = write_jsonl(tmp_path / "own.jsonl", [{"question": "a", "answer": "b"}, {"question": "a"}])
    assert check_rows(DataSection(path=str(alpaca), format="alpaca"), seed=0).row_format == "alpaca"
    assert (
        check_rows(DataSection(path=str(alpaca), format="prompt-completion"), seed=0).row_format == "prompt-completion"
    )
    columns = {"prompt": "question", "completion": "answer"}
    with pytest.raises(DataError, match="1 row cannot be used"):
        check_rows(DataSection(path=str(own), columns=columns), seed=0)
    checked = check_rows(DataSection(path=str(own), columns=columns, max_bad_rows=1), seed=0)
    assert (checked.n_train, checked.left_out) == (1, 1)
    with pytest.raises(DataError, match="no full commit"):
        check_rows(DataSection(path="hub:a/b", revision="main"), seed=0)


CHANGES = {
    "copies": 2, "case": 1.0, "typos": 0.2, "punctuation": 1.0, "prompts": ("Hey! {prompt}",),
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_augment_settings_change_the_copies(tokenizer, rows, key):
    plain = {"copies": 1, "punctuation": 0.5, "prompts": ("{prompt} Now.", "Well, {prompt}")}
    changed = _digest(tokenizer, rows, augment=AugmentSection(**{**plain, key: CHANGES[key]}))
    assert changed != _digest(tokenizer, rows, augment=AugmentSection(**plain))


def test_balance_labels_repeats_rare_labels(tmp_path, tokenizer):
    rows = write_jsonl(tmp_path / "l.jsonl", [{"text": f"t{n}", "label": "b" if n == 0 else "a"} for n in range(5)])
    section = DataSection(path=str(rows))
    balanced = prepare_dataset(section, tokenizer, seed=0, augment=AugmentSection(balance_labels=1.0))
    assert balanced.train.counts.rows == 8 != prepare_dataset(section, tokenizer, seed=0).train.counts.rows
