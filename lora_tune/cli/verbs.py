"""The verbs that start from an adapter or a base. Open, call, and give plain values back to render."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lora_tune.adapter import registry as shelf
from lora_tune.adapter.door import AdapterFiles
from lora_tune.data.verdict import check_rows
from lora_tune.errors import DataError, UsageError
from lora_tune.model.resolve import locate
from lora_tune.recipe.loader import load_recipe
from lora_tune.recipe.schema import BaseSection, DataSection

Progress = Callable[[str, float], None]


def evaluate(
    spec: str,
    data: Path | None,
    *,
    base_too: bool,
    generate: int,
    rows: int,
    base: str | None,
    registry: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return the figures of an adapter, and of its base, on held-out rows."""
    adapter = _open(spec, registry)
    # The rows first: a mistake in them costs no model load.
    section, seed = _held_out_rows(adapter, data, _root(registry))
    from lora_tune.adapter.live import open_live
    from lora_tune.data.dataset import prepare_dataset
    from lora_tune.evaluation.evaluate import evaluate as measure

    live = open_live(adapter, progress, base_name=base)
    try:
        splits = prepare_dataset(section, live.tokenizer, seed=seed)
    except DataError as err:
        if data is None or err.where != "data.max_seq_tokens":
            raise
        # The hint is for recipes: nobody can be asked to train with another limit.
        hint = "give shorter rows: an adapter is measured with the limit that it was trained with"
        raise DataError(err.message, hint=hint, where=str(data)) from err
    held_out = splits.train if data is not None else splits.held_out
    assert held_out is not None  # _held_out_rows looked
    measured = measure(
        live.model, live.tokenizer, held_out, progress, max_answer_tokens=generate, answer_rows=rows, base_too=base_too
    )
    counts, warnings = held_out.counts, list(splits.checked.warnings)
    if data is not None and counts.rows_dropped:
        warnings.append(
            f"{counts.rows_dropped} of {counts.rows_read} rows are longer than the {section.max_seq_tokens} tokens that "
            "the adapter was trained with (data.max_seq_tokens), and are not measured"
        )
    named = dict.fromkeys(held_out.rows.stored[number].source.name for number in held_out.rows.pieces.source.tolist())
    return {
        "data": section.eval_path or section.path or ", ".join(named),
        "counts": counts.as_dict(),
        "warnings": warnings,
        **measured.as_dict(),
    }


def _held_out_rows(adapter: AdapterFiles, data: Path | None, registry: Path) -> tuple[DataSection, int]:
    """Return where the rows to measure on are, how they are tokenized (as in training), and the seed of their split.

    Without `data` they are the held-out rows of the run that made the adapter, if that run is still on this machine.
    Those of `data` are laid out as the recipe's rows are, unless its sets differ; longer ones are left out.
    """
    trained = adapter.manifest.recipe["data"] if adapter.manifest else {}
    shared = ("train_on", "max_seq_tokens", "format", "columns")
    kept = {key: trained[key] for key in shared if key in trained}
    for key in ("format", "columns"):
        of_sets = [trained[key] if part[key] is None else part[key] for part in trained.get("mix", [])]
        if of_sets and all(value == of_sets[0] for value in of_sets):
            kept[key] = of_sets[0]
    if data is not None:
        section = DataSection(path=str(data), too_long="drop", max_lost_tokens="100%", **kept)
        check_rows(section, seed=0)
        return section, 0
    recipe_path = shelf.origin(adapter.folder, root=registry).parent / "recipe.resolved.yaml"
    if recipe_path.is_file():
        recipe = load_recipe(recipe_path).recipe
        if check_rows(recipe.data, seed=recipe.train.seed).n_held_out:
            return recipe.data, recipe.train.seed
    raise UsageError(
        f"the rows that {adapter.folder} was measured on are not on this machine, or there were none",
        hint="name the rows to measure on with --data FILE",
    )


