"""Merging a large sharded model: peak memory and time, beside peft's own merge of the same files.

Usage: python scripts/bench_merge.py [--gigabytes 4] [--shard-gigabytes 1] [--rank 16]
       python scripts/bench_merge.py --quickstart RUN [RUN ...]

The first form writes a made-up Llama in bf16 with random weights and a random adapter below $TMPDIR, merges it with
lora_tune (tensor by tensor; without the receipt, which loads the model) and with peft (`merge_and_unload`, then
`save_pretrained`), each in a process of its own, compares what they wrote, and deletes everything. Memory is the
process's highest resident set (VmHWM). Its bound is 1.3 x the largest weight file read or written, and 300 MB. The
last line ends with `ratio N.NN`: our seconds over peft's.

The second form merges the adapters of trained runs onto the weights they were trained on and onto the original ones, and
measures adapter and merged models on the run's held-out rows. Prints one JSON line a model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 8192, 32_000, 16


def layer_shapes() -> dict[str, tuple[int, int]]:
    """Return the matrices of one layer."""
    square = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    wide = {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    return {**square, **wide, "mlp.down_proj": (HIDDEN, INTERMEDIATE)}


def write_base(folder: Path, gigabytes: float, shard_gigabytes: float) -> int:
    """Write a made-up base of about so many GB in bf16, and return its number of layers."""
    from transformers import LlamaConfig

    from lora_tune.model.shards import NewTensor, plan_shards, write_shards

    layer_bytes = 2 * sum(rows * columns for rows, columns in layer_shapes().values())
    n_layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(n_layers):
        front = f"model.layers.{layer}"
        shapes |= {f"{front}.{name}.weight": shape for name, shape in layer_shapes().items()}
        shapes |= {f"{front}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors = [NewTensor(name, "BF16", shape, partial(random_piece, shape)) for name, shape in shapes.items()]
    write_shards(folder, plan_shards(tensors, max_shard_bytes=int(shard_gigabytes * 1e9)))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=n_layers, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return n_layers


def random_piece(shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield one tensor of random numbers."""
    import torch

    yield (torch.randn(shape) * 0.02).to(torch.bfloat16)


def write_adapter(folder: Path, n_layers: int, rank: int) -> None:
    """Write a random adapter on every matrix, as peft saves it."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(n_layers):
        for name, (rows, columns) in layer_shapes().items():
            front = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{front}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
            tensors[f"{front}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rsplit(".", 1)[-1] for name in layer_shapes()]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_ours(base: Path, adapter: Path, out: Path, max_shard_bytes: int) -> None:
    """Merge as `lora-tune merge` does, without the receipt."""
    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.merge import plan_merge, write_merged
    from lora_tune.staging import staged_folder

    plan = plan_merge([(open_adapter(adapter), 1.0)], lambda *_: None, onto="trained", base_name=str(base))
    with staged_folder(out) as stage:
        write_merged(plan, stage, lambda *_: None, max_shard_bytes=max_shard_bytes)


def merge_theirs(base: Path, adapter: Path, out: Path, max_shard_bytes: int) -> None:
    """Merge as peft's documentation has it, in the same dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_tune.model.load import detect_device, place
    from lora_tune.recipe.schema import BaseSection

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[place(detect_device(), BaseSection(name=str(base))).dtype]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=f"{max_shard_bytes / 1e9:g}GB")


