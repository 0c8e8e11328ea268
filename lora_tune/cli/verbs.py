"""The verbs that start from an adapter or a base. Open, call, and give plain values back to render."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lora_tune.adapter import registry as shelf
from lora_tune.adapter.door import AdapterFiles, open_adapter
from lora_tune.data.lint import check_rows
from lora_tune.errors import AdapterMismatchError, LoraTuneError, UsageError
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
    splits = prepare_dataset(section, live.tokenizer, seed=seed)
    held_out = splits.train if data is not None else splits.held_out
    assert held_out is not None  # _held_out_rows looked
    measured = measure(
        live.model, live.tokenizer, held_out, progress, max_answer_tokens=generate, answer_rows=rows, base_too=base_too
    )
    return {"data": section.eval_path or section.path, "counts": held_out.counts.as_dict(), **measured.as_dict()}


def _held_out_rows(adapter: AdapterFiles, data: Path | None, registry: Path) -> tuple[DataSection, int]:
    """Return where the rows to measure on are, how they are tokenized (as in training), and the seed of their split.

    Without `data` they are the held-out rows of the run that made the adapter, if that run is still on this machine.
    """
    trained = adapter.manifest.recipe["data"] if adapter.manifest else {}
    shared = ("train_on", "max_seq_tokens", "too_long", "columns", "max_lost_tokens")
    kept = {key: trained[key] for key in shared if key in trained}
    if data is not None:
        section = DataSection(path=str(data), **kept)
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

    model: Any
    tokenizer: Any
    name: str
    system: str | None

    def answer(self, turns: list[dict[str, str]], *, max_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the answer to the turns so far, piece by piece."""
        from lora_tune.data.messages import Message
        from lora_tune.data.tokens import prompt_ids
        from lora_tune.model.generate import stop_ids, stream_answer

        system = [Message("system", self.system)] if self.system else []
        ids = prompt_ids(self.tokenizer, [*system, *(Message(turn["role"], turn["content"]) for turn in turns)])
        yield from stream_answer(
            self.model,
            self.tokenizer,
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            ends=stop_ids(self.model, self.tokenizer),
        )


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
    if _is_base(name, registry):
        section = BaseSection(
            name=name if name.startswith("builtin:") or not Path(name).exists() else str(Path(name).resolve())
        )
        locate(section)
        from lora_tune.adapter.live import open_base

        live = open_base(section, progress)
    else:
        adapter = _open(name, registry)
        from lora_tune.adapter.live import open_live

        system = _trained_system(adapter) if system is None else system
        live = open_live(adapter, progress, base_name=base)
    return Talk(live.model, live.tokenizer, name, system)


def _is_base(name: str, registry: Path | None) -> bool:
    path = Path(name)
    if name.startswith("builtin:") or name.endswith(".gguf"):
        return True
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    return "/" in name and not name.startswith((".", "/", "~")) and not (_root(registry) / name).exists()


def _trained_system(adapter: AdapterFiles) -> str | None:
    return adapter.manifest.data.system_message if adapter.manifest else None


def merge(
    spec: str, out: Path, *, onto: str, base: str | None, registry: Path | None, progress: Progress
) -> dict[str, Any]:
    """Merge an adapter and return the receipt."""
    if onto not in ("trained", "original"):
        raise UsageError(f"--onto {onto}: expected trained or original")
    adapter = _open(spec, registry)
    from dataclasses import asdict

    from lora_tune.adapter.merge import merge_adapter

    return asdict(
        merge_adapter(adapter, out, progress, onto=cast(Literal["trained", "original"], onto), base_name=base)
    )


def list_adapters(registry: Path | None) -> dict[str, Any]:
    """Return every version in the registry."""
    root = _root(registry)
    rows = []
    for version, found in shelf.list_versions(root=root):
        row: dict[str, Any] = {"adapter": version.spec, "folder": str(version.folder)}
        if isinstance(found, LoraTuneError):
            row["refused"] = found.message
        else:
            manifest = found.manifest
            row |= {
                "rank": found.shape.rank,
                "variant": found.shape.variant,
                "bytes": found.weights_bytes,
                "base": manifest.base.name if manifest else found.base_name,
                "quantization": manifest.base.quantization if manifest else "unverified",
                "figures": dict(manifest.figures) if manifest else {},
                "digest": shelf.content_digest(found),
            }
        rows.append(row)
    return {"registry": str(root), "adapters": rows}


def inspect(spec: str, registry: Path | None) -> dict[str, Any]:
    """Return what an adapter says about itself; without a passport it is `unverified`."""
    files = _open(spec, registry)
    found: dict[str, Any] = {
        "folder": str(files.folder),
        "digest": shelf.content_digest(files),
        "passport": "present" if files.manifest else "unverified: made elsewhere, nothing can be compared",
        "base": files.base_name,
        "rank": files.shape.rank,
        "alpha": files.shape.alpha,
        "variant": files.shape.variant,
        "targets": list(files.shape.targets),
        "layers": len(files.shape.modules),
        "weights_bytes": files.weights_bytes,
    }
    if files.manifest:
        passport = files.manifest.model_dump(mode="json", exclude={"probes", "recipe"})
        found |= {"base": passport["base"], "tokenizer": passport["tokenizer"], "data": passport["data"],
                  "figures": passport["figures"], "versions": passport["versions"], "probes": len(files.manifest.probes)}  # fmt: skip
    return found


def verify(spec: str, *, base: str | None, registry: Path | None, progress: Progress) -> dict[str, Any]:
    """Replay an adapter's probes and return how far it is from its passport.

    Raises:
        AdapterMismatchError: it behaves differently, or has no passport to be held against (exit 77).
    """
    files = _open(spec, registry)
    if files.manifest is None:
        raise AdapterMismatchError(
            f"{files.folder} has no passport (lora_tune.json): unverified",
            hint="only adapters that lora_tune trained carry golden probes; `adapters inspect` shows what can be checked",
        )
    from lora_tune.adapter.live import open_live
    from lora_tune.adapter.probes import replay_probes

    live = open_live(files, progress, base_name=base)
    result = replay_probes(live.model, files.manifest.probes)
    if result.verdict == "different":
        raise AdapterMismatchError(
            f"{files.folder} does not behave as when it was trained: KL divergence {result.kl:.3g} nats a token "
            f"(the base alone: {result.kl_of_base:.3g}), top-1 agreement {result.top1_agreement:.0%}",
            hint="compare the versions in its passport with those installed: `lora-tune adapters inspect`",
            where="probes",
        )
    return {"adapter": str(files.folder), **result.as_dict()}


def _open(spec: str, registry: Path | None) -> AdapterFiles:
    return open_adapter(shelf.find(spec, root=_root(registry)))


def _root(registry: Path | None) -> Path:
    return registry if registry is not None else shelf.registry_root()
