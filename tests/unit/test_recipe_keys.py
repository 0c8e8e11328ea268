"""No dead keys: for each setting, a changed value changes something that is built from it."""

from pathlib import Path
from typing import Any

import pytest

from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.lint import check_rows
from lora_tune.model.load import Device, place, read_template
from lora_tune.model.resolve import locate
from lora_tune.recipe.schema import SECTIONS, BaseSection, DataSection, EvalSection, LoraSection, Recipe, TrainSection
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


def test_data_settings_change_the_rows(tmp_path, tokenizer):
    rows = write_jsonl(tmp_path / "rows.jsonl", home_rows(20))
    held = write_jsonl(tmp_path / "held.jsonl", home_rows(24)[20:])
    two_turns = write_jsonl(tmp_path / "two.jsonl", [
        {"messages": [*row["messages"], {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "bye"}]}
        for row in home_rows(3)
    ])  # fmt: skip
    alpaca = write_jsonl(
        tmp_path / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b", "prompt": "p", "completion": "c"}]
    )

    def digest(**settings: Any) -> str:
        return prepare_dataset(DataSection(**{"path": str(rows), **settings}), tokenizer, seed=0).digest

    plain = digest()
    assert digest(path=str(held)) != plain
    assert digest(eval_path=str(held)) != plain
    assert digest(eval_split=0.2) != plain
    assert digest(train_on="all") != plain
    assert digest(path=str(two_turns), train_on="completion") != digest(path=str(two_turns))
    longest = prepare_dataset(DataSection(path=str(rows)), tokenizer, seed=0).train.counts.longest_tokens
    assert digest(max_seq_tokens=longest - 1) != plain
    assert digest(max_seq_tokens=longest - 1, too_long="cut_right") != digest(max_seq_tokens=longest - 1)
    named = check_rows(DataSection(path=str(alpaca), format="alpaca"), seed=0).train[0].messages
    assert named != check_rows(DataSection(path=str(alpaca), format="prompt-completion"), seed=0).train[0].messages
    (tmp_path / "own.txt").write_text("{{ messages }}")
    assert read_template("builtin:plain") != read_template(str(tmp_path / "own.txt")) == "{{ messages }}"
