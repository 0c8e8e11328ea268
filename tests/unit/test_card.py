"""The model card: right values, nothing that a stranger's words can turn into markup, and code that runs."""

import contextlib
import io
import json
import shlex
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from lora_tune.adapter.card import code, front_matter, hub_id, model_card, plain, unverified_card, yaml_text
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.manifest import FILE_NAME, dump_manifest, has_control, read_manifest
from lora_tune.model.fingerprint import file_digest
from tests.tiny import CHATML
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import DIGEST, PASSPORT

HOSTILE = [
    "x", "a: b", "'\"", "\\", "---", "- x", "# x", "*x*", "[x](https://evil.example)", "![x](https://evil.example/x.png)",
    "<script>alert(1)</script>", "<img src=x onerror=y>", "x|y", "`x`", "```", "${HF_TOKEN}", "{{ x }}", "!!python/object:os.system",
    "https://evil.example", "www.evil.example", "@someone", "&amp;", "no", "null", "1e3", "~", "{a: b}", "[a]", "%x", "日本語", "naïve 🙂", "$x^2$",
    "a\ufeffb", "x\ufffe", " x ", "x#y", "x: #", "|", "> x", "1. x", "+ x", "= x", "x\\|y", "'; rm -rf ~; '", "$(touch x)",
]  # fmt: skip
WORDS = st.text(min_size=1, max_size=60).filter(lambda text: not has_control(text))


def manifest(**change):
    passport = deepcopy(PASSPORT) | {"weights_digest": DIGEST, "config_digest": DIGEST}
    for field, value in change.items():
        *path, last = field.split("__")
        target = passport
        for part in path:
            target = target[part]
        target[last] = value
    return read_manifest(json.dumps(passport), where="x")


def head(card):
    text = card.split("---\n")[1]
    return YAML(typ="safe", pure=True).load(text)


def rendered(card):
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)


def blocks(card, language):
    return [token.content for token in rendered(card) if token.type == "fence" and token.info == language]


def digests(folder):
    return {"weights_digest": file_digest(folder / WEIGHTS), "config_digest": file_digest(folder / CONFIG)}


def hub(**change):
    return manifest(base__name="owner/base", base__revision="a" * 40, **change)


def test_the_head_names_base_library_and_tags():
    found = head(model_card(hub()))
    assert found == {"base_model": "owner/base", "base_model_relation": "adapter", "library_name": "peft",
                     "pipeline_tag": "text-generation", "tags": ["lora", "lora_tune"]}  # fmt: skip
    assert "license" not in found
    assert head(model_card(hub(lora__variant="dora", base__quantization="nf4")))["tags"] == [
        "lora",
        "dora",
        "qlora",
        "lora_tune",
    ]


def test_a_base_that_no_hub_knows_is_not_named_to_it():
    assert "base_model" not in head(model_card(manifest(base__name="builtin:smollm2-135m")))
    assert "base_model" not in head(model_card(manifest(base__name="my-base")))


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_stay_words_in_the_head(words):
    found = head(front_matter(words, [words, "lora"]) + "\n")
    assert (found["base_model"], found["tags"]) == (words, [words, "lora"])


@given(WORDS)
def test_any_words_are_one_yaml_string(words):
    assert YAML(typ="safe", pure=True).load(f"x: {yaml_text(words)}\n") == {"x": words}


