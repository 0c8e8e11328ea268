"""Which thread computes with how many cores: the engine's with all, every other with one.

Each thread that runs a parallel product gets OpenMP workers of its own. With more workers than cores, libgomp no longer lets
them wait awake, and each of the thousand small products of a token costs a wake-up: measured, on 2 cores, 280 ms a step
of 16 mixed answers against 143.
"""

import os

SPINS = "20000000"
"""How long a worker waits awake for the next product: some tenths of a second, far longer than the pause between two."""

_n_cores: list[int] = []


def leave_to_engine() -> None:
    """Keep this and later threads on one core, but for the engine's; to be called before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    import torch

    if not _n_cores:
        _n_cores.append(torch.get_num_threads())
    torch.set_num_threads(1)


def take() -> None:
    """Let the calling thread compute on all cores, if they were left to it."""
    import torch

    if _n_cores:
        torch.set_num_threads(_n_cores[0])
