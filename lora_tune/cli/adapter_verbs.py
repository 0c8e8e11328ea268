"""What the `adapters` verbs, `merge` and `export` do. Open, call, and give plain values back to render."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lora_tune.adapter import registry as shelf
from lora_tune.adapter.door import AdapterFiles
from lora_tune.cli import render
from lora_tune.errors import AdapterMismatchError, LoraTuneError, UsageError

Progress = Callable[[str, float], None]
Parts = Sequence[tuple[AdapterFiles, float]]


def list_adapters(registry: Path | None) -> dict[str, Any]:
    """Return every version in the registry, aliases that point to none, and which lines of the journal say nothing."""
    root = registry_root(registry)
    rows = []
    versions = shelf.listing(root)
    there = {listed.version.key for listed in versions}
    dangling = {alias: version.spec for alias, version in shelf.aliases(root).items() if version.key not in there}
    for listed in versions:
        found = listed.files_or_error
        row: dict[str, Any] = {
            "adapter": listed.version.spec, "folder": str(listed.version.folder), "aliases": list(listed.aliases),
            "added_at": listed.added_at, "bytes": listed.n_bytes,
        }  # fmt: skip
        if isinstance(found, LoraTuneError):
            row["refused"] = found.message
        else:
            manifest = found.manifest
            row |= {
                "rank": found.shape.rank,
                "variant": found.shape.variant,
                "base": manifest.base.name if manifest else found.base_name,
                "quantization": manifest.base.quantization if manifest else "unverified",
                "figures": dict(manifest.figures) if manifest else {},
                "digest": shelf.content_digest(found),
            }
        rows.append(row)
    return {
        "registry": str(root),
        "adapters": rows,
        "dangling_aliases": dangling,
        "journal_damage": shelf.journal_damage(root),
    }


def inspect(spec: str, registry: Path | None) -> dict[str, Any]:
    """Return what an adapter says about itself; without a passport it is `unverified`."""
    files = open_spec(spec, registry)
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
        shown = ("base", "tokenizer", "data", "figures", "versions", "made_from")
        found |= {name: passport[name] for name in shown if passport[name] is not None}
        found["probes"] = len(files.manifest.probes)
    return found


def verify(spec: str, *, base: str | None, registry: Path | None, progress: Progress) -> dict[str, Any]:
    """Replay an adapter's probes and return how far it is from its passport.

    Raises:
        AdapterMismatchError: it behaves differently, or has no passport to be held against (exit 77).
    """
    files = open_spec(spec, registry)
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


def lint(spec: str, *, engine: str, max_rank: int | None, registry: Path | None) -> dict[str, Any]:
    """Return whether an engine loads the adapter and answers as it was trained, and if not, why and what to do."""
    from lora_tune.adapter import portability

    known = get_args(portability.Engine)
    if engine not in known:
        raise UsageError(f"--for {engine}: expected one of {', '.join(known)}")
    files = open_spec(spec, registry)
    found = portability.lint_for(files, cast(portability.Engine, engine), max_rank=max_rank)
    return {"adapter": str(files.folder), **found.as_dict()}


def promote(spec: str, alias: str, registry: Path | None) -> dict[str, Any]:
    """Point an alias to a version."""
    _say_doubts(spec, alias, registry=registry)
    return shelf.promote(spec, alias, root=registry_root(registry)).as_dict()


def rollback(alias: str, registry: Path | None) -> dict[str, Any]:
    """Point an alias to what it pointed to before."""
    _say_doubts(alias, registry=registry)
    return shelf.rollback(alias, root=registry_root(registry)).as_dict()


def remove(spec: str, registry: Path | None) -> dict[str, Any]:
    """Remove a version, or an alias."""
    _say_doubts(spec, registry=registry)
    return {"removed": shelf.remove(spec, root=registry_root(registry))}


def import_(path: Path, name: str | None, registry: Path | None) -> dict[str, Any]:
    """Copy a folder or a tar into the registry."""
    from lora_tune.adapter.transport import import_adapter

    version = import_adapter(path, name, root=registry_root(registry))
    passport = "present" if open_spec(version.spec, registry).manifest else "unverified: made elsewhere"
    return {"adapter": version.spec, "folder": str(version.folder), "passport": passport}


def export_tar(spec: str, out: Path, registry: Path | None) -> dict[str, Any]:
    """Write a version of the registry as a tar with digests."""
    _say_doubts(spec, registry=registry)
    from lora_tune.adapter.transport import export_version

    return export_version(spec, out, root=registry_root(registry)).as_dict()


def compose(
    specs: Sequence[str], *, plan: dict[str, Any], base: str | None, registry: Path | None, progress: Progress
) -> dict[str, Any]:
    """Make one adapter of several, and put it into the registry.

    Args:
        specs: `ADAPTER` or `ADAPTER=WEIGHT`; a folder whose name holds a `=` is that folder.
        plan: what ComposePlan takes.
        base: another place of the base.
        registry: its folder; None takes the default.
        progress: told what is being done.
    """
    parts = [_weighted(spec, registry) for spec in specs]
    from lora_tune.adapter.compose import ComposePlan, compose_adapters

    settled = ComposePlan(**plan)
    return _registered(
        settled.name, registry, lambda out: compose_adapters(parts, out, progress, plan=settled, base_name=base)
    )


def resize(
    spec: str, *, rank: int | None, name: str | None, base: str | None, registry: Path | None, progress: Progress
) -> dict[str, Any]:
    """Write an adapter in another rank, or without one fold an rsLoRA, as the next version of `name`.

    Raises:
        UsageError, CannotCreateError: there is no name, or without `name` that of another adapter (exit 2, 73).
    """
    adapter = open_spec(spec, registry)
    from lora_tune.adapter.transport import own_name

    called = name if name is not None else own_name(adapter, root=registry_root(registry))

    def make(out: Path) -> Any:
        from lora_tune.adapter.resize import fold_adapter, resize_adapter

        if rank is None:
            return fold_adapter(adapter, out, progress, name=called, base_name=base)
        return resize_adapter(adapter, out, progress, rank=rank, name=called, base_name=base)

    return _registered(called, registry, make)


def push(
    spec: str, repo: str, *, public: bool, dry_run: bool, branch: str | None, registry: Path | None
) -> dict[str, Any]:
    """Send an adapter to the hub, or say what would be sent."""
    adapter = open_spec(spec, registry)
    from lora_tune.adapter.hub import push_adapter

    return push_adapter(adapter, repo, private=not public, dry_run=dry_run, revision=branch).as_dict()


def merge(
    spec: str,
    out: Path,
    *,
    also: Sequence[str],
    onto: str,
    dtype: str | None,
    base: str | None,
    registry: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Merge adapters into their base and return the receipt.

    Args:
        spec: as one of `compose`; a weight other than 1 is noted, since it may have been meant as part of a path.
        out: the new folder.
        also: others, as those of `compose`.
        onto: which weights of the base.
        dtype: what is written, bf16 or fp32; None takes what the base computed in while training.
        base: another place of the base.
        registry: its folder; None takes the default.
        progress: told what is being done.

    Raises:
        UsageError: `onto` is none of trained, original, or `dtype` none of bf16, fp32 (exit 2).
    """
    if dtype not in (None, "bf16", "fp32"):
        raise UsageError(f"--dtype {dtype}: expected bf16 or fp32", hint="leave it out to write what was trained with")
    if onto not in ("trained", "original"):
        raise UsageError(
            f"--onto {onto}: expected trained or original",
            hint="merging inside quantized weights would round the adapter away, so that is not offered",
        )
    adapters = [_weighted(given, registry) for given in (spec, *also)]
    first, weight = adapters[0]
    if weight != 1:
        render.note(f"note: {first.label} is merged with the weight {weight:g}")
    say_unverified([files for files, _ in adapters])
    from lora_tune.adapter.merge import merge_adapters

    way = cast(Literal["trained", "original"], onto)
    return asdict(merge_adapters(adapters, out, progress, onto=way, base_name=base, dtype=cast(Any, dtype)))


