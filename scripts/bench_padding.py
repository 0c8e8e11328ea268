"""Measure the padding of one data file in each kind of batching, with a base's own tokenizer.

Usage: python scripts/bench_padding.py DATA [--base builtin:smollm2-135m] [--batch 4] [--max-seq-tokens 1024] [--epochs 3]
No model is loaded. Prints one JSON line: the share of padding among all tokens computed, mean over the epochs, and how
many forward passes an epoch takes.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.order import grouped_batches, pack, padding_share, random_order
from lora_tune.model.dense import quiet, ready_base
from lora_tune.model.load import load_tokenizer
from lora_tune.recipe.schema import BaseSection, DataSection


def row_lengths(section: DataSection, base: BaseSection) -> np.ndarray:
    """Return the tokens of each training row, [rows], as a run would train them."""
    with quiet():
        tokenizer = load_tokenizer(ready_base(base, lambda label, share: None))
        splits = prepare_dataset(section, tokenizer, seed=0)
    return splits.train.n_tokens_by_row


def measure(lengths: np.ndarray, *, batch: int, limit: int, epochs: int) -> dict[str, object]:
    """Return padding share and forward passes an epoch of each batching."""
    start = time.monotonic()
    packs = pack(lengths, limit, seed=0)
    pack_seconds = time.monotonic() - start
    widths = np.array([lengths[members].sum() for members in packs], dtype=np.int64)
    orders = {
        "random": (lengths, partial(random_order, len(lengths), seed=0)),
        "grouped": (lengths, partial(grouped_batches, lengths, batch, seed=0)),
        "packed": (widths, partial(grouped_batches, widths, batch, seed=0)),
    }
    found: dict[str, object] = {"rows": len(lengths), "tokens": int(lengths.sum()), "longest": int(lengths.max())}
    for name, (wide, order) in orders.items():
        shares = [padding_share(wide, order(epoch=epoch), batch) for epoch in range(epochs)]
        passes = -(-len(wide) // batch)
        found[name] = {"padding_share": round(float(np.mean(shares)), 4), "forward_passes": passes}
    return found | {"pack_seconds": round(pack_seconds, 3)}


def main() -> int:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("data", type=Path)
    cli.add_argument("--base", default="builtin:smollm2-135m")
    cli.add_argument("--batch", type=int, default=4)
    cli.add_argument("--max-seq-tokens", type=int, default=1024)
    cli.add_argument("--epochs", type=int, default=3)
    given = cli.parse_args()
    section = DataSection(path=str(given.data.resolve()), max_seq_tokens=given.max_seq_tokens)
    lengths = row_lengths(section, BaseSection(name=given.base))
    found = measure(lengths, batch=given.batch, limit=given.max_seq_tokens, epochs=given.epochs)
    print(json.dumps({"data": given.data.name, "base": given.base, "batch": given.batch, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
