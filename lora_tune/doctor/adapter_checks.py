"""Is an adapter what it was trained to be: switched off, saved and loaded, merged; and is NF4 what it says."""

import math
from typing import Any

import torch

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.export import Provenance, export_adapter
from lora_tune.adapter.live import open_live
from lora_tune.adapter.manifest import DataFacts
from lora_tune.adapter.merge import merge_adapter
from lora_tune.doctor import plain
from lora_tune.doctor.finding import Finding, bounded
from lora_tune.doctor.sample import LORA, MAX_SEQ_TOKENS, Sample, adapted
from lora_tune.errors import LoraTuneError
from lora_tune.model.dense import BaseFiles
from lora_tune.model.load import load_base
from lora_tune.recipe.loader import portable
from lora_tune.recipe.schema import BaseSection, DataSection, Recipe

MAX_APART = 1e-5
"""Largest relative difference of logits that fp32 sums in another order are let through with."""

MAX_APART_NF4 = 0.02
"""The same for a base in NF4, whose block constants bitsandbytes rounds to 8 bit once more."""

MIN_CHANGE = 1e-2
"""What the adapter, or NF4, changes at least: below it nothing would be compared with itself."""


def adapter_on(sample: Sample) -> Finding:
    """Logits with the adapter are those of W + scaling B A."""
    model = adapted(load_base(sample.base_files, sample.base_section))
    measured = plain.apart(_said(sample, model), _expected(sample, model))
    detail = "logits with the adapter on, against W + alpha/rank B A computed here (relative)"
    return bounded("adapter on", measured, MAX_APART, detail)


def adapter_off(sample: Sample) -> Finding:
    """Logits with the adapter switched off are the base's, to the bit."""
    base = _said(sample, load_base(sample.base_files, sample.base_section))
    model = adapted(load_base(sample.base_files, sample.base_section))
    with model.disable_adapter():
        measured = plain.apart(_said(sample, model), base)
    detail = "logits with the adapter switched off, against those of the base without one (relative)"
    return bounded("adapter off", measured, 0.0, detail)


def saved_loaded(sample: Sample) -> Finding:
    """An adapter that was saved and loaded answers as before."""
    model = adapted(load_base(sample.base_files, sample.base_section))
    expected = _expected(sample, model)
    files = _export(sample, model)
    live = open_live(files, _unheard, base_name=str(sample.base_files.folder))
    measured = plain.apart(_said(sample, live.model), expected)
    detail = "logits of the adapter that was saved and loaded again, against W + alpha/rank B A (relative)"
    return bounded("saved = loaded", measured, MAX_APART, detail)


def merged(sample: Sample) -> Finding:
    """A merged model answers as base and adapter did."""
    model = adapted(load_base(sample.base_files, sample.base_section))
    expected = _expected(sample, model)
    try:
        files = _export(sample, model)
    except LoraTuneError as err:
        return Finding("merged = adapter", "skipped", f"there is no saved adapter to merge: {err.message}")
    out = sample.scratch() / "merged"
    merge_adapter(files, out, _unheard, onto="trained", base_name=str(sample.base_files.folder), dtype="fp32")
    whole = load_base(BaseFiles("merged", None, out), BaseSection(name=str(out), dtype="fp32"))
    measured = plain.apart(_said(sample, whole), expected)
    detail = "logits of the merged model, against W + alpha/rank B A computed here (relative)"
    return bounded("merged = adapter", measured, MAX_APART, detail)


