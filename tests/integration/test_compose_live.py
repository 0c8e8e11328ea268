"""Adapters made from others: what PEFT's own sum answers, they answer; every one passes the door and its own probes."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_tune.adapter import compose, derived
from lora_tune.adapter.compose import ComposePlan, compose_adapters
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.live import open_live
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.probes import probe_logits, replay_probes
from lora_tune.adapter.registry import content_digest
from lora_tune.adapter.resize import fold_adapter, resize_adapter
from lora_tune.cli import recipe_verbs
from lora_tune.errors import AdapterMismatchError, CannotCreateError, TrainingError, UsageError
from tests.tiny import write_recipe

IDS = list(range(3, 40))
WEIGHTED = (0.7, -0.4)


def _ignore(*_):
    """Take no note."""


def _train(folder, base, /, **sections):
    folder.mkdir(parents=True)
    train = {"max_steps": 4} | sections.pop("train", {})
    recipe = write_recipe(folder, base, held_out=0, train=train, **sections)
    recipe_verbs.train(recipe, (), run_dir=folder / "run", dry_run=False, registry=folder / "adapters", notify=_ignore)
    return folder / "run" / "adapter"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bases):
    """Return a function name → folder of a trained adapter; each is trained once."""
    root = tmp_path_factory.mktemp("trained")
    few = ["q_proj", "v_proj"]
    recipes = {
        "all": ("llama", {"lora": {"rank": 4, "alpha": 8}}),
        "few": ("llama", {"lora": {"rank": 2, "alpha": 8, "targets": few}, "rows": 12, "train": {"seed": 3}}),
        "rslora": ("llama", {"lora": {"rank": 3, "alpha": 8, "variant": "rslora"}}),
        "nf4": ("llama", {"base": {"quantization": "nf4"}}),
        "nf4 few": ("llama", {"base": {"quantization": "nf4"}, "lora": {"targets": few}, "train": {"seed": 3}}),
        "int8": ("llama", {"base": {"quantization": "int8"}}),
        "bf16": ("llama", {"base": {"dtype": "bf16"}}),
        "nf4 in bf16": ("llama", {"base": {"quantization": "nf4", "dtype": "bf16"}}),
        "gpt2": ("gpt2", {}),
        "gpt2 few": ("gpt2", {"lora": {"rank": 3, "targets": ["c_attn"]}, "train": {"seed": 3}}),
    }

    def folder(name):
        place = root / name.replace(" ", "-")
        architecture, sections = recipes[name]
        return place / "run" / "adapter" if place.is_dir() else _train(place, tiny_bases(architecture), **sections)

    return folder


@pytest.fixture(scope="module")
def pair(trained):
    return [(open_adapter(trained(name)), weight) for name, weight in zip(("all", "few"), WEIGHTED, strict=True)]


def _plain(base, *folders):
    """The base with adapters on it by PEFT's own loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="a0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    return model.eval()


def _logits(model):
    return probe_logits(model, IDS, 1)