def export(
    spec: str, out: Path, *, to: str, dtype: str | None, base: str | None, registry: Path | None, progress: Progress
) -> dict[str, Any]:
    """Write an adapter, or a merged model's folder, for another engine."""
    folder = Path(spec)
    from lora_tune.adapter import convert

    if spec and (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if to != "gguf":
            raise UsageError(f"--to {to}: {spec} is a whole model; that is written as gguf only")
        from lora_tune.adapter.gguf_files import held_dtype, model_to_gguf

        wanted = cast(Any, dtype or held_dtype(folder))
        return {"to": to, "file": str(model_to_gguf(folder, out, dtype=wanted)), "dtype": wanted}
    adapter = open_spec(spec, registry)
    say_unverified([adapter])
    report = convert.export_adapter_to(
        adapter, out, progress, to=cast(Any, to), base_name=base, base_dtype=cast(Any, dtype)
    )
    return report.as_dict()


def open_spec(spec: str, registry: Path | None) -> AdapterFiles:
    """Return the checked adapter that `spec` names; a doubt about the alias that it is goes to stderr."""
    _say_doubts(spec, registry=registry)
    return shelf.open_found(spec, root=registry_root(registry))


def registry_root(registry: Path | None) -> Path:
    """Return the registry's folder: the one given, or the default."""
    return registry if registry is not None else shelf.registry_root()


def _say_doubts(*specs: str, registry: Path | None) -> None:
    root = registry_root(registry)
    for spec in dict.fromkeys(specs):
        if said := shelf.why_doubtful(spec, root=root):
            render.note(f"note: {said}")


def say_unverified(adapters: Sequence[AdapterFiles]) -> None:
    """Say on stderr which of them have no passport."""
    for files in adapters:
        if files.manifest is None:
            render.note(
                f"note: {files.label} is unverified: it has no passport, so nothing says on which base, tokenizer and "
                "template it was trained, or how it must answer"
            )


def _weighted(given: str, registry: Path | None) -> tuple[AdapterFiles, float]:
    # All of it may be a folder's path, and then none of it is a weight.
    if "=" not in given or shelf.is_folder(given):
        return open_spec(given, registry), 1.0
    spec, _, weight = given.rpartition("=")
    try:
        factor = float(weight)
    except ValueError as err:
        raise UsageError(
            f"{given}: {weight!r} is no weight, and there is no folder {given}", hint="write NAME=0.5"
        ) from err
    return open_spec(spec, registry), factor


def _registered(name: str, registry: Path | None, make: Callable[[Path], Any]) -> dict[str, Any]:
    root = registry_root(registry)
    shelf.ensure_writable(root, name=name)
    with tempfile.TemporaryDirectory(prefix="lora_tune-") as folder:
        made = Path(folder) / "adapter"
        report = make(made)
        version = shelf.add(made, name, root=root)
    return {**report.as_dict(), "folder": str(version.folder), "adapter": version.spec}