class Markup(HTMLParser):
    """Collects text and tags of HTML."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def shown(markdown):
    parser = Markup()
    parser.feed(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown))
    return parser


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_stay_words_in_the_text(words):
    as_text, as_code = shown(f"x {plain(words)} y"), shown(f"x {code(words)} y")
    assert as_text.tags == ["p"]
    assert as_code.tags == ["p", "code"]
    row = shown(f"| a | b |\n|---|---|\n| {plain(words)} | {code(words)} |\n")
    assert (row.tags.count("td"), row.tags.count("a"), row.tags.count("img"), row.tags.count("code")) == (2, 0, 0, 1)
    if words.isprintable() and words == words.strip():
        assert as_text.text.strip() == f"x {words} y"
        assert as_code.text.strip() == f"x {words.replace('|', chr(92) + '|')} y"


@given(WORDS)
@example(" ")
@example("    four spaces are no code block")
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_words_are_only_text(words):
    assert shown(f"x {plain(words)} y").tags == ["p"]
    assert shown(plain(words) or "x").tags == ["p"]
    assert shown(f"x {code(words)} y").tags == ["p", "code"]


@pytest.mark.parametrize("words", HOSTILE)
def test_a_card_of_hostile_words_has_the_outline_of_any_card(words):
    def outline(card):
        tokens = rendered(card)
        kinds = [token.type for token in tokens if token.type != "inline"]
        inner = [
            child.type
            for token in tokens
            for child in token.children or ()
            if child.type in ("link_open", "image", "html_inline")
        ]
        return kinds, inner

    change = {"name": words, "base__name": words, "base__revision": "a" * 40, "data__train_on": words, "versions": {"lora_tune": words, words: words},
              "figures": {words: 1.0}, "recipe": {"train": {"schedule": words}}, "lora__targets": (words, "v_proj"), "data__system_message": words}  # fmt: skip
    harmless = {key: ("x" if value == words else value) for key, value in change.items()}
    harmless |= {
        "versions": {"lora_tune": "x", "y": "x"},
        "figures": {"x": 1.0},
        "recipe": {"train": {"schedule": "x"}},
        "lora__targets": ("x", "v_proj"),
    }
    hostile = model_card(manifest(**change))
    assert outline(hostile) == outline(model_card(manifest(**harmless)))
    assert outline(hostile)[1] == []
    for text in blocks(hostile, "python"):
        compile(text, "card", "exec")
    for line in "".join(blocks(hostile, "sh")).splitlines():
        assert shlex.split(line)[0] in ("lora-tune", "vllm", "hf")
    assert words in [name for line in blocks(hostile, "sh") for name in shlex.split(line)]


def test_figures_of_the_base_stand_beside_the_adapter_s():
    card = model_card(
        manifest(figures={"base_held_out_exact_match": 0.125, "held_out_exact_match": 0.5, "train_loss": 0.25})
    )
    assert "| held out exact match | 0.125 | 0.5 |" in card
    assert "| train loss |  | 0.25 |" in card
    assert "base held out" not in card
    assert "Nothing was measured" in model_card(manifest(figures={}))


def test_counts_recipe_digests_and_versions_are_there():
    recipe = {
        "base": {"name": "b"},
        "train": {"learning_rate": 0.002, "seed": 7},
        "lora": {"targets": ["q_proj", "v_proj"]},
    }
    card = model_card(
        hub(
            recipe=recipe,
            data__rows=1234,
            recipe_digest="1" * 64,
            data__digest="2" * 64,
            versions={"lora_tune": "0.1.0", "peft": "0.21.2"},
        )
    )
    for part in ("1,234 rows, 9 tokens, 3 of them trained", "`train.learning_rate: 0.002`", "`train.seed: 7`", "`lora.targets: q_proj, v_proj`",
                 "1" * 64, "2" * 64, "peft 0.21.2", "`owner/base` at `" + "a" * 40):  # fmt: skip
        assert part in card


def test_a_system_message_is_shown_whole_and_cannot_end_its_block():
    words = "Be kind.\n```\n# not a heading\n````\n<b>"
    card = model_card(manifest(data__system_message=words))
    assert [token.content for token in rendered(card) if token.type == "fence" and not token.info] == [words + "\n"]
    assert "system_message" in blocks(card, "python")[0]
    assert "and so on" in model_card(manifest(data__system_message="x" * 3000))


def test_vllm_is_started_with_a_rank_that_takes_the_adapter_and_dora_is_merged():
    assert "--max-lora-rank 320" in blocks(model_card(hub(lora__rank=300)), "sh")[-1]
    line = shlex.split(blocks(model_card(hub(name="home=x y"), repo="me/home"), "sh")[-1])
    assert line[line.index("--lora-modules") + 1] == "home-x-y=me/home"
    assert line[2:5] == ["owner/base", "--revision", "a" * 40]
    for change in ({"lora__variant": "dora"}, {"lora__rank": 600}):
        assert "lora-tune merge" in blocks(model_card(hub(**change)), "sh")[-1]


def test_a_template_of_its_own_is_given_to_each_engine():
    card = model_card(hub(tokenizer__own_template="{{ x }}"))
    assert 'tokenizer.chat_template = passport["tokenizer"]["own_template"]' in card
    assert "--chat-template template.jinja" in card
    assert "--chat-template" not in model_card(hub())


def test_a_card_for_a_repository_shows_where_it_is():
    card = model_card(hub(), repo="me/home")
    assert "THIS_FOLDER" not in card
    assert "hf download me/home --local-dir ./home\n" in card
    assert 'PeftModel.from_pretrained(base, "me/home")' in card


def test_an_adapter_without_a_passport_is_called_unverified(tmp_path):
    files = open_adapter(write(tmp_path / "a", {"base_model_name_or_path": "owner/base"}))
    card = unverified_card(files, name="x*y", repo="me/x")
    assert head(card)["base_model"] == "owner/base"
    assert "**unverified**" in card
    assert files.weights_digest in card
    assert "# x\\*y" in card
    compile(blocks(card, "python")[0], "card", "exec")
    nameless = open_adapter(write(tmp_path / "b", {"base_model_name_or_path": ""}))
    assert "does not name" in unverified_card(nameless, name="x")


@pytest.mark.parametrize(("name", "is_id"), [("owner/base", True), ("gpt2", False), ("./x/y", False), ("/a/b", False), ("a/b/c", False), ("a/b.gguf", False),
                                             ("builtin:x/y", False), ("a\\b/c", False), ("", False), ("a/", False), ("-a/b", False)])  # fmt: skip
def test_what_a_hub_id_is(name, is_id):
    assert (hub_id(name) == name) == is_id


def test_a_card_made_from_others_says_from_which():
    parents = [{"name": "a*b", "digest": "3" * 64, "weight": 0.5, "verified": True}]
    made = {"method": "resize", "parents": parents, "density": None, "seed": None}
    assert "made by resize from 0.5 × `a*b` (333333333333)" in model_card(manifest(made_from=made))


def test_the_peft_lines_run_and_answer_as_ours_do(tmp_path, tiny_bases):
    import torch
    from transformers import AutoModelForCausalLM

    from lora_tune.adapter.apply import attach_adapter
    from lora_tune.adapter.probes import probe_logits

    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        for target, width in (
            ("q_proj", 64),
            ("v_proj", 32),
        ):  # the widths of the tiny llama: 4 heads of 16, 2 of them for v
            for part, shape in (("A", [2, 64]), ("B", [width, 2])):
                name = f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{part}.weight"
                tensors[name] = ("F32", shape, torch.randn(shape).numpy().tobytes())
    folder = write(tmp_path / "a", content=tensors)
    n_parameters = 2 * (2 * (64 + 64) + 2 * (64 + 32))  # layers x rank x (in + out)
    passport = manifest(
        lora__n_parameters=n_parameters,
        data__system_message="Be\nkind.",
        tokenizer__own_template=CHATML,
        **digests(folder),
    )
    (folder / FILE_NAME).write_text(dump_manifest(passport))
    files = open_adapter(folder)
    text = blocks(model_card(files.manifest), "python")[0]
    text = text.replace("THIS_FOLDER", str(folder)).replace("FOLDER OF THE BASE", str(tiny_bases()))
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(text, names)
    assert said.getvalue()
    assert names["messages"][0] == {"role": "system", "content": "Be\nkind."}
    assert names["tokenizer"].chat_template == CHATML
    base = AutoModelForCausalLM.from_pretrained(tiny_bases(), dtype="float32").eval()
    ids = list(range(3, 40))
    plain_logits = probe_logits(base, ids, 1)
    ours = probe_logits(attach_adapter(base, files, name="default", adapter_dtype="fp32"), ids, 1)
    assert torch.equal(probe_logits(names["model"], ids, 1), ours)
    assert not torch.equal(plain_logits, ours)


def test_vllm_is_told_to_hold_the_base_as_while_training():
    (command,) = blocks(model_card(hub(base__quantization="nf4")), "sh")[-1:]
    assert " --quantization bitsandbytes " in command
    assert "--quantization" not in blocks(model_card(hub()), "sh")[-1]
    card = model_card(hub(base__quantization="int8"))
    assert "lora-tune merge" in blocks(card, "sh")[-1]
    assert "slightly" not in card