@dataclass(frozen=True)
class Talk:
    """A conversation that can be continued."""

    engine: Any
    adapter: str
    """The engine's key of who answers."""
    tokenizer: Any
    name: str
    system: str | None

    def answer(self, turns: list[dict[str, str]], *, max_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the answer to the turns so far, piece by piece.

        Raises:
            RequestError: the conversation does not fit the base's context (exit 2).
        """
        from lora_tune.data.messages import Message
        from lora_tune.data.tokens import prompt_ids
        from lora_tune.serving.engine import Finish, Sampling, Work
        from lora_tune.serving.text import AnswerText

        system = [Message("system", self.system)] if self.system else []
        ids = prompt_ids(self.tokenizer, [*system, *(Message(turn["role"], turn["content"]) for turn in turns)])
        events: SimpleQueue[Any] = SimpleQueue()
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        answering = self.engine.submit(Work(tuple(ids), self.adapter, sampling), events.put)
        text = AnswerText(self.tokenizer)
        try:
            while not isinstance(event := events.get(), Finish):
                if piece := text.feed(event.id):
                    yield piece
        finally:
            # Whoever listened may have gone away in the middle.
            answering.cancel()
        if event.error is not None:
            raise event.error
        if rest := text.finish():
            yield rest

    def close(self) -> None:
        """Let go of the model."""
        self.engine.close()


def open_chat(
    name: str,
    *,
    system: str | None,
    system_from: str | None,
    base: str | None,
    registry: Path | None,
    progress: Progress,
) -> Talk:
    """Return an adapter or a base, loaded and ready to talk.

    An adapter keeps the system message that all of its training rows shared, unless another is given.
    """
    if system is None and system_from is not None:
        system = _trained_system(_open(system_from, registry))
    if is_base(name, _root(registry)):
        return _talk(section_of(name), None, name, system, progress)
    adapter = _open(name, registry)
    from lora_tune.adapter.live import base_section

    system = _trained_system(adapter) if system is None else system
    return _talk(base_section(adapter, base), adapter, name, system, progress)


def _talk(
    section: BaseSection, adapter: AdapterFiles | None, name: str, system: str | None, progress: Progress
) -> Talk:
    locate(section)
    from lora_tune.serving import threads

    threads.leave_to_engine()
    from lora_tune.adapter.fence import fence_template
    from lora_tune.adapter.live import own_template
    from lora_tune.model.load import load_tokenizer
    from lora_tune.serving.engine import BASE
    from lora_tune.serving.opening import open_engine

    engine, served, _ = open_engine(
        section, engine="auto", progress=progress, needs=[adapter] if adapter else [],
        max_adapters=1, max_rank=adapter.shape.rank if adapter else 1, max_running=1,
    )  # fmt: skip
    if adapter is None:
        return Talk(engine, BASE, served.tokenizer, name, system)
    template, tokenizer = own_template(adapter), served.tokenizer
    try:
        engine.load(name, adapter)
        if template is not None:
            tokenizer = fence_template(load_tokenizer(served.files, template_text=template))
    except BaseException:
        engine.close()
        raise
    return Talk(engine, name, tokenizer, name, system)


def section_of(name: str) -> BaseSection:
    """Return the base that the command line names; a path is absolute."""
    known = name.startswith("builtin:") or not Path(name).exists()
    return BaseSection(name=name if known else str(Path(name).resolve()))


def is_base(name: str, registry: Path) -> bool:
    """Return whether a name on the command line is a base's rather than an adapter's."""
    path = Path(name)
    if name.startswith("builtin:") or name.endswith(".gguf"):
        return True
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    return "/" in name and not name.startswith((".", "/", "~")) and not (registry / name).exists()


def _trained_system(adapter: AdapterFiles) -> str | None:
    return adapter.manifest.data.system_message if adapter.manifest else None


def _open(spec: str, registry: Path | None) -> AdapterFiles:
    from lora_tune.cli.adapter_verbs import open_spec, say_unverified

    files = open_spec(spec, registry)
    say_unverified([files])
    return files


def _root(registry: Path | None) -> Path:
    return registry if registry is not None else shelf.registry_root()
