"""A passport is a stranger's words: nothing in it reaches the model, a file or the terminal unchecked."""

import json
from copy import deepcopy

import pytest

from lora_tune.adapter.card import model_card
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.manifest import FILE_NAME, dump_manifest, read_manifest
from lora_tune.errors import AdapterError, AdapterMismatchError
from lora_tune.model.fingerprint import canonical_digest, file_digest
from tests.unit.test_door import write

DIGEST = "0" * 64
RECIPE = {"base": {"name": "base"}, "data": {"path": "rows.jsonl"}}
PROBE = {
    "prompt": "Hello?", "input_ids": [1, 2, 3, 4, 5], "answer_start": 3, "top_ids": [[7, 8], [9, 1]],
    "top_logprobs": [[-0.5, -1.5], [-0.5, -1.5]], "base_logprobs": [[-0.5, -1.5], [-0.5, -1.5]],
}  # fmt: skip
PASSPORT = {
    "format": 1, "name": "home", "recipe_digest": canonical_digest(RECIPE), "versions": {"lora_tune": "0.1.0"}, "figures": {"train_loss": 1.0},
    "base": {"name": "base", "revision": None, "quantization": "none", "dtype": "fp32", "config": DIGEST, "tensors": DIGEST, "weights": DIGEST},
    "tokenizer": {"tokenizer": DIGEST, "chat_template": DIGEST, "own_template": None},
    "lora": {"rank": 2, "alpha": 4.0, "scaling": 2.0, "dropout": 0.0, "variant": "lora", "targets": ["q_proj", "v_proj"], "n_parameters": 64},
    "data": {"digest": DIGEST, "rows": 1, "tokens": 9, "trained_tokens": 3, "train_on": "assistant", "max_seq_tokens": 64, "system_message": None},
    "recipe": RECIPE,
    "probes": [PROBE],
}  # fmt: skip


def with_passport(folder, change=None, *, text=None):
    """Write an adapter with a passport; `change` maps a dotted field to its value, and its recipe's digest follows."""
    write(folder)
    passport = deepcopy(PASSPORT)
    passport |= {"weights_digest": file_digest(folder / WEIGHTS), "config_digest": file_digest(folder / CONFIG)}
    for field, value in (change or {}).items():
        *path, last = field.split(".")
        target = passport
        for part in path:
            target = target[int(part) if part.isdecimal() else part]
        target[last] = value
    if "recipe_digest" not in (change or {}):
        passport["recipe_digest"] = canonical_digest(passport["recipe"])
    (folder / FILE_NAME).write_bytes(json.dumps(passport).encode() if text is None else text)
    return folder


def test_a_passport_is_read_and_its_recipe_has_every_setting(tmp_path):
    manifest = open_adapter(with_passport(tmp_path / "a")).manifest
    assert manifest.recipe["base"]["dtype"] == "auto"
    assert manifest.recipe["data"]["max_seq_tokens"] == 1024
    # Written anew, with every setting, it is still a passport.
    assert manifest.recipe_digest == canonical_digest(manifest.recipe) != PASSPORT["recipe_digest"]
    (tmp_path / "a" / FILE_NAME).write_text(dump_manifest(manifest))
    assert open_adapter(tmp_path / "a").manifest == manifest


def test_a_recipe_that_was_changed_is_refused_by_its_digest(tmp_path):
    digest = PASSPORT["recipe_digest"]
    with pytest.raises(AdapterMismatchError, match="recipe_digest") as caught:
        open_adapter(with_passport(tmp_path / "a", {"recipe.train": {"learning_rate": 0.5}, "recipe_digest": digest}))
    assert caught.value.where == "recipe_digest"
    assert caught.value.hint


def probe(**change):
    return {"probes": [PROBE | change]}