def peak_bytes() -> int:
    """Return this process's highest resident set."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_a_process_of_its_own(who: str, base: Path, adapter: Path, out: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Run one merge and return its seconds, imports included, and its peak memory in MB."""
    command = [sys.executable, __file__, "--one", who, str(base), str(adapter), str(out), str(max_shard_bytes)]
    start = time.monotonic()
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    seconds = time.monotonic() - start
    files = list(out.glob("*.safetensors"))
    return {
        "who": who,
        "seconds": round(seconds, 1),
        "peak_mb": round(int(done.stdout.split()[-1]) / 1e6),
        "weight_files": len(files),
        "largest_file_mb": round(max(path.stat().st_size for path in files) / 1e6),
    }


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference of any weight of two merged models; they must hold the same tensors."""
    from lora_tune.model.shards import read_tensor, stored_tensors

    one, other = stored_tensors(first), stored_tensors(second)
    assert one.keys() == other.keys()
    return max(float((read_tensor(one[name]).float() - read_tensor(other[name]).float()).abs().max()) for name in one)


def bench(gigabytes: float, shard_gigabytes: float, rank: int) -> None:
    """Measure both merges and print."""
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        base.mkdir()
        n_layers = write_base(base, gigabytes, shard_gigabytes)
        write_adapter(adapter, n_layers, rank)
        files = [path.stat().st_size for path in base.glob("*.safetensors")]
        print(json.dumps({
            "base_gb": round(sum(files) / 1e9, 2), "layers": n_layers, "files": len(files), "largest_file_mb": round(max(files) / 1e6)
        }))  # fmt: skip
        found = {}
        for who in ("ours", "theirs"):
            out = Path(scratch) / who
            found[who] = in_a_process_of_its_own(who, base, adapter, out, int(shard_gigabytes * 1e9))
            print(json.dumps(found[who]), flush=True)
        print(
            json.dumps({"largest_difference_of_a_weight": largest_difference(*(Path(scratch) / who for who in found))})
        )
        bound = 1.3 * max(max(files) / 1e6, found["ours"]["largest_file_mb"]) + 300
        peak = found["ours"]["peak_mb"]
        print(f"peak memory {peak} MB, bound {bound:.0f} MB: {'within' if peak <= bound else 'BEYOND'}")
    print(f"seconds of our merge over peft's: ratio {found['ours']['seconds'] / found['theirs']['seconds']:.2f}")


def measure_run(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the held-out figures of a run's adapter and of its merged models."""
    from lora_tune.adapter.door import open_adapter
    from lora_tune.adapter.live import open_live
    from lora_tune.adapter.merge import merge_adapter
    from lora_tune.data.dataset import prepare_dataset
    from lora_tune.model.dense import BaseFiles
    from lora_tune.model.load import load_base, load_tokenizer
    from lora_tune.recipe.loader import load_recipe
    from lora_tune.recipe.schema import BaseSection

    adapter = open_adapter(run / "adapter")
    recipe = load_recipe(run / "recipe.resolved.yaml").recipe
    live = open_live(adapter, lambda *_: None)
    held_out = prepare_dataset(recipe.data, live.tokenizer, seed=recipe.train.seed).held_out
    assert held_out is not None
    rows = [held_out.rows[number] for number in range(len(held_out.rows))]
    asked = list(held_out.rows.conversations())
    was = answers_and_choices(live.model, live.tokenizer, rows, asked, recipe.eval.generate)
    yield {"model": f"{adapter.shape.variant} on {live.base.quantization}", **against(was, was)}
    del live
    for onto in ("trained", "original"):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "merged"
            receipt = merge_adapter(adapter, out, lambda *_: None, onto=onto)
            files = BaseFiles("merged", None, out)
            model = load_base(files, BaseSection(name=str(out), dtype=receipt.dtype))
            now = answers_and_choices(model, load_tokenizer(files), rows, asked, recipe.eval.generate)
        yield {"model": f"merged onto {onto}", **against(was, now), "receipt": vars(receipt)}


def answers_and_choices(model: Any, tokenizer: Any, rows: Any, asked: Any, max_tokens: int) -> dict[str, Any]:
    """Return each row's generated answer, whether it is the row's own, and the first choice after each of its tokens."""
    from lora_tune.adapter.probes import probe_logits
    from lora_tune.data.tokens import answer_ids, prompt_ids
    from lora_tune.evaluation.metrics import is_exact
    from lora_tune.model.generate import generate_answers, stop_ids

    choices = [probe_logits(model, row.input_ids, 1).argmax(-1).tolist() for row in rows]
    trained = [list(row.trained)[1:] for row in rows]
    prompts = [prompt_ids(tokenizer, row.messages[:-1], tools=row.tools) for row in asked]
    given = generate_answers(model, tokenizer, prompts, max_tokens=max_tokens, ends=stop_ids(model, tokenizer))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in given]
    wanted = [tokenizer.decode(answer_ids(row, tokenizer), skip_special_tokens=True) for row in asked]
    exact = [is_exact(text, expected) for text, expected in zip(texts, wanted, strict=True)]
    return {"texts": texts, "exact": exact, "choices": choices, "trained": trained}


def against(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return how far the second is from the first, in the words of the report."""
    pairs = [
        (a == b, trained)
        for first, second, masks in zip(was["choices"], now["choices"], was["trained"], strict=True)
        for a, b, trained in zip(first, second, masks, strict=True)
    ]
    answered = [same for same, trained in pairs if trained]
    return {
        "exact_match": round(sum(now["exact"]) / len(now["exact"]), 4),
        "same_answer_as_the_adapter": round(
            sum(a == b for a, b in zip(was["texts"], now["texts"], strict=True)) / len(was["texts"]), 4
        ),
        "top1_agreement": round(sum(same for same, _ in pairs) / len(pairs), 4),
        "top1_agreement_where_trained": round(sum(answered) / len(answered), 4),
    }


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars off the output."""
    from lora_tune.model.dense import quiet

    with quiet():
        yield


def main() -> int:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--gigabytes", type=float, default=4.0)
    cli.add_argument("--shard-gigabytes", type=float, default=1.0)
    cli.add_argument("--rank", type=int, default=16)
    cli.add_argument("--quickstart", nargs="+", type=Path, metavar="RUN")
    cli.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = cli.parse_args()
    if given.one:
        who, base, adapter, out, max_shard_bytes = given.one
        merge = {"ours": merge_ours, "theirs": merge_theirs}[who]
        merge(Path(base), Path(adapter), Path(out), int(max_shard_bytes))
        print(peak_bytes())
    elif given.quickstart:
        with quiet_libraries():
            for run in given.quickstart:
                for line in measure_run(run):
                    print(json.dumps(line, default=vars), flush=True)
    else:
        bench(given.gigabytes, given.shard_gigabytes, given.rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
