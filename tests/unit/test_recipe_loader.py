"""A recipe's mistakes: each named with its field and line, all at once, and nothing written."""

from pathlib import Path

import pytest

from lora_tune.errors import LoraTuneError, MissingInputError, RecipeError, UsageError
from lora_tune.recipe.closed_yaml import parse
from lora_tune.recipe.conflicts import conflicts
from lora_tune.recipe.loader import dump_recipe, load_recipe, portable
from lora_tune.recipe.schema import Recipe

GOOD = """\
version: 1
base: {name: builtin:smollm2-135m}
data: {path: rows.jsonl, eval_split: 0.1}
lora: {rank: 8, alpha: 16}
train: {learning_rate: 2e-4, epochs: 2}
eval: {every_steps: 10, generate: 32}
output: {name: home}
"""

# (what is wrong, old text, new text, field in the message, line, exit code)
MISTAKES = [
    ("section misspelt", "train:", "trian:", "trian", 5, 65),
    ("key misspelt in base", "{name:", "{nmae:", "base.nmae", 2, 65),
    ("key misspelt in data", "eval_split", "eval_spilt", "data.eval_spilt", 3, 65),
    ("key misspelt in lora", "rank", "rnak", "lora.rnak", 4, 65),
    ("key misspelt in train", "learning_rate", "learningrate", "train.learningrate", 5, 65),
    ("key misspelt in eval", "generate", "genrate", "eval.genrate", 6, 65),
    ("key misspelt in output", "{name: home}", "{nme: home}", "output.nme", 7, 65),
    ("key of another section", "rank: 8", "learning_rate: 8", "lora.learning_rate", 4, 65),
    ("required key missing", "{name: builtin:smollm2-135m}", "{quantization: nf4}", "base.name", 2, 65),
    ("text for a number", "rank: 8", "rank: eight", "lora.rank", 4, 65),
    ("quoted number", "rank: 8", 'rank: "8"', "lora.rank", 4, 65),
    ("fraction for a whole number", "rank: 8", "rank: 8.5", "lora.rank", 4, 65),
    ("boolean for a number", "epochs: 2", "epochs: true", "train.epochs", 5, 65),
    ("list for a text", "name: home", "name: [home]", "output.name", 7, 65),
    ("null for a required value", "path: rows.jsonl", "path: null", "data.path", 3, 65),
    ("rank out of range", "rank: 8", "rank: 0", "lora.rank", 4, 65),
    ("learning rate out of range", "2e-4", "-2e-4", "train.learning_rate", 5, 65),
    ("learning rate not a number", "2e-4", ".nan", "train.learning_rate", 5, 65),
    ("split out of range", "eval_split: 0.1", "eval_split: 1.5", "data.eval_split", 3, 65),
    ("unknown choice", "smollm2-135m}", "smollm2-135m, quantization: nf5}", "base.quantization", 2, 65),
    ("bad name", "name: home", "name: ../home", "output.name", 7, 65),
    ("unknown version", "version: 1", "version: 2", "version", 1, 65),
    ("key written twice", "rank: 8", "rank: 8, rank: 4", "lora.rank", 4, 65),
    ("section written twice", "output:", "lora: {rank: 2}\noutput:", "lora", 7, 65),
    ("anchor and alias", "{rank: 8, alpha: 16}", "&a {rank: 8}\nx: *a", "anchor", 4, 65),
    ("tag", "name: home", "name: !!python/object:os.system home", "tag", 7, 65),
    ("environment variable", "name: home", "name: '${HF_TOKEN}'", "output.name", 7, 65),
    ("not YAML", "lora: {rank", "lora: {rank: [", "not valid YAML", 4, 65),
    ("no held-out rows to measure", ", eval_split: 0.1", "", "eval.every_steps", 6, 65),
    ("split and file of held-out rows", "eval_split: 0.1", "eval_split: 0.1, eval_path: rows.jsonl", "data.eval_split", 3, 65),
    ("patience without measurements", "every_steps: 10", "early_stopping_patience: 2", "eval.early_stopping_patience", 6, 65),
    ("revision of a built-in", "smollm2-135m}", "smollm2-135m, revision: main}", "base.revision", 2, 65),
    ("head as a target", "rank: 8", "targets: [q_proj, lm_head]", "lora.targets", 4, 65),
    ("dora on int8", "rank: 8", "variant: dora", "lora.variant", 4, 65),
    ("rows not there", "rows.jsonl", "nowhere.jsonl", "data.path", 3, 66),
    ("held-out rows not there", "eval_split: 0.1", "eval_path: nowhere.jsonl", "data.eval_path", 3, 66),
    ("template not there", "eval_split: 0.1", "eval_split: 0.1, chat_template: no.jinja", "data.chat_template", 3, 66),
    ("template that is no file", "eval_split: 0.1", "eval_split: 0.1, chat_template: '{{ messages }}'", "data.chat_template", 3, 66),
    ("unknown built-in template", "eval_split: 0.1", "eval_split: 0.1, chat_template: builtin:zzz", "data.chat_template", 3, 65),
    ("large template", "eval_split: 0.1", "eval_split: 0.1, chat_template: large.jinja", "data.chat_template", 3, 65),
    ("template not UTF-8", "eval_split: 0.1", "eval_split: 0.1, chat_template: latin.jinja", "data.chat_template", 3, 65),
    ("misspelt built-in base", "builtin:smollm2-135m", "builtin:smollm", "base.name", 2, 65),
    ("path too long", "rows.jsonl", "r" * 300 + ".jsonl", "data.path", 3, 66),
    ("base name too long", "builtin:smollm2-135m", "r" * 300, "base.name", 2, 66),
    ("home of nobody", "rows.jsonl", "~no-such-user/rows.jsonl", "data.path", 3, 66),
    ("base in the home of nobody", "builtin:smollm2-135m", "~no-such-user/base", "base.name", 2, 66),
    ("rows built in", "rows.jsonl", "builtin:rows", "data.path", 3, 66),
    ("directive", "version: 1", "%YAML 1.1\n---", "directive %YAML", 1, 65),
    ("unknown directive", "version: 1", "%FOO bar\n---", "directive %FOO", 1, 65),
    ("version is true", "version: 1", "version: true", "version", 1, 65),
    ("version is a fraction", "version: 1", "version: 1.0", "version", 1, 65),
    ("head by its full name", "rank: 8", "targets: [model.lm_head]", "lora.targets", 4, 65),
    ("base folder not there", "builtin:smollm2-135m", "./no-such-folder", "base.name", 2, 66),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "large.jinja").write_text("x" * (64 * 1024 + 1))
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    return tmp_path


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_there_are_at_least_thirty_mistakes():
    assert len(MISTAKES) >= 30