def _deltas(folder):
    """Module → scaling · B·A in fp64, read without any code of ours."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        name: scaling * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name in names
    }


def _weighted_sum(parts):
    total = {}
    for files, weight in parts:
        for name, delta in _deltas(files.folder).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def _assert_alive(folder):
    """It passes the door, and a model that is opened anew answers as its probes say."""
    files = open_adapter(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, FILE_NAME, "README.md"}
    result = replay_probes(open_live(files, _ignore).model, files.manifest.probes)
    assert result.verdict == "equal"
    assert result.kl_of_base > 0
    return files


def test_a_concatenation_adds_up_the_changes_and_answers_as_pefts_own_sum(tmp_path, tiny_bases, pair):
    out = tmp_path / "sum"
    report = compose_adapters(pair, out, _ignore, plan=ComposePlan("concat", "sum"))
    assert (report.rank, report.norm_kept, report.verified) == (6, 1.0, True)
    assert report.kl <= 1e-6
    assert report.top1_agreement == 1.0
    expected, found = _weighted_sum(pair), _deltas(out)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm() / delta.norm()) <= 1e-6
    model = _plain(tiny_bases(), *(files.folder for files, _ in pair))
    model.add_weighted_adapter(["a0", "a1"], list(WEIGHTED), "sum", combination_type="cat")
    model.set_adapter("sum")
    assert float((_logits(model) - _logits(_plain(tiny_bases(), out))).abs().max()) <= 1e-5
    _assert_alive(out)


def test_a_concatenation_of_weight_one_answers_as_all_adapters_active(tmp_path, tiny_bases, trained):
    parts = [(open_adapter(trained(name)), 1.0) for name in ("all", "few", "rslora")]
    compose_adapters(parts, tmp_path / "sum", _ignore, plan=ComposePlan("concat", "sum"))
    model = _plain(tiny_bases(), *(files.folder for files, _ in parts))
    model.base_model.set_adapter(["a0", "a1", "a2"])
    assert float((_logits(model) - _logits(_plain(tiny_bases(), tmp_path / "sum"))).abs().max()) <= 1e-5


def test_the_passport_says_what_it_was_made_from(tmp_path, pair):
    compose_adapters(pair, tmp_path / "sum", _ignore, plan=ComposePlan("svd", "sum", rank=3))
    manifest = open_adapter(tmp_path / "sum").manifest
    made = manifest.made_from
    assert (made.method, made.density, made.seed) == ("svd", None, None)
    assert [(parent.digest, parent.weight, parent.verified) for parent in made.parents] == [
        (content_digest(files), weight, True) for files, weight in pair
    ]
    first, second = (files.manifest for files, _ in pair)
    assert manifest.base.weights == first.base.weights
    assert (manifest.data.rows, manifest.data.tokens) == (
        first.data.rows + second.data.rows,
        first.data.tokens + second.data.tokens,
    )
    assert manifest.data.system_message == first.data.system_message == "Reply with one JSON call."
    assert set(manifest.figures) == {"norm_kept", "kl_to_exact"}
    assert manifest.lora.scaling == 1.0


def test_svd_at_full_rank_is_exact_and_below_it_keeps_what_the_formula_says(tmp_path, tiny_bases, pair):
    whole = compose_adapters(pair, tmp_path / "whole", _ignore, plan=ComposePlan("svd", "sum", rank=6))
    assert whole.kl <= 1e-6
    assert whole.norm_kept == pytest.approx(1.0, abs=1e-9)
    cut = compose_adapters(pair, tmp_path / "cut", _ignore, plan=ComposePlan("svd", "sum", rank=2))
    kept = everything = 0.0
    for name, delta in _weighted_sum(pair).items():
        squares = torch.linalg.svdvals(delta) ** 2
        share = math.sqrt(float(squares[:2].sum() / squares.sum()))
        assert cut.norm_kept_by_layer[name.removeprefix("base_model.model.")] == pytest.approx(share, abs=1e-6)
        kept, everything = kept + float(squares[:2].sum()), everything + float(squares.sum())
    assert cut.norm_kept == pytest.approx(math.sqrt(kept / everything), abs=1e-6)
    assert cut.norm_kept < 1
    # The same divergence by PEFT and torch alone, on what the exact sum says.
    exact, short = _plain(tiny_bases(), tmp_path / "whole"), _plain(tiny_bases(), tmp_path / "cut")
    values = []
    for probe in open_adapter(tmp_path / "whole").manifest.probes:
        p, q = (
            probe_logits(model, probe.input_ids, probe.answer_start).double().log_softmax(-1)
            for model in (exact, short)
        )
        values.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert cut.kl == pytest.approx(float(torch.cat(values).mean()), rel=1e-2, abs=1e-9)
    _assert_alive(tmp_path / "cut")


def test_ties_at_full_rank_is_pefts_ties_of_the_full_changes(tmp_path, pair):
    from peft.utils.merge_utils import ties

    parts = [(files, 1.0) for files, _ in pair]
    report = compose_adapters(parts, tmp_path / "ties", _ignore, plan=ComposePlan("ties", "sum", rank=64, density=0.5))
    assert report.norm_kept == pytest.approx(1.0, abs=1e-6)
    one, other = (_deltas(files.folder) for files, _ in parts)
    found = _deltas(tmp_path / "ties")
    assert found.keys() == one.keys()
    for name, delta in found.items():
        tasks = [deltas[name].float() for deltas in (one, other) if name in deltas]
        expected = ties(tasks, torch.ones(len(tasks)), 0.5).double()
        # An entry at the edge of the trimmed ones may fall on either side of it in another rounding.
        differ = (delta - expected).abs() > 1e-5 * expected.abs().max()
        assert int(differ.sum()) <= 2
    assert open_adapter(tmp_path / "ties").manifest.made_from.density == 0.5
    _assert_alive(tmp_path / "ties")


def test_dare_that_drops_nothing_is_the_sum_and_a_seed_gives_the_same_again(tmp_path, pair):
    report = compose_adapters(pair, tmp_path / "all", _ignore, plan=ComposePlan("dare", "sum", rank=6, density=1.0))
    assert report.kl <= 1e-6
    digests = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        plan = ComposePlan("dare", "sum", density=0.5, seed=seed)
        compose_adapters(pair, tmp_path / place, _ignore, plan=plan)
        digests.append(open_adapter(tmp_path / place).weights_digest)
    assert digests[0] == digests[1] != digests[2]
    assert open_adapter(tmp_path / "c").manifest.made_from.seed == 2
    assert open_adapter(tmp_path / "c").shape.rank == 4
    _assert_alive(tmp_path / "c")


def test_resized_down_says_what_is_lost_and_up_loses_nothing(tmp_path, tiny_bases, trained):
    files = open_adapter(trained("all"))
    down = resize_adapter(files, tmp_path / "down", _ignore, rank=1)
    spectra = [torch.linalg.svdvals(delta) ** 2 for delta in _deltas(files.folder).values()]
    expected = math.sqrt(sum(float(s[0]) for s in spectra) / sum(float(s.sum()) for s in spectra))
    assert down.norm_kept == pytest.approx(expected, abs=1e-6)
    assert down.norm_kept < 1
    assert down.kl == down.kl_to_parents[0] > 1e-6
    assert _assert_alive(tmp_path / "down").shape.rank == 1
    up = resize_adapter(files, tmp_path / "up", _ignore, rank=9)
    assert (up.norm_kept, up.rank) == (1.0, 9)
    delta = _logits(_plain(tiny_bases(), tmp_path / "up")) - _logits(_plain(tiny_bases(), files.folder))
    assert float(delta.abs().max()) <= 1e-5
    manifest = _assert_alive(tmp_path / "up").manifest
    assert (manifest.name, manifest.data) == (files.manifest.name, files.manifest.data)
    assert manifest.recipe == files.manifest.recipe


def test_a_folded_rslora_is_plain_lora_with_the_same_answers(tmp_path, tiny_bases, trained):
    files = open_adapter(trained("rslora"))
    report = fold_adapter(files, tmp_path / "plain", _ignore, name="folded")
    assert report.kl <= 1e-6
    folded = _assert_alive(tmp_path / "plain")
    assert folded.manifest.name == "folded"
    assert (folded.shape.variant, folded.shape.rank) == ("lora", 3)
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert config["use_rslora"] is False
    before = _deltas(files.folder)
    for name, delta in _deltas(tmp_path / "plain").items():
        assert float((delta - before[name]).norm() / before[name].norm()) <= 3e-7
    logits = _logits(_plain(tiny_bases(), tmp_path / "plain")) - _logits(_plain(tiny_bases(), files.folder))
    assert float(logits.abs().max()) <= 1e-5


def test_adapters_of_a_quantized_base_are_summed_on_it(tmp_path, trained):
    parts = [(open_adapter(trained(name)), 0.5) for name in ("nf4", "nf4 few")]
    report = compose_adapters(parts, tmp_path / "sum", _ignore, plan=ComposePlan("concat", "sum"))
    assert report.kl <= 1e-6
    assert _assert_alive(tmp_path / "sum").manifest.base.quantization == "nf4"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "bf16", "nf4 in bf16"])
def test_what_rounds_coarsely_stays_within_its_bound(tmp_path, trained, name):
    files = open_adapter(trained(name))
    report = resize_adapter(files, tmp_path / "up", _ignore, rank=6)
    assert report.norm_kept == 1.0
    assert report.kl <= 1e-3
    compose_adapters([(files, 0.3), (files, 0.7)], tmp_path / "sum", _ignore, plan=ComposePlan("concat", "sum"))
    _assert_alive(tmp_path / "sum")


def test_gpt2_whose_weights_are_transposed_loads_in_plain_peft(tmp_path, tiny_bases, trained):
    parts = [(open_adapter(trained(name)), 1.0) for name in ("gpt2", "gpt2 few")]
    compose_adapters(parts, tmp_path / "sum", _ignore, plan=ComposePlan("concat", "sum"))
    model = _plain(tiny_bases("gpt2"), *(files.folder for files, _ in parts))
    model.base_model.set_adapter(["a0", "a1"])
    delta = _logits(model) - _logits(_plain(tiny_bases("gpt2"), tmp_path / "sum"))
    assert float(delta.abs().max()) <= 1e-5
    assert json.loads((tmp_path / "sum" / CONFIG).read_text())["fan_in_fan_out"] is True
    _assert_alive(tmp_path / "sum")


def test_without_any_passport_the_new_one_has_none_and_with_one_it_names_the_unverified(tmp_path, tiny_bases, trained):
    for name in ("all", "few"):
        shutil.copytree(trained(name), tmp_path / name)
        (tmp_path / name / FILE_NAME).unlink()
    alone = open_adapter(tmp_path / "all")
    report = resize_adapter(alone, tmp_path / "small", _ignore, rank=2, base_name=str(tiny_bases()))
    assert not report.verified
    small = open_adapter(tmp_path / "small")
    assert small.manifest is None
    assert small.shape.rank == 2
    card = (tmp_path / "small" / "README.md").read_text()
    assert content_digest(alone) in card
    parts = [(open_adapter(tmp_path / "few"), 1.0), (open_adapter(trained("all")), 1.0)]
    compose_adapters(parts, tmp_path / "sum", _ignore, plan=ComposePlan("concat", "sum", allow_unverified=True))
    made = _assert_alive(tmp_path / "sum").manifest.made_from
    assert [(parent.name, parent.verified) for parent in made.parents] == [("few", False), ("tiny", True)]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, trained, monkeypatch):
    files = open_adapter(trained("all"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(CannotCreateError):
        resize_adapter(files, tmp_path / "taken", _ignore, rank=2)
    assert not list((tmp_path / "taken").iterdir())
    monkeypatch.setattr(derived, "EXACT_KL", {"fp32": -1.0, "bf16": -1.0, "int8": -1.0})
    with pytest.raises(TrainingError, match="nothing was written"):
        compose_adapters([(files, 1.0)], tmp_path / "out", _ignore, plan=ComposePlan("concat", "sum"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_exact_sum_that_loses_the_adapters_is_refused_however_small_they_are(tmp_path, trained, monkeypatch):
    real = compose.concatenated
    monkeypatch.setattr(derived, "EXACT_KL", {"fp32": 10.0, "bf16": 10.0, "int8": 10.0})  # a rounding that hides all
    monkeypatch.setattr(compose, "concatenated", lambda terms: replace(real(terms), b=real(terms).b * 0))
    with pytest.raises(TrainingError, match="nothing was written") as caught:
        compose_adapters(
            [(open_adapter(trained("all")), 1.0)], tmp_path / "out", _ignore, plan=ComposePlan("concat", "s")
        )
    assert "--dtype fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_another_base_and_a_rank_that_cannot_be_are_refused(tmp_path, tiny_bases, trained):
    files = open_adapter(trained("all"))
    with pytest.raises(AdapterMismatchError):
        resize_adapter(files, tmp_path / "out", _ignore, rank=2, base_name=str(tiny_bases("llama", 1)))
    for rank in (0, -1, 1025):
        with pytest.raises(UsageError):
            resize_adapter(files, tmp_path / "out", _ignore, rank=rank)
    assert not (tmp_path / "out").exists()


def test_the_report_is_plain_json(tmp_path, trained):
    report = resize_adapter(open_adapter(trained("all")), tmp_path / "out", _ignore, rank=2)
    shown = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert shown["made_from"]["method"] == "resize"
    assert shown["norm_kept"] == report.norm_kept
    assert len(shown["norm_kept_by_layer"]) == len(open_adapter(tmp_path / "out").shape.modules)
