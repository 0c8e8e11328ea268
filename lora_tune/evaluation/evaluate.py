"""Base beside adapter on held-out rows: loss, perplexity, token accuracy, exact match of generated answers."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from lora_tune.data.dataset import TokenizedSet, TokenRows
from lora_tune.data.messages import Conversation
from lora_tune.data.tokens import TokenizedRow, answer_ids, prompt_ids
from lora_tune.evaluation.metrics import Figures, figures, is_exact
from lora_tune.model.generate import generate_answers, stop_ids

Progress = Callable[[str, float], None]
MAX_BATCH_TOKENS = 1024
"""Padded tokens in one forward pass of the loss."""


@dataclass(frozen=True)
class Answer:
    """One held-out row answered by base and adapter."""

    where: str
    prompt: str
    """The last user message."""
    expected: str
    base: str | None
    adapter: str


@dataclass(frozen=True)
class Evaluation:
    """What base and adapter do on the same rows."""

    adapter: Figures
    base: Figures | None
    answers: tuple[Answer, ...]

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as reports print it: the same metric names for both."""
        return {
            "adapter": self.adapter.as_dict(),
            "base": self.base.as_dict() if self.base else None,
            "answers": [vars(answer) for answer in self.answers],
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    held_out: TokenizedSet,
    progress: Progress,
    *,
    max_answer_tokens: int = 0,
    answer_rows: int = 200,
    base_too: bool = True,
) -> Evaluation:
    """Measure the live adapter, and its base with the adapter switched off, on the held-out rows.

    Args:
        model: a PEFT model in evaluation mode.
        tokenizer: its tokenizer.
        held_out: tokenized rows and their conversations.
        progress: told what is being done.
        max_answer_tokens: longest generated answer; 0 generates none.
        answer_rows: at most so many rows, the first ones, are answered.
        base_too: measure the base as well.
    """
    asked = list(islice(held_out.rows.conversations(), answer_rows)) if max_answer_tokens else []
    # The perfect answer as the model would write it: templates may put something before the words.
    expected = [_text(tokenizer, answer_ids(row, tokenizer)) for row in asked]
    results = []
    for who in ("adapter", "base") if base_too else ("adapter",):
        with model.disable_adapter() if who == "base" else nullcontext():
            progress(f"held-out loss, {who}", 0.0)
            nll, correct, tokens = _score(model, held_out.rows, tokenizer.pad_token_id)
            progress(f"held-out answers, {who}", 0.3)
            answers = _answer(model, tokenizer, asked, max_answer_tokens, partial(progress, f"held-out answers, {who}"))
        exact = [is_exact(given, wanted) for given, wanted in zip(answers, expected, strict=True)]
        results.append((figures(nll_sum=nll, n_correct=correct, n_tokens=tokens, exact=exact), answers))
    progress("held-out rows measured", 1.0)
    adapter, base = results[0], results[1] if base_too else None
    return Evaluation(
        adapter[0],
        base[0] if base else None,
        tuple(
            Answer(row.where, row.messages[-2].content, expected[i], base[1][i] if base else None, adapter[1][i])
            for i, row in enumerate(asked)
        ),
    )


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _score(model: Any, rows: TokenRows, pad_id: int) -> tuple[float, int, int]:
    """Return summed negative log-likelihood (nats), correct first choices and count of the trained tokens."""
    import torch

    takes_positions = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
    nll, correct, count = 0.0, 0, 0
    for batch in _batches(rows):
        width = max(len(row.input_ids) for row in batch)
        ids = torch.tensor(
            [[*row.input_ids, *[pad_id] * (width - len(row.input_ids))] for row in batch], device=model.device
        )
        seen = torch.tensor(
            [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in batch], device=model.device
        )
        trained = torch.tensor(
            [[*row.trained, *[False] * (width - len(row.trained))] for row in batch], device=model.device
        )
        # Only where a token is trained: whole rows on a large vocabulary would not fit.
        positions = trained[:, 1:].any(dim=0).nonzero().flatten()
        kept = {"logits_to_keep": positions} if takes_positions else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False, **kept).logits
        counted = trained[:, 1:][:, positions]
        logits = (logits if takes_positions else logits[:, positions])[counted].float()
        targets = ids[:, 1:][:, positions][counted]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += int(targets.numel())
    return nll, correct, count


def _batches(rows: TokenRows) -> Iterator[list[TokenizedRow]]:
    """Yield batches of rows of like length, read when they are asked for."""
    batch: list[TokenizedRow] = []
    for number in rows.n_tokens_by_row.argsort(kind="stable").tolist():
        row = rows[number]
        if batch and len(row.input_ids) * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _answer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Conversation],
    max_tokens: int,
    progress: Callable[[float], None],
    chunk: int = 32,
) -> list[str]:
    answers: list[str] = []
    ends = stop_ids(model, tokenizer)
    for first in range(0, len(rows), chunk):
        prompts = [prompt_ids(tokenizer, row.messages[:-1], tools=row.tools) for row in rows[first : first + chunk]]
        made = generate_answers(model, tokenizer, prompts, max_tokens=max_tokens, ends=ends)
        answers += [_text(tokenizer, ids) for ids in made]
        progress(len(answers) / len(rows))
    return answers
