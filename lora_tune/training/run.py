"""The story of one run, from a recipe to an adapter in the registry; stopped anywhere, it goes on from its checkpoints."""

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_tune.adapter import registry
from lora_tune.adapter.apply import apply_lora, trained_weights
from lora_tune.adapter.export import Provenance, add_figures, export_adapter, library_versions
from lora_tune.adapter.manifest import DataFacts
from lora_tune.data.order import plan_batches
from lora_tune.errors import OutOfMemoryError, UsageError
from lora_tune.interruption import Interruption
from lora_tune.model.dense import quiet
from lora_tune.model.fingerprint import canonical_digest, fingerprint, remember_base, tokenizer_digest, tokenizer_files
from lora_tune.model.load import Device, Placement, detect_device, device_name, load_base, place
from lora_tune.recipe.loader import LoadedRecipe, dump_recipe, portable
from lora_tune.recipe.schema import Recipe, TrainSection
from lora_tune.run_dir import FACTS, REPORT, RunDir
from lora_tune.training import snapshot
from lora_tune.training.checkpoints import clear_unfinished, newest_verified, set_aside
from lora_tune.training.identity import Change, check_unchanged, run_identity
from lora_tune.training.keeper import Course
from lora_tune.training.memory import memory_guard, shrink
from lora_tune.training.prepare import Notify, Prepared
from lora_tune.training.report import RunReport
from lora_tune.training.trainer import Outcome, fit

Evaluate = Callable[..., Any]
"""evaluation.evaluate.evaluate; passed in, since training and evaluation do not know each other."""


@dataclass(frozen=True)
class Sitting:
    """How this sitting of a run begins, and what may end it."""

    stop: Interruption
    resume: bool = False
    """Go on from the newest checkpoint that verifies."""
    allowed_drift: tuple[str, ...] = ()
    """Fields that the user lets change in between."""


def train(
    loaded: LoadedRecipe, ready: Prepared, run: RunDir, notify: Notify, *,
    evaluate: Evaluate, registry_root: Path, sitting: Sitting | None = None,
) -> RunReport:  # fmt: skip
    """Train, export, prove, measure and register one adapter.

    The adapter stands proved in the run's folder before anything is measured, so that no later failure loses it.

    Raises:
        LoraTuneError: what went wrong; nothing half-made is exported or registered.
        StoppedError: a signal ended it; resumed, it comes to the same adapter, to the bit on a CPU (exit 75).
    """
    recipe, clock = loaded.recipe, _Clock(prepare=ready.seconds)
    sitting = sitting or Sitting(Interruption(""))
    device = detect_device()
    placement = place(device, recipe.base)
    course = _begin(run, loaded, ready, notify, sitting=sitting, device=device, placement=placement)
    with quiet():
        model, outcome = _trained(recipe, ready, run, notify, clock, course=course, device=device, placement=placement)
        sitting.stop.when = "after training; its last checkpoint is kept, and what comes after training is done again"
        sitting.stop.check()
        notify({"event": "progress", "label": "exporting and loading back", "share": 0.0})
        with clock.part("export"), sitting.stop.deferred(), memory_guard(recipe.train, ready.splits):
            begun_before = _discard_export(run)
            export_adapter(model, ready.tokenizer, run.adapter, _provenance(recipe, ready, placement, outcome))
        notify({"event": "exported", "adapter": str(run.adapter)})
        sitting.stop.check()
        with clock.part("evaluate"), memory_guard(recipe.train, ready.splits):
            measured = _evaluate(model, ready, recipe, notify, evaluate)
    with sitting.stop.deferred():
        adapter = add_figures(run.adapter, _figures(measured))
        digest = registry.content_digest(adapter)
        known = _registered(digest, recipe.output.name, registry_root) if begun_before else None
        version = known or registry.add(run.adapter, recipe.output.name, root=registry_root)
        report = RunReport(
            run=run.path, adapter=run.adapter, version=version, digest=digest,
            weights_digest=adapter.weights_digest, weights_bytes=adapter.weights_bytes,
            parameter_bytes=sum(weight.numel() * weight.element_size() for weight in trained_weights(model).values()),
            counts=ready.splits.counts(), data={**ready.splits.checked.as_dict(), **ready.splits.ledger()}, outcome=outcome, evaluation=measured, seconds=clock.seconds,
        )  # fmt: skip
        run.write_json(REPORT, report.as_dict())
    return report


