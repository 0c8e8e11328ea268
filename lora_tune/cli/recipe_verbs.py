"""The verbs that start from a recipe: check, preview, train, schema. Open, call, and give plain values back to render."""

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter import registry as shelf
from lora_tune.cli import page
from lora_tune.cli.run_verbs import write_report
from lora_tune.data.verdict import CheckedRows, check_rows
from lora_tune.errors import LoraTuneError, UsageError
from lora_tune.interruption import Interruption
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.model.resolve import locate
from lora_tune.recipe.loader import LoadedRecipe, dump_recipe, load_recipe, portable
from lora_tune.recipe.schema import Recipe
from lora_tune.run_dir import REPORT, RunDir, check_place, create_run_dir, newest_unfinished, open_run_dir

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
        found["steps"] = _plan(recipe, ready.splits).steps(recipe.train)
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


@dataclass(frozen=True)
class TrainWish:
    """What the command line says of one training."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    resume: bool = False
    allowed_drift: tuple[str, ...] = ()
    registry: Path | None = None

    @property
    def registry_root(self) -> Path:
        """The registry to put the adapter into."""
        return self.registry if self.registry is not None else shelf.registry_root()

    def command(self, begun: Path | None = None) -> str:
        """Return the command that goes on with the run in `begun`, or the same command again; ready for a shell."""
        run_dir = begun or self.run_dir
        words = ["lora-tune", "train", str(self.recipe)]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += ["--run-dir", str(run_dir)] if run_dir is not None else []
        words += ["--registry", str(self.registry)] if self.registry is not None else []
        words += [word for field in self.allowed_drift for word in ("--allow-drift", field)]
        return shlex.join([*words, "--resume"] if begun is not None or self.resume else words)


def train(
    path: Path, overrides: Sequence[str], *, run_dir: Path | None, dry_run: bool, registry: Path | None,
    notify: Callable[[Any], None], resume: bool = False, allowed_drift: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train and return the report; a dry run returns the resolved recipe and the counts, and writes nothing.

    Raises:
        StoppedError: a signal ended it; the hint is the command that goes on (exit 75).
    """
    wish = TrainWish(path, tuple(overrides), run_dir, resume, tuple(allowed_drift), registry)
    if allowed_drift and not resume:
        raise UsageError("--allow-drift says what may change when a run goes on", hint="add --resume, or leave it out")
    told = "stopping after this step; once more stops at once"
    stop = Interruption(wish.command(), lambda name: notify({"event": "warning", "message": f"{name}: {told}"}))
    with stop, ExitStack() as held:
        loaded = load_recipe(path, overrides)
        # Rows and places first: a mistake in them costs no download and leaves nothing behind.
        if not locate(loaded.recipe.base).present:
            check_rows(loaded.recipe.data, seed=loaded.recipe.train.seed)
        if dry_run:
            return _dry_run(loaded.recipe, notify)
        shelf.ensure_writable(wish.registry_root, name=loaded.recipe.output.name)
        run = _open_run(loaded.recipe, wish)
        if run is not None:
            held.enter_context(closing(run))
            if (report := _finished(loaded.recipe, run)) is not None:
                notify({"event": "warning", "message": f"the run in {run.path} is finished already; nothing was done"})
                return report
        return _train(loaded, run, wish, notify, stop=stop, held=held)


def _train(
    loaded: LoadedRecipe, run: RunDir | None, wish: TrainWish, notify: Callable[[Any], None],
    *, stop: Interruption, held: ExitStack,
) -> dict[str, Any]:  # fmt: skip
    from lora_tune.evaluation.evaluate import evaluate as measure
    from lora_tune.training.run import Sitting
    from lora_tune.training.run import train as run_training

    recipe = loaded.recipe
    ready = _prepared(recipe, notify)
    for warning in _step_warnings(recipe, _plan(recipe, ready.splits).steps(recipe.train)):
        notify({"event": "warning", "message": warning})
    if run is None:
        run = held.enter_context(closing(create_run_dir(recipe.output.name, path=wish.run_dir)))
    stop.command = wish.command(run.path)
    report = run_training(
        loaded, ready, run, notify, evaluate=measure, registry_root=wish.registry_root,
        sitting=Sitting(stop, resume=wish.resume, allowed_drift=wish.allowed_drift),
    ).as_dict()  # fmt: skip
    try:
        notify({"event": "page", "page": str(write_report(run.path))})
    except LoraTuneError as err:  # the run is done, whatever becomes of its page
        notify({"event": "warning", "message": f"the page was not written: {err.message}"})
    return report


def _open_run(recipe: Recipe, wish: TrainWish) -> RunDir | None:
    """Return the locked folder of the run to go on with; a new run's folder is made once its rows are known to be good."""
    if wish.resume:
        return open_run_dir(wish.run_dir or newest_unfinished(recipe.output.name))
    check_place(wish.run_dir)
    return None


def _finished(recipe: Recipe, run: RunDir) -> dict[str, Any] | None:
    """Return the report of a run that is done: to go on with it, by a script that always says --resume, is no mistake.

    Raises:
        UsageError: the recipe is another by now (exit 2).
    """
    if not (run.path / REPORT).exists():
        return None
    if run.facts().get("recipe_digest") != canonical_digest(portable(recipe)):
        raise UsageError(
            f"the run in {run.path} is finished, and its recipe was another", hint="start a new run, without --resume"
        )
    report: dict[str, Any] = json.loads((run.path / REPORT).read_text(encoding="utf-8"))
    return report


def _dry_run(recipe: Recipe, notify: Callable[[Any], None]) -> dict[str, Any]:
    ready = _prepared(recipe, notify)
    return {
        "dry_run": True,
        "recipe": dump_recipe(recipe),
        "data": ready.splits.counts(),
        "steps": _plan(recipe, ready.splits).steps(recipe.train),
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
    from lora_tune.data.order import n_steps

    return n_steps(recipe.train, rows.rows_an_epoch)