def nf4(sample: Sample) -> Finding:
    """A base in NF4 answers as one whose weights are rounded to the 16 levels of the paper."""
    base = load_base(sample.base_files, sample.base_section)
    exact = _said(sample, base)
    rounded = {f"{name}.weight": nf4_rounded(module.weight) for name, module in _linears(base)}
    expected = {str(n): plain.logits(base, ids, rounded).detach().cpu() for n, ids in enumerate(_prompts(sample))}
    quantized = load_base(sample.base_files, sample.base_section.model_copy(update={"quantization": "nf4"}))
    found = _said(sample, quantized)
    detail = (
        "logits of a base in NF4, against weights rounded to the paper's 16 levels here (relative); "
        f"rounding itself changes {plain.apart(expected, exact):.2f}"
    )
    hint = "set base.quantization: none in your recipes until this is ok; install the tested bitsandbytes"
    measured = plain.apart(found, expected)
    if plain.apart(found, exact) < MIN_CHANGE:
        measured, detail = math.inf, "a base in NF4 answers as one in fp32: it is not quantized"
    return bounded("nf4", measured, MAX_APART_NF4, detail, hint=hint)


def nf4_levels() -> torch.Tensor:
    """Return the 16 levels of NF4, from −1 to 1.

    Source: https://arxiv.org/abs/2305.14314 section 3 and appendix E: quantiles of a normal distribution, 0 among them,
        8 above and 7 below; the outermost quantile is 0.9677083.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    above, below = (normal.icdf(torch.linspace(0.9677083, 0.5, n + 1)[:-1]) for n in (8, 7))
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight with each number at the nearest level times the largest of its 64 neighbours in memory."""
    blocks = weight.detach().cpu().float().reshape(-1, 64)
    levels, largest = nf4_levels(), blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * largest).reshape(weight.shape).to(weight.device)


def _linears(base: Any) -> list[tuple[str, Any]]:
    head = base.get_output_embeddings()
    return [
        (name, part) for name, part in base.named_modules() if isinstance(part, torch.nn.Linear) and part is not head
    ]


def _prompts(sample: Sample) -> list[list[int]]:
    return [list(row.input_ids) for row in sample.splits.train.rows[:4]]


def _said(sample: Sample, model: Any) -> dict[str, torch.Tensor]:
    """Return what a model says to some rows, [T, V] each."""
    found = {}
    with torch.no_grad():
        for number, ids in enumerate(_prompts(sample)):
            tokens = torch.tensor([ids], device=model.device)
            found[str(number)] = model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
    return found


def _expected(sample: Sample, model: Any) -> dict[str, torch.Tensor]:
    """Return what base and adapter must say to the same rows, by W + scaling B A on a base of its own."""
    base = load_base(sample.base_files, sample.base_section)
    weights = plain.with_adapter(base, plain.adapter_weights(model), LORA.scaling)
    with torch.no_grad():
        found = {str(n): plain.logits(base, ids, weights).float().cpu() for n, ids in enumerate(_prompts(sample))}
        without = {str(n): plain.logits(base, ids).float().cpu() for n, ids in enumerate(_prompts(sample))}
    assert plain.apart(found, without) > MIN_CHANGE, "the adapter changes nothing, so nothing would be measured"
    return found


def _export(sample: Sample, model: Any) -> AdapterFiles:
    """Return the adapter, written by the very code that ends a training."""
    train = sample.splits.train.counts
    data = DataFacts(
        digest=sample.splits.digest, rows=train.rows, tokens=train.tokens, trained_tokens=train.trained_tokens,
        train_on="assistant", max_seq_tokens=MAX_SEQ_TOKENS, system_message=None,
    )  # fmt: skip
    recipe = Recipe(
        base=sample.base_section, data=DataSection(path="train.jsonl", max_seq_tokens=MAX_SEQ_TOKENS), lora=LORA
    )
    origin = Provenance(
        name="doctor", base=sample.base_section, base_files=sample.base_files, dtype="fp32", adapter_dtype="fp32",
        lora=LORA, data=data, own_template=None, recipe=portable(recipe), figures={},
    )  # fmt: skip
    return export_adapter(model, sample.tokenizer, sample.scratch() / "adapter", origin)


def _unheard(label: str, share: float) -> None:
    """Progress that nobody needs to see: it is the doctor's own that is shown."""