def _begin(
    run: RunDir, loaded: LoadedRecipe, ready: Prepared, notify: Notify,
    *, sitting: Sitting, device: Device, placement: Placement,
) -> Course:  # fmt: skip
    """Return where the run begins: at the beginning, or at the newest checkpoint that verifies and is of this very run."""
    identity = _identity(loaded.recipe, ready, device, placement)
    facts = run.facts() if sitting.resume else {}
    clear_unfinished(run.checkpoints)
    run_id = str(facts.get("run_id", ""))
    start, passed = newest_verified(run.checkpoints, run_id)
    for found in passed:
        message = f"passed over the checkpoint of step {found.step}: {found.why}"
        notify({"event": "warning", "message": message})
    course = Course(run.checkpoints, run_id or uuid.uuid4().hex, identity, start, stop=sitting.stop)
    if start is None:
        with suppress(FileNotFoundError):
            run.metrics.unlink()
        _write_run_facts(run, loaded, ready, course)
        if sitting.resume:
            notify({"event": "warning", "message": "there is no checkpoint yet: the run starts from its beginning"})
        return course
    sitting.stop.when = f"before it went on; the checkpoint of step {start.step} stands as it was"
    kept = snapshot.read_state(start.folder)
    changes = check_unchanged(kept["identity"], identity, sitting.allowed_drift)
    _check_steps_left(loaded.recipe, ready, start.step)
    set_aside(passed)
    _write_resumed(run, loaded, start.step, facts, changes)
    for change in changes:
        notify({"event": "warning", "message": f"{change} from step {start.step} on, as you allowed"})
    notify({"event": "resumed", "step": start.step, "checkpoint": str(start.folder)})
    return replace(course, start=start, drifted=bool(changes))


def _check_steps_left(recipe: Recipe, ready: Prepared, done: int) -> None:
    """Check that a run whose length may drift does not end before its checkpoint.

    Raises:
        UsageError: it does: what was trained already cannot be taken back (exit 2).
    """
    plan = plan_batches(ready.splits.train.n_tokens_by_row, recipe.train, limit=recipe.data.max_seq_tokens)
    if (steps := plan.steps(recipe.train)) < done:
        field = "train.epochs" if recipe.train.max_steps is None else "train.max_steps"
        raise UsageError(
            f"the run has {steps} steps by now, and its checkpoint is of step {done}: {done - steps} steps cannot be untrained",
            hint=f"raise {field} until there are {done} steps, or start a new run without --resume",
            where=field,
        )


def _trained(
    recipe: Recipe, ready: Prepared, run: RunDir, notify: Notify, clock: "_Clock", *,
    course: Course, device: Device, placement: Placement,
) -> tuple[Any, Outcome]:  # fmt: skip
    """Return the trained model; where memory runs out and the recipe says so, go on with smaller micro-batches."""
    section = _in_effect(recipe.train, course)
    while True:
        try:
            with memory_guard(section, ready.splits) as memory:
                with clock.part("load"):
                    _seed(section.seed)
                    base = load_base(ready.files, recipe.base)
                    model = apply_lora(base, recipe.lora, adapter_dtype=placement.adapter_dtype)
                course.stop.check()
                notify({"event": "model", "dtype": placement.dtype, "device": device.kind, "quantization": recipe.base.quantization,
                        "trainable": sum(weight.numel() for weight in trained_weights(model).values())})  # fmt: skip
                with clock.part("train"), course.stop.deferred():
                    return model, fit(
                        model, ready.tokenizer, ready.splits, section, recipe.eval,
                        placement=placement, device=device, folder=run.path, notify=notify,
                        max_seq_tokens=recipe.data.max_seq_tokens, neftune_alpha=recipe.augment.neftune_alpha,
                        course=course, memory=memory,
                    )  # fmt: skip
        except OutOfMemoryError as err:
            if section.on_oom == "stop" or section.micro_batch_sequences == 1:
                raise
            section, message = shrink(section), err.message
        base = model = None
        start, _ = newest_verified(course.root, course.run_id)
        course = replace(course, start=start)
        notify({"event": "warning", "message": f"{message}. Going on from step {start.step if start else 0} with "
                f"train.micro_batch_sequences: {section.micro_batch_sequences} and train.gradient_accumulation_steps: "
                f"{section.gradient_accumulation_steps}, which trains the same steps"})  # fmt: skip


