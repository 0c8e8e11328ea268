"""How rows reach the model while training: in which order, and joined into packs whose rows cannot see each other.

The orders themselves are data/order.py's. That packed rows cannot see each other is proved on the base at hand.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_tune.data.order import Indices, plan_batches
from lora_tune.data.tokens import IGNORE_INDEX
from lora_tune.errors import TrainingError
from lora_tune.recipe.schema import TrainSection

N_TOKENS = "n_tokens"
"""Key of a packed micro-batch: tokens without padding. It is for counting, and is not given to the model."""

PROOF_TOKENS = 32
"""Tokens of each of the two rows that prove a base fit for packing."""

Precision = Literal["fp32", "rounded", "int8"]
"""How exactly a base repeats itself: all in fp32, in bf16 or nf4, or in int8."""

Example = Mapping[str, Sequence[int]]
"""One row: `input_ids` and `labels`, [T] each."""


class EpochOrder:
    """A sampler whose order depends on the epoch and on nothing else; accelerate tells it the epoch.

    Source: accelerate 1.15 calls set_epoch on it also behind skip_first_batches, which a resumed run goes through
        (tests/invariant/test_training_invariants.py).
    """

    def __init__(self, order: Callable[[int], Indices], n_items: int) -> None:
        self.order = order
        self.n_items = n_items
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of that epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def __len__(self) -> int:
        return self.n_items


@dataclass(frozen=True)
class PackedRows:
    """The rows by pack, as torch's DataLoader asks for them."""

    rows: Any
    """A map-style dataset of examples."""
    packs: Sequence[Indices]
    """The rows of each pack."""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[Example]:
        return [self.rows[int(row)] for row in self.packs[number]]


@dataclass(frozen=True)
class Feed:
    """What torch's DataLoader needs to feed the training."""

    dataset: Any
    order: EpochOrder
    collate: Callable[[Any], Any]
    batching: str
    """`grouped`, `random` or `packed`: what `auto` chose."""


def train_feed(
    rows: Any, lengths: Indices, section: TrainSection, *, max_seq_tokens: int, collate_rows: Any, collate_packs: Any
) -> Feed:
    """Return the training rows in the recipe's batching.

    `train.micro_batch_sequences` counts what stands side by side in a forward pass: rows, or packs of up to
    `max_seq_tokens` tokens. The rows of a step are the same however it is cut into micro-batches.

    Args:
        rows: a map-style dataset of examples.
        lengths: tokens of each row, [rows].
        section: batching, step size and seed.
        max_seq_tokens: tokens of a full pack.
        collate_rows: examples → micro-batch.
        collate_packs: packs of examples → micro-batch.
    """
    plan = plan_batches(lengths, section, limit=max_seq_tokens)
    order = EpochOrder(plan.order, len(plan.widths))
    if plan.packs is None:
        return Feed(rows, order, collate_rows, plan.batching)
    return Feed(PackedRows(rows, plan.packs), order, collate_packs, plan.batching)


def join_packs(packs: Sequence[Sequence[Example]], *, pad_id: int, one_line: bool) -> dict[str, Any]:
    """Return a micro-batch of packs: `input_ids`, `labels` and `position_ids`, [B, T], and the count of real tokens.

    Positions begin at 0 with each row; there is no attention mask. A row's first token is not trained: it would be
    predicted from the row before. Padding is one more row of its own.

    Args:
        packs: the rows of each pack.
        pad_id: fills packs that are shorter than the longest.
        one_line: join all packs into one, B = 1, without padding: what flash attention needs.

    Source: transformers 5.23 builds the block-diagonal mask for sdpa and eager from position_ids when it gets neither
        attention mask nor cache (masking_utils.find_packed_sequence_indices), for any B; its flash attention does so
        only where B = 1 (modeling_flash_attention_utils._is_packed_sequence).
    """
    lines = [[row for rows in packs for row in rows]] if one_line else packs
    tokens = [sum(len(row["input_ids"]) for row in rows) for rows in lines]
    joined: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for rows, n_tokens in zip(lines, tokens, strict=True):
        n_padding = max(tokens) - n_tokens
        padding = {"input_ids": [pad_id] * n_padding, "labels": [IGNORE_INDEX] * n_padding}
        for values in joined.values():
            values.append([])
        for row in (*rows, padding):
            joined["input_ids"][-1] += row["input_ids"]
            joined["labels"][-1] += [IGNORE_INDEX, *row["labels"][1:]] if row["labels"] else []
            joined["position_ids"][-1] += range(len(row["input_ids"]))
    return {name: torch.tensor(values) for name, values in joined.items()} | {N_TOKENS: sum(tokens)}


