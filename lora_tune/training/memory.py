"""How much memory a run took, by part, and what to change when there is not enough."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lora_tune.data.dataset import Splits
from lora_tune.errors import OutOfMemoryError
from lora_tune.recipe.schema import TrainSection

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "out of memory",
)


def peak_memory_gib() -> float:
    """Return the most memory this process ever held: on CUDA what torch allocated, elsewhere resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**30


def is_out_of_memory(err: BaseException) -> bool:
    """Return whether an exception of torch or Python means that memory ran out."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    return type(err) is RuntimeError and any(sign in str(err) for sign in _OUT_OF_MEMORY)


def memory_by_part(model: Any, optimizer: Any) -> dict[str, float]:
    """Return GiB held by base, adapter, gradients and optimizer; the rest of the peak is what a step computes with."""
    parts = dict.fromkeys(("base", "adapter", "gradients", "optimizer"), 0)
    for weight in model.parameters() if model is not None else ():
        parts["adapter" if weight.requires_grad else "base"] += _n_bytes(weight)
        parts["gradients"] += _n_bytes(weight.grad)
    for state in getattr(optimizer, "state", {}).values():
        parts["optimizer"] += sum(_n_bytes(value) for value in state.values())
    return {name: n_bytes / 2**30 for name, n_bytes in parts.items()}


@contextmanager
def memory_guard(section: TrainSection, splits: Splits) -> Iterator[dict[str, float]]:
    """Translate what runs out of memory in the block; the block may fill the table it is given with GiB by part.

    Raises:
        OutOfMemoryError: with the peak, what used it, and the settings to change (exit 71).
    """
    parts: dict[str, float] = {}
    try:
        yield parts
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        longest = int(splits.train.n_tokens_by_row.max())
        raise _out_of_memory(section, longest, parts, err) from err


def _out_of_memory(
    section: TrainSection, longest: int, parts: dict[str, float], err: BaseException
) -> OutOfMemoryError:
    what = "packs of rows" if section.batching == "packed" else f"rows of up to {longest} tokens"
    peak = peak_memory_gib()
    rest = peak - sum(parts.values())
    used = "".join(f", {name} {gib:.2f}" for name, gib in parts.items())
    return OutOfMemoryError(
        f"out of memory with {section.micro_batch_sequences} {what}; the peak was {peak:.2f} GiB"
        + (f" (GiB:{used[1:]}, activations and all else {max(rest, 0.0):.2f})" if parts else "")
        + f": {(str(err) or type(err).__name__).splitlines()[0]}",
        hint=_way_out(section),
    )


def _way_out(section: TrainSection) -> str:
    micro, accumulation = section.micro_batch_sequences, section.gradient_accumulation_steps
    knobs = []
    if micro > 1:
        smaller = shrink(section)
        knobs.append(
            f"train.micro_batch_sequences: {smaller.micro_batch_sequences} with "
            f"train.gradient_accumulation_steps: {smaller.gradient_accumulation_steps} (now {micro} and {accumulation}; "
            "the same steps, or let train.on_oom: shrink do it)"
        )
    if not section.gradient_checkpointing:
        knobs.append("train.gradient_checkpointing: true")
    return "set " + "; then ".join([*knobs, "base.quantization: nf4", "a lower data.max_seq_tokens"])


def shrink(section: TrainSection) -> TrainSection:
    """Return the section with a smaller micro-batch and as much more accumulation: the rows of a step stay the same.

    Halved where it is even, else divided by its smallest factor.
    """
    micro = section.micro_batch_sequences
    factor = next(number for number in range(2, micro + 1) if micro % number == 0)
    return section.model_copy(
        update={
            "micro_batch_sequences": micro // factor,
            "gradient_accumulation_steps": section.gradient_accumulation_steps * factor,
        }
    )


def _n_bytes(value: Any) -> int:
    return int(value.nbytes) if isinstance(value, torch.Tensor) else 0