def _in_effect(section: TrainSection, course: Course) -> TrainSection:
    """Return the section with the micro-batch that the checkpoint was trained with, where memory had run out."""
    if course.start is None or course.drifted or section.on_oom == "stop":
        return section
    kept = snapshot.read_state(course.start.folder)
    return section.model_copy(
        update={name: kept[name] for name in ("micro_batch_sequences", "gradient_accumulation_steps")}
    )


def _discard_export(run: RunDir) -> bool:
    """Remove what an earlier sitting exported and did not finish with; return whether there was any."""
    if not run.adapter.exists():
        return False
    stale = run.path / ".adapter-stale"
    shutil.rmtree(stale, ignore_errors=True)
    run.adapter.rename(stale)
    shutil.rmtree(stale, ignore_errors=True)
    return True


def _registered(digest: str, name: str, root: Path) -> registry.Version | None:
    """Return the version that an earlier sitting registered before it was killed."""
    for listed in registry.listing(root):
        if listed.version.name == name and not isinstance(listed.files_or_error, Exception):
            with suppress(OSError):
                if registry.content_digest(listed.files_or_error) == digest:
                    return listed.version
    return None


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


def _identity(recipe: Recipe, ready: Prepared, device: Device, placement: Placement) -> dict[str, Any]:
    base = fingerprint(ready.files.folder)
    return run_identity(
        portable(recipe),
        digests={
            "rows": ready.splits.digest,
            **{f"base_{name}": value for name, value in base.as_dict().items()},
            **tokenizer_digest(tokenizer_files(ready.files.folder), chat_template=ready.tokenizer.chat_template),
        },
        versions=library_versions(),
        device=device_name(device),
        dtype=placement.dtype,
    )


def _write_run_facts(run: RunDir, loaded: LoadedRecipe, ready: Prepared, course: Course) -> None:
    recipe = loaded.recipe
    run.write("recipe.yaml", loaded.text)
    run.write("recipe.resolved.yaml", dump_recipe(recipe))
    identity = fingerprint(ready.files.folder)
    if Path(recipe.base.name).is_absolute():
        remember_base(identity.weights, recipe.base.name)
    run.write_json(FACTS, {
        "run_id": course.run_id,
        "started_at": round(time.time(), 3),
        "versions": library_versions(),
        "base": {"name": recipe.base.name, "revision": ready.files.revision, **identity.as_dict()},
        "chat_template": _digest(ready.tokenizer.chat_template),
        "data": {**ready.splits.checked.as_dict(), **ready.splits.ledger()},
        "recipe_digest": canonical_digest(portable(recipe)),
    })  # fmt: skip


def _write_resumed(
    run: RunDir, loaded: LoadedRecipe, step: int, facts: dict[str, Any], changes: Sequence[Change]
) -> None:
    """Write down that the run went on, and keep the recipe that held until then where it changed."""
    if changes:
        with suppress(FileNotFoundError):
            before = (run.path / "recipe.resolved.yaml").read_text(encoding="utf-8")
            run.write(f"recipe.until-step-{step:06d}.yaml", before)
        run.write("recipe.yaml", loaded.text)
        run.write("recipe.resolved.yaml", dump_recipe(loaded.recipe))
    went_on = {"step": step, "changed": {change.field: [change.then, change.now] for change in changes}}
    run.write_json(FACTS, {
        **facts,
        "versions": library_versions(),
        "recipe_digest": canonical_digest(portable(loaded.recipe)),
        "resumed": [*facts.get("resumed", []), went_on],
    })  # fmt: skip


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