@pytest.mark.parametrize(("what", "old", "new", "field", "line", "code"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_each_mistake_is_named_with_field_and_line_and_nothing_is_written(folder, what, old, new, field, line, code):
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if what == "dora on int8":
        text = text.replace("smollm2-135m}", "smollm2-135m, quantization: int8}")
    path = _write(folder, text)
    before = sorted(folder.rglob("*"))
    with pytest.raises(LoraTuneError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == code, caught.value.message
    assert f"line {line}: " in caught.value.message, caught.value.message
    assert field in caught.value.message
    assert caught.value.hint
    assert sorted(folder.rglob("*")) == before


def test_the_good_recipe_is_good(folder):
    recipe = load_recipe(_write(folder, GOOD)).recipe
    assert recipe.train.learning_rate == 2e-4
    assert recipe.lora.scaling == 2.0


def test_all_problems_come_together_with_suggestions(folder):
    text = GOOD.replace("rank", "rnak").replace("2e-4", "fast").replace("rows.jsonl", "gone.jsonl")
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(folder, text))
    message = caught.value.message
    assert "3 problems" in message
    assert "did you mean `rank`" in message
    assert "train.learning_rate" in message
    assert "no file at" in message


def test_a_key_of_another_section_is_sent_there(folder):
    with pytest.raises(RecipeError, match="belongs to section `train`"):
        load_recipe(_write(folder, GOOD.replace("rank: 8", "epochs: 8")))


def test_yaml_12_scalars():
    values = parse("a: 2e-4\nb: no\nc: 12:30:45\nd: 2026-01-01\ne: ~\nf: 0x10").value
    assert values == {"a": 2e-4, "b": "no", "c": "12:30:45", "d": "2026-01-01", "e": None, "f": 16}


def test_an_alias_bomb_and_deep_nesting_are_refused_unexpanded():
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    assert any("anchor" in problem.message for problem in parse(bomb).problems)
    assert parse("[" * 100 + "]" * 100).problems
    assert parse("x: " + "y" * 300_000).problems


def test_set_overrides_the_recipe_and_its_mistakes_are_named(folder):
    path = _write(folder, GOOD)
    recipe = load_recipe(path, ["lora.rank=4", "lora.targets=[q_proj, v_proj]", "train.learning_rate=5e-4"]).recipe
    assert (recipe.lora.rank, recipe.lora.targets, recipe.train.learning_rate) == (4, ("q_proj", "v_proj"), 5e-4)
    with pytest.raises(RecipeError, match=r"--set lora\.rnak"):
        load_recipe(path, ["lora.rnak=4"])
    with pytest.raises(UsageError):
        load_recipe(path, ["rank"])


@pytest.mark.parametrize(
    "override", ["lora.rank=[", "lora.rank=&a 4", "lora.rank=eight", "base.name=*a", "data.path='${ROWS}", "lora=5"]
)
def test_a_bad_override_is_reported_once(folder, override):
    for text in (GOOD, GOOD.replace("{name: builtin:smollm2-135m}", "{}")):
        if text != GOOD and not override.startswith("base.name"):
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(_write(folder, text), [override])
        assert "1 problem\n" in caught.value.message, caught.value.message
        assert f"--set {override.partition('=')[0]}: " in caught.value.message


def test_a_misspelt_builtin_gets_a_suggestion(folder):
    with pytest.raises(RecipeError, match="did you mean `builtin:smollm2-135m`"):
        load_recipe(_write(folder, GOOD.replace("smollm2-135m", "smollm")))


def test_a_template_may_have_any_suffix(folder):
    (folder / "chat.txt").write_text("{{ messages }}")
    text = GOOD.replace("eval_split: 0.1", "eval_split: 0.1, chat_template: chat.txt")
    assert load_recipe(_write(folder, text)).recipe.data.chat_template == str(folder / "chat.txt")
    text = text.replace("chat.txt", "builtin:plain")
    assert load_recipe(_write(folder, text)).recipe.data.chat_template == "builtin:plain"


def test_the_gpu_recipes_measure_while_they_train():
    recipes = sorted(Path(__file__).parents[2].glob("recipes/gpu/*.yaml"))
    assert len(recipes) >= 5
    for path in recipes:
        recipe = load_recipe(path).recipe
        rows = len(Path(recipe.data.path).read_text().splitlines())
        per_step = recipe.train.micro_batch_sequences * recipe.train.gradient_accumulation_steps
        assert recipe.eval.every_steps is not None
        assert rows / per_step * recipe.train.epochs >= 2 * recipe.eval.every_steps, path


def test_the_resolved_recipe_loads_to_an_equal_one(folder):
    recipe = load_recipe(_write(folder, GOOD)).recipe
    again = folder / "resolved.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again).recipe == recipe


def test_a_portable_recipe_names_no_folder_of_this_machine(folder):
    recipe = load_recipe(_write(folder, GOOD)).recipe
    assert Path(recipe.data.path).is_absolute()
    assert str(folder) not in str(portable(recipe))


def test_a_missing_recipe_says_where_recipes_are(tmp_path):
    with pytest.raises(MissingInputError) as caught:
        load_recipe(tmp_path / "no.yaml")
    assert "recipes ls" in caught.value.hint


# (override, what the message says)
EXPLAINED = [
    ("data.mix=[{path: rows.jsonl}]", "data.path: one of data.path and data.mix says where the rows are; both are set; add `--set data.path=null`"),
    ("data.mix=rows.jsonl", "data.mix: found 'rows.jsonl'; expected a list"),
    ("data.mix=[rows.jsonl]", "data.mix[1]: found 'rows.jsonl'; expected a set such as {path: rows.jsonl, weight: 2}"),
    ("data.mix=[{path: rows.jsonl, format: chta}]", "data.mix[1].format: found 'chta'; input should be"),
    ("data.mix=[{path: rows.jsonl, format: chta}]", "did you mean `chat`?"),
    ("data.mix=[{path: rows.jsonl, repeat: often}]", "data.mix[1].repeat: found 'often'; input should be a valid number"),
    ("data.columns=[a]", "data.columns: found ['a']; expected settings such as {ours: yours}"),
    ("augment.prompts=['no']", "augment.prompts: found 'no'; expected a list of texts, each with {prompt} once"),
    ("augment.prompts=Please {prompt}", "augment.prompts: found 'Please {prompt}'; expected a list of texts, each with {prompt} once"),
    ("data.max_lost_tokens=5", "data.max_lost_tokens: found 5; expected a share such as 5%"),
    ("data.max_lost_tokens=5.0.1%", "data.max_lost_tokens: found '5.0.1%'; expected a share such as 5%"),
    ("output.name=My Home", "output.name: found 'My Home'; expected lower-case letters, digits and hyphens"),
    ("lora.targets=[q proj]", "lora.targets: found ['q proj']; expected all-linear, or a list of layer names"),
    ("lora.targets=[]", "lora.targets: found []; expected all-linear, or a list of layer names"),
    ("data.eval_path=hub:a/b", "data.eval_path: 'hub:a/b' is a hub dataset; held-out rows are a file or a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), EXPLAINED)
def test_a_mistake_is_explained_in_words_that_say_what_is_expected(folder, override, said):
    text = GOOD.replace(", eval_split: 0.1", "").replace("every_steps: 10, generate: 32", "generate: 0")
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(folder, text), [override])
    assert said in caught.value.message, caught.value.message
    for jargon in ("tuple", "pattern", "MixedSet", "valid string", "dictionary"):
        assert jargon not in caught.value.message


def test_a_path_set_beside_a_mixture_is_told_how_to_replace_it(folder):
    text = GOOD.replace("path: rows.jsonl", "mix: [{path: rows.jsonl}]")
    with pytest.raises(RecipeError, match=r"add `--set data\.mix=\[\]`"):
        load_recipe(_write(folder, text), ["data.path=rows.jsonl"])
    assert load_recipe(_write(folder, text), ["data.path=rows.jsonl", "data.mix=[]"]).recipe.data.mix == ()


@pytest.mark.parametrize(("name", "is_file"), [
    ("set.v1", False), ("v1.2", False), ("plain", False), ("hub:a/b.jsonl", False), ("rows.jsonl", True), ("rows.CSV", True),
    ("rows.csv.gz", True), ("rows.parquet", True), ("set.v1.gz", False),
])  # fmt: skip
def test_only_a_file_is_known_to_bring_no_held_out_rows_of_its_own(name, is_file):
    recipe = Recipe.model_validate({"base": {"name": "b"}, "data": {"path": name}, "eval": {"every_steps": 1}})
    assert [field for field, _ in conflicts(recipe)] == (["eval.every_steps"] if is_file else [])
