"""Several adapters → one: their exact weighted sum, that sum cut to a rank, or a merge by TIES or DARE."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lora_tune.adapter.derived import Derived, DerivedReport, checked_rank, write_derived
from lora_tune.adapter.door import MAX_RANK
from lora_tune.adapter.lowrank import Kept, LowRank, concatenated, dare_sum, ties_sum, truncated, truncated_delta
from lora_tune.adapter.manifest import MadeFrom
from lora_tune.adapter.parents import Part, check_parts, open_reference, parent_facts, read_layers
from lora_tune.errors import RefusedError, UsageError
from lora_tune.model.resolve import Progress
from lora_tune.recipe.schema import NAME_PATTERN

Method = Literal["concat", "svd", "ties", "dare"]
MAX_PARTS = 16
MIN_DENSITY = 0.01


@dataclass(frozen=True)
class ComposePlan:
    """How adapters are made into one."""

    method: Method
    name: str
    """Of the new adapter."""
    rank: int | None = None
    """Of the new adapter; None takes the highest of the parts. `concat` has none to choose: the ranks add up."""
    density: float = 0.5
    """Share of each layer's change that ties and dare keep."""
    seed: int = 0
    """Decides which entries dare drops."""
    allow_unverified: bool = False
    """Take adapters without a passport too; the new one's passport says which they were."""


def compose_adapters(
    parts: Sequence[Part], out: Path, progress: Progress, *, plan: ComposePlan, base_name: str | None = None
) -> DerivedReport:
    """Write the adapters as a new one to `out`, and return how far it is from their exact weighted sum.

    `concat` is that sum, and its rank is the sum of the ranks; `svd` cuts it to a rank; `ties` and `dare` merge the
    layers' full changes, and cut what comes out to a rank. The base must be at hand, for the new golden probes.

    Raises:
        UsageError: plan or weights cannot be meant (exit 2).
        RefusedError: DoRA, too high a rank, or an adapter without a passport that was not allowed (exit 77).
        AdapterMismatchError: the adapters do not belong to one base, tokenizer and template (exit 77).
        TrainingError: `concat` does not answer as the sum does; nothing is written (exit 65).
        CannotCreateError: `out` exists (exit 73).
    """
    rank = _planned_rank(parts, plan)
    check_parts(parts, allow_unverified=plan.allow_unverified)
    reference = open_reference(parts, out, progress, base_name=base_name)
    layers, kept = combined([read_layers(files, weight) for files, weight in parts], plan, progress, rank=rank)
    facts = MadeFrom(
        method=plan.method,
        parents=parent_facts(parts),
        density=plan.density if plan.method in ("ties", "dare") else None,
        seed=plan.seed if plan.method == "dare" else None,
    )
    derived = Derived(plan.name, rank, layers, kept, facts, exact=plan.method == "concat")
    return write_derived(reference, derived, out, progress)


def combined(
    parts: Sequence[Mapping[str, LowRank]], plan: ComposePlan, progress: Progress, *, rank: int
) -> tuple[dict[str, LowRank], dict[str, Kept]]:
    """Return module → its new change, and module → how much of the norm its cut to `rank` kept.

    A layer that some adapters do not have is made of the others' alone.

    Args:
        parts: for each adapter, module → its weighted change.
        plan: method, density and seed; layers are taken in the order of their names.
        progress: told how far it is.
        rank: of every new layer.
    """
    import torch

    generator = torch.Generator().manual_seed(plan.seed)
    modules = sorted({module for layers in parts for module in layers})
    found, kept = {}, {}
    for number, module in enumerate(modules):
        progress(f"composing by {plan.method}", number / len(modules))
        terms = [layers[module] for layers in parts if module in layers]
        if plan.method in ("concat", "svd"):
            found[module], kept[module] = truncated(concatenated(terms), rank)
            continue
        deltas = [term.delta() for term in terms]
        if plan.method == "ties":
            merged = ties_sum(deltas, density=plan.density)
        else:
            merged = dare_sum(deltas, density=plan.density, generator=generator)
        found[module], kept[module] = truncated_delta(merged, rank)
    progress(f"composing by {plan.method}", 1.0)
    return found, kept


def _planned_rank(parts: Sequence[Part], plan: ComposePlan) -> int:
    """Return the new adapter's rank; the plan is checked on the way."""
    if plan.method not in get_args(Method):
        raise UsageError(f"--method is {plan.method!r}; expected one of {', '.join(get_args(Method))}")
    if not 1 <= len(parts) <= MAX_PARTS:
        raise UsageError(f"{len(parts)} adapters to compose; expected 1 to {MAX_PARTS}")
    if not re.fullmatch(NAME_PATTERN, plan.name):
        raise UsageError(
            f"{plan.name!r} is no adapter's name", hint="lower-case letters, digits and hyphens, at most 63"
        )
    if not MIN_DENSITY <= plan.density <= 1:
        raise UsageError(f"--density is {plan.density:g}; expected {MIN_DENSITY:g} to 1")
    if not 0 <= plan.seed < 2**63:
        raise UsageError(f"--seed is {plan.seed}; expected a whole number from 0")
    ranks = [files.shape.rank for files, _ in parts]
    if plan.method != "concat":
        return checked_rank(max(ranks) if plan.rank is None else plan.rank)
    if plan.rank is not None:
        raise UsageError("concat keeps everything, so there is no --rank to choose", hint="or cut it: --method svd")
    if sum(ranks) > MAX_RANK:
        raise RefusedError(
            f"the ranks add up to {sum(ranks)}; at most {MAX_RANK} is loaded",
            hint=f"cut the sum to a rank: --method svd --rank R, with R at most {MAX_RANK}",
        )
    return sum(ranks)
