"""One adapter → the same in another rank, or an rsLoRA as plain LoRA."""

from pathlib import Path
from typing import Literal

from lora_tune.adapter.derived import Derived, DerivedReport, checked_rank, write_derived
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.lowrank import truncated
from lora_tune.adapter.manifest import MadeFrom
from lora_tune.adapter.parents import Reference, check_parts, name_of, open_reference, parent_facts, read_layers
from lora_tune.errors import UsageError
from lora_tune.model.resolve import Progress


def resize_adapter(
    adapter: AdapterFiles,
    out: Path,
    progress: Progress,
    *,
    rank: int,
    name: str | None = None,
    base_name: str | None = None,
) -> DerivedReport:
    """Write the adapter in another rank to `out`, as plain LoRA, and return how far it is from the adapter.

    A lower rank keeps what a truncated SVD of each layer's change keeps; a higher one adds zeros, and is exact.

    Args:
        adapter: checked by the door.
        out: the new folder.
        progress: told what is being done.
        rank: of the new adapter.
        name: of the new adapter; None takes the adapter's own.
        base_name: another place of the same base; None takes the passport's.

    Raises:
        UsageError: no such rank (exit 2).
        RefusedError: it is a DoRA (exit 77).
        TrainingError: a higher rank does not answer as before; nothing is written (exit 65).
        CannotCreateError: `out` exists (exit 73).
    """
    checked_rank(rank)
    reference = _open(adapter, out, progress, base_name=base_name)
    return write_derived(reference, _in_rank("resize", adapter, rank=rank, name=name), out, progress)


def fold_adapter(
    adapter: AdapterFiles, out: Path, progress: Progress, *, name: str | None = None, base_name: str | None = None
) -> DerivedReport:
    """Write an rsLoRA adapter as plain LoRA to `out`, its scaling alpha / sqrt(rank) inside B: exact.

    Raises:
        UsageError: it is plain LoRA already (exit 2).
        RefusedError: it is a DoRA (exit 77).
        TrainingError: it does not answer as before; nothing is written (exit 65).
        CannotCreateError: `out` exists (exit 73).
    """
    if adapter.shape.variant == "lora":
        raise UsageError(f"{adapter.folder} is plain LoRA already", hint="only rsLoRA adapters are folded")
    reference = _open(adapter, out, progress, base_name=base_name)
    return write_derived(reference, _in_rank("fold", adapter, rank=adapter.shape.rank, name=name), out, progress)


def _open(adapter: AdapterFiles, out: Path, progress: Progress, *, base_name: str | None) -> Reference:
    parts = ((adapter, 1.0),)
    # Nothing is compared with another adapter, so one without a passport is as good.
    check_parts(parts, allow_unverified=True)
    return open_reference(parts, out, progress, base_name=base_name)


def _in_rank(method: Literal["resize", "fold"], adapter: AdapterFiles, *, rank: int, name: str | None) -> Derived:
    cut = {module: truncated(layer, rank) for module, layer in read_layers(adapter).items()}
    return Derived(
        name=name or name_of(adapter),
        rank=rank,
        layers={module: layer for module, (layer, _) in cut.items()},
        kept={module: kept for module, (_, kept) in cut.items()},
        made_from=MadeFrom(method=method, parents=parent_facts(((adapter, 1.0),)), density=None, seed=None),
        exact=rank >= adapter.shape.rank,
    )