HOSTILE = {
    "no probes": ({"probes": []}, "probes"),
    "seventeen probes": ({"probes": [PROBE] * 17}, "probes"),
    "a probe without tokens": (probe(input_ids=[]), "probes.0.input_ids"),
    "a probe of one token": (probe(input_ids=[1]), "probes.0.input_ids"),
    "a probe of too many tokens": (probe(input_ids=[1] * 4097), "probes.0.input_ids"),
    "a negative token": (probe(input_ids=[1, 2, 3, 4, -5]), "probes.0.input_ids"),
    "a huge token": (probe(input_ids=[1, 2, 3, 4, 2**31 + 1]), "probes.0.input_ids"),
    "a huge likeliest token": (probe(top_ids=[[7, 8], [9, 2**64]]), "probes.0.top_ids"),
    "an answer that starts at 0": (probe(answer_start=0), "probes.0.answer_start"),
    "an answer that starts past the end": (probe(answer_start=6), "probes.0"),
    "fewer rows than positions": (probe(top_ids=[[7, 8]]), "probes.0"),
    "more rows than positions": (probe(base_logprobs=[[-1.0, -2.0]] * 3), "probes.0"),
    "rows of other widths": (probe(top_logprobs=[[-0.5, -1.5], [-0.5]]), "probes.0"),
    "empty rows": (probe(top_ids=[[], []], top_logprobs=[[], []], base_logprobs=[[], []]), "probes.0"),
    "wide rows": (probe(top_ids=[[7] * 65] * 2, top_logprobs=[[-1.0] * 65] * 2, base_logprobs=[[-1.0] * 65] * 2), "probes.0"),
    "a log-probability that is no number": (probe(top_logprobs=[[-0.5, float("nan")], [-0.5, -1.5]]), "probes.0.top_logprobs"),
    "an infinite log-probability": (probe(base_logprobs=[[-0.5, float("-inf")], [-0.5, -1.5]]), "probes.0.base_logprobs"),
    "an infinite figure": ({"figures.train_loss": float("inf")}, "figures"),
    "an empty recipe": ({"recipe": {}}, "recipe.base"),
    "a recipe with an unknown key": ({"recipe.base.code": "x"}, "recipe.base.code"),
    "a recipe of another type": ({"recipe.base.dtype": 5}, "recipe.base.dtype"),
    "a huge template": ({"tokenizer.own_template": "x" * (64 * 1024 + 1)}, "own_template"),
    "a revision that is a path": ({"base.revision": "../../../etc"}, "base.revision"),
    "a digest that is a path": ({"base.weights": "../" * 21 + "x"}, "base.weights"),
    "a digest with a line break": ({"base.weights": DIGEST + "\n"}, "base.weights"),
    "a base without a name": ({"base.name": ""}, "base.name"),
    "a base's name that is a book": ({"base.name": "x" * 513}, "base.name"),
    "a name that a terminal obeys": ({"name": "x\x1b[2Jy"}, "control"),
    "a base's name that a terminal obeys": ({"base.name": "x\x9b2Jy"}, "control"),
    "a base's name in turned letters": ({"base.name": "x\u202ey"}, "control"),
    "a version of two lines": ({"versions.torch": "2\nerror: no"}, "control"),
    "a figure that a terminal obeys": ({"figures.\x1b]0;x": 1.0}, "control"),
    "a recipe that a terminal obeys": ({"recipe.base.name": "x\x1b[2Jy"}, "control"),
    "a prompt that a terminal obeys": (probe(prompt="x\x1b[2Jy"), "control"),
    "a field that a terminal obeys": ({"\x1b[2J": 1}, "x1b"),
    "half a character": ({"name": "x\udc80"}, ""),
    "a name that is a path": ({"name": "/tmp/escaped/pwn"}, "name is"),
    "a name that leads upwards": ({"name": "../../x"}, "name is"),
    "a name that is markup": ({"name": "x` <img src=http://evil/t.png>"}, "name is"),
    "a name with a line break": ({"name": "x\n"}, ""),
    "a name of 64 characters": ({"name": "x" * 64}, "name is"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_passport_is_refused_naming_the_field(tmp_path, change, said):
    with pytest.raises(AdapterError) as caught:
        open_adapter(with_passport(tmp_path / "a", change))
    assert caught.value.exit_code == 77
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"", b"{", b"[]", b"[" * 100_000, b'"\xed\xa0\x80"'])
def test_what_is_no_passport_is_refused(tmp_path, text):
    with pytest.raises(AdapterError) as caught:
        open_adapter(with_passport(tmp_path / "a", text=text))
    assert caught.value.message.isprintable()


def test_a_passport_of_other_files_is_refused(tmp_path):
    with pytest.raises(AdapterMismatchError, match="weights_digest"):
        open_adapter(with_passport(tmp_path / "a", {"weights_digest": DIGEST}))


def test_words_for_the_model_may_have_lines(tmp_path):
    change = {"tokenizer.own_template": "{{ a }}\n\t", "data.system_message": "One.\nTwo."}
    manifest = open_adapter(with_passport(tmp_path / "a", change)).manifest
    assert manifest.data.system_message == "One.\nTwo."


@pytest.mark.parametrize(("name", "revision", "hub"), [("owner/base", "a" * 40, True), ("gpt2", "a" * 40, True),
                                                       ("builtin:smollm2-135m", None, False), ("my-base", None, False)])  # fmt: skip
def test_the_card_shows_a_way_that_works_for_the_base(tmp_path, name, revision, hub):
    folder = with_passport(tmp_path / "a", {"base.name": name, "base.revision": revision})
    card = model_card(read_manifest((folder / FILE_NAME).read_text(), where="x"))
    assert ("AutoPeftModelForCausalLM" in card) is hub
    assert ("PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(" in card) is not hub
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
