"""The verbs that start from a recipe: check, preview, train, schema. Open, call, and give plain values back to render."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_tune.adapter import registry as shelf
from lora_tune.cli import page
from lora_tune.data.verdict import CheckedRows, check_rows
from lora_tune.model.resolve import locate
from lora_tune.recipe.loader import dump_recipe, load_recipe
from lora_tune.recipe.schema import Recipe

MAX_CHARACTER_TOKENS = 8
"""No character has more tokens."""
PAGE_ROWS = 20
"""Rows that a page shows token by token."""


def check(path: Path, overrides: Sequence[str], *, tokens: bool, html: Path | None = None) -> dict[str, Any]:
    """Return what is known of a recipe and its rows without loading anything heavy; with `tokens`, the counts too.

    With `html` the same is written as a page, with some rows and their loss masks.
    """
    recipe = load_recipe(path, overrides).recipe
    if html:
        page.check_place(html)
    rows = check_rows(recipe.data, seed=recipe.train.seed)
    base = locate(recipe.base)
    found: dict[str, Any] = {
        "recipe": str(path),
        "base": {"name": recipe.base.name, "kind": base.kind, "on_this_machine": base.present},
        "data": rows.as_dict(),
        "steps": _quick_steps(recipe, rows),
        "warnings": list(rows.warnings),
    }
    if tokens or html:
        from lora_tune.training.prepare import token_warnings

        ready = _prepared(recipe)
        found["tokens"] = ready.splits.counts()
        found["ledger"] = ready.splits.ledger()
        plan = _plan(recipe, ready.splits)
        padding = plan.padding_share(recipe.train.micro_batch_sequences)
        found["batching"] = {"chosen": plan.batching, "padding_share": round(padding, 4)}
        found["steps"] = _steps(recipe, len(_plan(recipe, ready.splits).widths))
        found["warnings"] += token_warnings(ready.splits, ready.tokenizer)
    found["warnings"] += _step_warnings(recipe, found["steps"])
    if html:
        told = {
            "max_seq_tokens": recipe.data.max_seq_tokens,
            "too_long": recipe.data.too_long,
            "train_on": recipe.data.train_on,
        }
        page.write_page(html, page.lint_page({**found, **told, "samples": _samples(ready, PAGE_ROWS)}))
        found["page"] = str(html)
    return found


def _samples(ready: Any, count: int) -> list[dict[str, Any]]:
    """Return the first training rows token by token, each with whether it is trained."""
    return [
        {
            "where": row.where,
            "tokens": [
                {"id": token, "text": text, "trained": on}
                for token, text, on in zip(
                    row.input_ids, _texts(ready.tokenizer, row.input_ids), row.trained, strict=True
                )
            ],
        }
        for row in ready.splits.train.rows[:count]
    ]


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's text; a character of several tokens stands at the last of them."""
    texts, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < MAX_CHARACTER_TOKENS
        texts.append("" if unfinished else text)
        waiting = waiting if unfinished else []
    return texts


def _prepared(recipe: Recipe, notify: Callable[[Any], None] = lambda event: None) -> Any:
    """Return what `train` would be fed: the same function for every verb, so that what was checked is what runs."""
    from lora_tune.training.prepare import prepare

    wanted = (
        "eval.every_steps" if recipe.eval.every_steps is not None else "eval.generate" if recipe.eval.generate else ""
    )
    return prepare(
        recipe.base, recipe.data, recipe.lora.targets, notify,
        seed=recipe.train.seed, augment=recipe.augment, held_out_for=wanted,
    )  # fmt: skip


def preview(path: Path, overrides: Sequence[str], *, rows: int, html: Path | None = None) -> dict[str, Any]:
    """Return the tokens of the first rows, each with whether it is trained, and the counts of every set."""
    recipe = load_recipe(path, overrides).recipe
    if html:
        page.check_place(html)
    ready = _prepared(recipe)
    found = {"rows": _samples(ready, rows), "counts": ready.splits.counts(), "train_on": recipe.data.train_on}
    if html:
        page.write_page(html, page.preview_page(found))
        found["page"] = str(html)
    return found


def train(
    path: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    dry_run: bool,
    registry: Path | None,
    notify: Callable[[Any], None],
) -> dict[str, Any]:
    """Train and return the report; a dry run returns the resolved recipe and the counts, and writes nothing."""
    loaded = load_recipe(path, overrides)
    recipe = loaded.recipe
    # Rows and places first: a mistake in them costs no download and leaves nothing behind.
    if not locate(recipe.base).present:
        check_rows(recipe.data, seed=recipe.train.seed)
    if dry_run:
        return _dry_run(recipe, notify)
    root = registry if registry is not None else shelf.registry_root()
    shelf.ensure_writable(root, name=recipe.output.name)
    from lora_tune.evaluation.evaluate import evaluate as measure
    from lora_tune.run_dir import create_run_dir
    from lora_tune.training.run import train as run_training

    ready = _prepared(recipe, notify)
    for warning in _step_warnings(recipe, _steps(recipe, len(_plan(recipe, ready.splits).widths))):
        notify({"event": "warning", "message": warning})
    run = create_run_dir(recipe.output.name, path=run_dir)
    return run_training(loaded, ready, run, notify, evaluate=measure, registry_root=root).as_dict()


def _dry_run(recipe: Recipe, notify: Callable[[Any], None]) -> dict[str, Any]:
    ready = _prepared(recipe, notify)
    return {
        "dry_run": True,
        "recipe": dump_recipe(recipe),
        "data": ready.splits.counts(),
        "steps": _steps(recipe, len(_plan(recipe, ready.splits).widths)),
    }


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _step_warnings(recipe: Recipe, steps: int | None) -> list[str]:
    every = recipe.eval.every_steps
    if every is None or steps is None or every <= steps:
        return []
    stopping = ", and early stopping never looks" if recipe.eval.early_stopping_patience is not None else ""
    return [f"eval.every_steps is {every}, but there are {steps} steps: nothing is measured while training{stopping}"]


def _plan(recipe: Recipe, splits: Any) -> Any:
    """Return how the rows will share a forward pass: as the trainer plans it."""
    from lora_tune.data.order import plan_batches

    return plan_batches(splits.train.n_tokens_by_row, recipe.train, limit=recipe.data.max_seq_tokens)


def _quick_steps(recipe: Recipe, rows: CheckedRows) -> int | None:
    """Return the steps, or None where only the tokenized rows tell: packed batches, copies, repeated labels."""
    augment = recipe.augment
    grows = augment.copies > 0 or augment.balance_labels > 0
    if recipe.train.max_steps is None and (recipe.train.batching == "packed" or grows):
        return None
    return _steps(recipe, rows.rows_an_epoch)


def _steps(recipe: Recipe, rows: int) -> int:
    """Return how many steps the recipe takes, as the trainer counts: a last, smaller batch is a step too."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    micro_batches = -(-rows // recipe.train.micro_batch_sequences)
    per_epoch = max(1, -(-micro_batches // recipe.train.gradient_accumulation_steps))
    return -int(-recipe.train.epochs * per_epoch // 1)