def needs_one_line(model: Any) -> bool:
    """Return whether packs must stand in one line for this model's attention."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def short_rows(rows: Any) -> tuple[list[int], list[int]]:
    """Return the token ids of two rows for the proof, PROOF_TOKENS each: their ends, where rows differ most.

    A shorter row is repeated, and the only row of a set serves twice.
    """
    first, second = (list(rows[number]["input_ids"]) for number in (0, len(rows) // 2))
    return (first * PROOF_TOKENS)[-PROOF_TOKENS:], (second * PROOF_TOKENS)[-PROOF_TOKENS:]


def check_packing(model: Any, rows: tuple[list[int], list[int]], *, precision: Precision) -> None:
    """Prove on this base that rows of one pack do not see each other.

    Each token's loss in a pack is compared with the same token's in a line of its own, all in one forward pass of the
    same tokens: in fp32 none may differ by more than 1e-4 nats; in bf16 or on a quantized base, where the sums are rounded
    in another order, the mean difference may be 0.05. Then a row's neighbour is exchanged, which changes no shape: no loss
    of the row may change by more than 1e-4 in any precision. (int8 is spared that: it rounds by the largest activations
    of all rows in the pass, packed or not.)

    Args:
        model: the base with its adapter, where and as it will be trained.
        rows: token ids of two rows of one length, [T] each.
        precision: of the weights and the computation.

    Raises:
        TrainingError: the base lets packed rows see each other, or takes no positions (exit 65).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise _refused(model, "it takes no position_ids, which tell where each row begins")
    first, second = rows
    was_training = model.training
    model.eval()
    try:
        apart = _losses(model, [[first], [second], [second], [first]])
        packed = _losses(model, [[first, second], [second, first]])
        exchanged = _losses(model, [[first[::-1], second], [second, first[::-1]]])
    finally:
        model.train(was_training)
    n = len(first) - 1
    differences = (packed - apart).abs()
    found = float(differences.max() if precision == "fp32" else differences.mean())
    if not found <= (1e-4 if precision == "fp32" else 0.05):
        raise _refused(model, f"packed, a row's losses are {found:.2g} nats a token from those it has alone")
    found = float((exchanged - packed)[n : 3 * n].abs().max())
    if precision != "int8" and not found <= 1e-4:
        raise _refused(model, f"beside another row, a row's losses change by up to {found:.2g} nats a token")


def _losses(model: Any, packs: Sequence[Sequence[list[int]]]) -> torch.Tensor:
    """Return the losses of all tokens but the first of each row, one after the other; the packs have one width."""
    examples = [[{"input_ids": row, "labels": row} for row in rows] for rows in packs]
    batch = join_packs(examples, pad_id=0, one_line=needs_one_line(model))
    ids, labels, positions = (batch[name].to(model.device) for name in ("input_ids", "labels", "position_ids"))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != IGNORE_INDEX].cpu()


def _refused(model: Any, found: str) -> TrainingError:
    return TrainingError(
        f"rows cannot be packed on this base ({model.config.model_type}): {found}",
        hint="set train.batching: grouped",
        where="train.batching",
    )
