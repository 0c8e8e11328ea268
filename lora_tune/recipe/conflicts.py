"""Which combinations of settings cannot be meant, and what a setting takes in words."""

from lora_tune.recipe.schema import DATA_PACKINGS, DATA_SUFFIXES, Recipe

EXPECTED = {
    "data.mix": "a list of sets such as {path: rows.jsonl, weight: 2}",
    "data.mix[]": "a set such as {path: rows.jsonl, weight: 2}",
    "data.columns": "settings such as {ours: yours}",
    "data.max_lost_tokens": "a share such as 5%",
    "augment.prompts": "a list of texts, each with {prompt} once",
    "lora.targets": "all-linear, or a list of layer names such as [q_proj, v_proj]",
    "output.name": "lower-case letters, digits and hyphens, at most 63",
}
"""What a setting takes, in words, where a type or pattern alone would not say it."""

_HEADS = {"lm_head", "embed_tokens", "embed_out", "wte"}


def conflicts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (field, message) for every combination of settings that cannot be meant."""
    base, data, lora, evaluation, augment = recipe.base, recipe.data, recipe.lora, recipe.eval, recipe.augment
    changes = [name for name in ("case", "typos", "punctuation", "prompts") if getattr(augment, name)]
    # A folder or a hub dataset may bring held-out files of its own.
    paths = [part.path for part in data.mix] or [data.path or ""]
    may_hold_out = any(path.startswith("hub:") or not _names_file(path) for path in paths)
    held_out = data.eval_path is not None or data.eval_split > 0 or may_hold_out
    local = base.name.startswith(("builtin:", "./", "../", "/", "~")) or base.name.endswith(".gguf")
    targets = lora.targets if lora.targets != "all-linear" else ()
    heads = sorted(name for name in targets if name.rpartition(".")[2] in _HEADS)
    rules = [
        ((data.path is None) == (not data.mix), "data.path",
         "one of data.path and data.mix says where the rows are; "
         + ("both are set" if data.mix else "neither is set")),
        (0 < sum(part.weight is not None for part in data.mix) < len(data.mix), "data.mix",
         "some sets have a weight and some have none; give every set one, or none"),
        (any(part.weight is not None and part.repeat is not None for part in data.mix), "data.mix",
         "a set has weight and repeat; its share comes from one of them"),
        (data.revision is not None and not (data.path or "").startswith("hub:"), "data.revision",
         "only a hub dataset (data.path: hub:OWNER/NAME) has revisions"),
        ((data.eval_path or "").startswith("hub:"), "data.eval_path",
         f"{data.eval_path!r} is a hub dataset; held-out rows are a file or a folder on this machine, or the valid files "
         "that a hub dataset in data.path brings"),
        (augment.copies > 0 and not changes, "augment.copies",
         "copies without a change would be exact copies; set case, typos, punctuation or prompts"),
        (augment.copies == 0 and bool(changes), "augment.copies",
         f"{', '.join(changes)} change copies, and there are none; set augment.copies"),
        (data.eval_path is not None and data.eval_split > 0, "data.eval_split",
         "eval_split and eval_path are both set; held-out rows come from one of them"),
        (evaluation.every_steps is not None and not held_out, "eval.every_steps",
         "there are no held-out rows to measure; set data.eval_split or data.eval_path"),
        (evaluation.generate > 0 and not held_out, "eval.generate",
         "there are no held-out rows to answer; set data.eval_split or data.eval_path"),
        (evaluation.early_stopping_patience is not None and evaluation.every_steps is None,
         "eval.early_stopping_patience", "early stopping needs measurements while training; set eval.every_steps"),
        (base.revision is not None and local, "base.revision", "only a hub id has revisions"),
        (bool(heads), "lora.targets",
         f"{', '.join(heads)} cannot be a target: no server can hot-swap such an adapter, and TRL does not train it"),
        (lora.variant == "dora" and base.quantization == "int8", "lora.variant",
         "dora on an int8 base is not supported; take quantization nf4 or none, or variant lora"),
    ]  # fmt: skip
    return [(field, message) for broken, field, message in rules if broken]


def _names_file(path: str) -> bool:
    """Return whether a path ends as a file of rows does; a folder may have a dot in its name too."""
    name = path.lower()
    return name.endswith((*DATA_SUFFIXES, *(suffix + packing for suffix in DATA_SUFFIXES for packing in DATA_PACKINGS)))
