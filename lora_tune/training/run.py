"""The story of one run, from a recipe to an adapter in the registry."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_tune.adapter import registry
from lora_tune.adapter.apply import apply_lora, trained_weights
from lora_tune.adapter.export import Provenance, add_figures, export_adapter, library_versions
from lora_tune.adapter.manifest import DataFacts
from lora_tune.model.dense import quiet
from lora_tune.model.fingerprint import canonical_digest, fingerprint, remember_base
from lora_tune.model.load import Placement, detect_device, load_base, place
from lora_tune.recipe.loader import LoadedRecipe, dump_recipe, portable
from lora_tune.recipe.schema import Recipe
from lora_tune.run_dir import RunDir
from lora_tune.training.prepare import Notify, Prepared
from lora_tune.training.report import RunReport
from lora_tune.training.trainer import Outcome, fit, memory_guard

Evaluate = Callable[..., Any]
"""evaluation.evaluate.evaluate; passed in, since training and evaluation do not know each other."""


def train(
    loaded: LoadedRecipe, ready: Prepared, run: RunDir, notify: Notify, *, evaluate: Evaluate, registry_root: Path
) -> RunReport:
    """Train, export, prove, measure and register one adapter.

    The adapter stands proved in the run's folder before anything is measured, so that no later failure loses it.

    Raises:
        LoraTuneError: what went wrong; nothing half-made is exported or registered.
    """
    recipe, clock = loaded.recipe, _Clock(prepare=ready.seconds)
    _write_run_facts(run, loaded, ready)
    device = detect_device()
    placement = place(device, recipe.base)
    with memory_guard(recipe.train, ready.splits), quiet():
        with clock.part("load"):
            _seed(recipe.train.seed)
            base = load_base(ready.files, recipe.base)
            model = apply_lora(base, recipe.lora, adapter_dtype=placement.adapter_dtype)
        notify({"event": "model", "dtype": placement.dtype, "device": device.kind, "quantization": recipe.base.quantization,
                "trainable": sum(weight.numel() for weight in trained_weights(model).values())})  # fmt: skip
        with clock.part("train"):
            outcome = fit(
                model, ready.tokenizer, ready.splits, recipe.train, recipe.eval,
                placement=placement, device=device, folder=run.path, notify=notify,
                max_seq_tokens=recipe.data.max_seq_tokens, neftune_alpha=recipe.augment.neftune_alpha,
            )  # fmt: skip
        notify({"event": "progress", "label": "exporting and loading back", "share": 0.0})
        with clock.part("export"):
            export_adapter(model, ready.tokenizer, run.adapter, _provenance(recipe, ready, placement, outcome))
        notify({"event": "exported", "adapter": str(run.adapter)})
        with clock.part("evaluate"):
            measured = _evaluate(model, ready, recipe, notify, evaluate)
    adapter = add_figures(run.adapter, _figures(measured))
    version = registry.add(run.adapter, recipe.output.name, root=registry_root)
    report = RunReport(
        run=run.path, adapter=run.adapter, version=version, digest=registry.content_digest(adapter),
        weights_digest=adapter.weights_digest, weights_bytes=adapter.weights_bytes,
        parameter_bytes=sum(weight.numel() * weight.element_size() for weight in trained_weights(model).values()),
        counts=ready.splits.counts(), data={**ready.splits.checked.as_dict(), **ready.splits.ledger()}, outcome=outcome, evaluation=measured, seconds=clock.seconds,
    )  # fmt: skip
    run.write_json("report.json", report.as_dict())
    return report


def _figures(measured: dict[str, Any] | None) -> dict[str, float]:
    """Return the held-out figures by the names that a passport and `adapters list` use."""
    return {
        f"{prefix}{name}": float(found[name])
        for who, prefix in (("adapter", "held_out_"), ("base", "base_held_out_"))
        for found in [(measured or {}).get(who) or {}]
        for name in ("loss", "token_accuracy", "exact_match")
        if found.get(name) is not None
    }


def _evaluate(model: Any, ready: Prepared, recipe: Recipe, notify: Notify, evaluate: Evaluate) -> dict[str, Any] | None:
    if ready.splits.held_out is None:
        return None
    measured: dict[str, Any] = evaluate(
        model, ready.tokenizer, ready.splits.held_out,
        lambda label, share: notify({"event": "progress", "label": label, "share": share}),
        max_answer_tokens=recipe.eval.generate, answer_rows=recipe.eval.generate_rows,
    ).as_dict()  # fmt: skip
    return measured


def _write_run_facts(run: RunDir, loaded: LoadedRecipe, ready: Prepared) -> None:
    recipe = loaded.recipe
    run.write("recipe.yaml", loaded.text)
    run.write("recipe.resolved.yaml", dump_recipe(recipe))
    identity = fingerprint(ready.files.folder)
    if Path(recipe.base.name).is_absolute():
        remember_base(identity.weights, recipe.base.name)
    run.write_json("run.json", {
        "versions": library_versions(),
        "base": {"name": recipe.base.name, "revision": ready.files.revision, **identity.as_dict()},
        "chat_template": hashlib.sha256(ready.tokenizer.chat_template.encode()).hexdigest(),
        "data": {**ready.splits.checked.as_dict(), **ready.splits.ledger()},
        "recipe_digest": canonical_digest(portable(recipe)),
    })  # fmt: skip


def _provenance(recipe: Recipe, ready: Prepared, placement: Placement, outcome: Outcome) -> Provenance:
    counts = ready.splits.train.counts
    return Provenance(
        name=recipe.output.name,
        base=recipe.base,
        base_files=ready.files,
        dtype=placement.dtype,
        adapter_dtype=placement.adapter_dtype,
        lora=recipe.lora,
        data=DataFacts(
            digest=ready.splits.digest,
            rows=counts.rows,
            tokens=counts.tokens,
            trained_tokens=counts.trained_tokens,
            train_on=recipe.data.train_on,
            max_seq_tokens=recipe.data.max_seq_tokens,
            system_message=ready.splits.train.shared_system_message(),
        ),
        own_template=ready.tokenizer.chat_template if recipe.data.chat_template else None,
        recipe=portable(recipe),
        figures={"train_loss": outcome.last_loss},
    )


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


class _Clock:
    """Wall time by part of the run."""

    def __init__(self, **known: float) -> None:
        self.seconds = {name: round(seconds, 3) for name, seconds in known.items()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)
