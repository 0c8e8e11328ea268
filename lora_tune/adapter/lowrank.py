"""What an adapter adds to one layer, as two thin matrices: summed, padded, cut to a rank. Pure functions on tensors.

Nothing here knows files, bases or PEFT.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight, B·A; every scaling is inside B."""

    a: Any
    """[R, D_in], fp32."""
    b: Any
    """[D_out, R], fp32."""

    @property
    def rank(self) -> int:
        """Inner dimension R."""
        return int(self.a.shape[0])

    def delta(self) -> Any:
        """Return the full change, [D_out, D_in], fp32."""
        return self.b @ self.a


@dataclass(frozen=True)
class Kept:
    """How much of a change is left after it was cut to a rank, as squares of Frobenius norms, so that they add up."""

    kept_squares: float
    all_squares: float

    @property
    def share(self) -> float:
        """Frobenius norm of what is left over that of the whole, 0 to 1; 1 when there was nothing to lose."""
        return min(1.0, math.sqrt(self.kept_squares / self.all_squares)) if self.all_squares > 0 else 1.0


def total(parts: Iterable[Kept]) -> Kept:
    """Return what is left of several layers together."""
    found = list(parts)
    return Kept(math.fsum(kept.kept_squares for kept in found), math.fsum(kept.all_squares for kept in found))


def scaled(a: Any, b: Any, *, factor: float) -> LowRank:
    """Return factor · B·A, in fp32.

    Args:
        a: [R, D_in], any float dtype.
        b: [D_out, R], any float dtype.
        factor: goes into B.
    """
    return LowRank(a.float().contiguous(), (b.double() * factor).float().contiguous())


def concatenated(terms: Sequence[LowRank]) -> LowRank:
    """Return the exact sum: [B1 B2 …] · [A1; A2; …], whose rank is the sum of the ranks."""
    import torch

    return LowRank(torch.cat([term.a for term in terms], dim=0), torch.cat([term.b for term in terms], dim=1))


def padded(term: LowRank, rank: int) -> LowRank:
    """Return the same change with zeros up to `rank`."""
    from torch.nn.functional import pad

    missing = rank - term.rank
    assert missing >= 0
    return LowRank(pad(term.a, (0, 0, 0, missing)), pad(term.b, (0, missing)))


def truncated(term: LowRank, rank: int) -> tuple[LowRank, Kept]:
    """Return the best approximation of that rank (in the Frobenius norm), and how much of the norm it keeps.

    The singular values are those of the small core between two thin QR factors; D_out x D_in numbers are never held.
    They are split evenly between A and B. Computed in fp64.

    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
    """
    import torch

    if rank >= term.rank:
        squares = _squares(term)
        return padded(term, rank), Kept(squares, squares)
    q_b, r_b = torch.linalg.qr(term.b.double())
    q_a, r_a = torch.linalg.qr(term.a.double().T)
    u, values, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    values, root = values[:rank], values[:rank].sqrt()
    a = root[:, None] * (q_a @ v_t[:rank].T).T
    b = (q_b @ u[:, :rank]) * root
    kept = Kept(float((values**2).sum()), _squares(term))
    return padded(LowRank(a.float().contiguous(), b.float().contiguous()), rank), kept


def truncated_delta(delta: Any, rank: int) -> tuple[LowRank, Kept]:
    """Return the best approximation of that rank of a full change, and how much of the norm it keeps.

    The change is projected on the leading eigenvectors of its Gram matrix on the shorter side, which are its leading
    singular vectors there: exact at full rank, and much faster than a full SVD. Computed in fp64.

    Args:
        delta: [D_out, D_in].
        rank: of the result; past the shorter side it is filled with zeros.
    """
    import torch

    wide = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    count = min(rank, wide.shape[0])
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -count:].flip(1)
    right = left.T @ wide
    values = right.norm(dim=1)
    kept = Kept(float((values**2).sum()), float((wide**2).sum()))
    # Split evenly; a direction without length stays without.
    root = values.sqrt()
    left, right = left * root, right * torch.where(root > 0, 1 / root, torch.zeros_like(root))[:, None]
    a, b = (right, left) if delta.shape[0] <= delta.shape[1] else (left.T, right.T)
    return padded(LowRank(a.float().contiguous(), b.float().contiguous()), rank), kept


def trimmed(delta: Any, density: float) -> Any:
    """Return the change with only its largest entries, about `density` of them; the others are 0."""
    count = delta.numel()
    dropped = count - max(1, round(density * count))
    if dropped == 0:
        return delta
    sizes = delta.abs()
    smallest_kept = sizes.flatten().kthvalue(dropped + 1).values
    return delta * (sizes >= smallest_kept)


def ties_sum(deltas: Sequence[Any], *, density: float) -> Any:
    """Return one change out of several by TIES: trim each, elect a sign for each entry, average those that agree.

    An entry whose trimmed values cancel exactly has no sign, and stays 0.

    Args:
        deltas: weighted changes of one layer, each [D_out, D_in].
        density: share of each change that is kept; the paper keeps 0.2 of the whole model, here it is of each layer.

    Source: Yadav et al. 2023, TIES-Merging (https://arxiv.org/abs/2306.01708), algorithm 1 with lambda = 1.
    """
    import torch

    stacked = torch.stack([trimmed(delta, density) for delta in deltas])
    elected = stacked.sum(dim=0).sign()
    agreeing = (stacked.sign() == elected) & (stacked != 0)
    return (stacked * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp_min(1)


def dare_sum(deltas: Sequence[Any], *, density: float, generator: Any) -> Any:
    """Return the sum of several changes by DARE: drop entries at random, divide the others by the share that is kept.

    Args:
        deltas: weighted changes of one layer, each [D_out, D_in].
        density: share of the entries that is kept, 1 - p in the paper.
        generator: torch's; one uniform number is drawn for each entry, change after change, and those below `density`
            are kept.

    Source: Yu et al. 2023, Language Models are Super Mario (https://arxiv.org/abs/2311.03099), with task arithmetic as
        the way to merge.
    """
    import torch

    kept = [delta * (torch.rand(delta.shape, generator=generator) < density) for delta in deltas]
    return torch.stack(kept).sum(dim=0) / density


def _squares(term: LowRank) -> float:
    """Squared Frobenius norm of B·A, from the two small Gram matrices: tr(BᵀB · AAᵀ)."""
    a, b = term.a.double(), term.b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
