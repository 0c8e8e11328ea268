"""Pure functions from counts and answers to figures."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figures:
    """What was measured of one model on the held-out rows."""

    loss: float
    """Mean negative log-likelihood of a trained token, in nats."""

    perplexity: float
    """exp(loss)."""

    token_accuracy: float
    """Share of trained tokens that are the model's first choice, given all before them."""

    exact_match: float | None
    """Share of generated answers that equal the row's, but for white space around them; None when none was generated."""

    n_answers: int
    """Answers generated."""

    def as_dict(self) -> dict[str, float | int | None]:
        """The figures as reports print them."""
        return asdict(self)


def figures(*, nll_sum: float, n_correct: int, n_tokens: int, exact: Sequence[bool]) -> Figures:
    """Return the figures of a pass over the held-out rows.

    Args:
        nll_sum: summed negative log-likelihood of the trained tokens, in nats.
        n_correct: trained tokens that were the model's first choice.
        n_tokens: trained tokens.
        exact: for each generated answer, whether it equals the row's.
    """
    loss = nll_sum / n_tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Figures(
        loss=loss,
        perplexity=perplexity,
        token_accuracy=n_correct / n_tokens,
        exact_match=sum(exact) / len(exact) if exact else None,
        n_answers=len(exact),
    )


def is_exact(answer: str, expected: str) -> bool:
    """Return whether an answer equals the expected one, but for white space around them."""
    return answer.strip() == expected.strip()
