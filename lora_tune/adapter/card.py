"""The model card: `README.md` in an adapter's folder, written from the passport."""

from lora_tune.adapter.manifest import AdapterManifest

_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, lora_tune]
---

# {name}

A {variant} adapter (rank {rank}, alpha {alpha:g}) for `{base}`{revision}, trained with lora_tune {tool}.

| | |
|---|---|
| base held in | {quantization}, computed in {dtype} |
| layers | {targets} |
| trained numbers | {parameters:,} |
| data | {rows:,} rows, {tokens:,} tokens, {trained:,} of them trained ({train_on}) |
{figures}
## Use it

```sh
lora-tune adapters verify THIS_FOLDER     # does it behave here as when it was trained?
lora-tune chat THIS_FOLDER
```

```python
{snippet}
```

`lora_tune.json` beside this file is the adapter's passport: digests of base, tokenizer, template, recipe and data,
library versions, and golden probes.
"""

_FROM_HUB = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")"""
# PEFT fetches a base from a hub only; any other is given to it.
_FROM_FOLDER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("FOLDER OF THE BASE"), "THIS_FOLDER")"""


def model_card(manifest: AdapterManifest) -> str:
    """Return the card's text."""
    figures = "".join(
        f"| {name.replace('_', ' ')} | {value:.4g} |\n" for name, value in sorted(manifest.figures.items())
    )
    return _CARD.format(
        name=manifest.name,
        base=manifest.base.name,
        revision=f" at `{manifest.base.revision}`" if manifest.base.revision else "",
        variant={"lora": "LoRA", "rslora": "rank-stabilised LoRA", "dora": "DoRA"}[manifest.lora.variant],
        rank=manifest.lora.rank,
        alpha=manifest.lora.alpha,
        tool=manifest.versions["lora_tune"],
        quantization={"none": "full precision"}.get(manifest.base.quantization, manifest.base.quantization),
        dtype=manifest.base.dtype,
        targets=", ".join(manifest.lora.targets),
        parameters=manifest.lora.n_parameters,
        rows=manifest.data.rows,
        tokens=manifest.data.tokens,
        trained=manifest.data.trained_tokens,
        train_on=manifest.data.train_on,
        figures=figures,
        snippet=_FROM_HUB if manifest.base.revision else _FROM_FOLDER,
    )
