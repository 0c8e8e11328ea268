"""The tiny base, tokenizer and rows that the doctor trains: made in code, without network or files of ours."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.apply import apply_lora
from lora_tune.data.dataset import Splits, prepare_dataset
from lora_tune.model.dense import BaseFiles
from lora_tune.model.load import Device, Placement, place
from lora_tune.recipe.schema import BaseSection, DataSection, EvalSection, LoraSection, TrainSection
from lora_tune.training.trainer import Trainer, make_trainer

MAX_SEQ_TOKENS = 256
LORA = LoraSection(rank=4, alpha=12.0)
"""Its scaling is 3: a factor that is forgotten, or taken twice, shows."""

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template that most bases of today use a form of."""

END_OF_TURN = "<|im_end|>"
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", END_OF_TURN]

_THINGS = ("lamp", "fan", "blind", "oven", "radio", "kettle", "heater", "gate", "pump", "bell", "screen", "lock")
N_TRAINED = 8
"""Rows that are trained; the rest of them is held out."""


def rows() -> list[list[dict[str, str]]]:
    """Return conversations of different lengths: with and without a system message, of one answer or two.

    Some answers repeat what the user said, word for word.
    """
    found = []
    for number, thing in enumerate(_THINGS):
        turns = [
            {"role": "user", "content": f"switch the {thing} on" + " please" * (number * 5 % 9)},
            {"role": "assistant", "content": f'{{"device": "{thing}", "state": "on", "level": {number}}}'},
        ]
        if number % 2:
            turns.insert(0, {"role": "system", "content": "You answer with one call."})
        if number % 3 == 0:
            turns += [
                {"role": "user", "content": f"say: the {thing} is on"},
                {"role": "assistant", "content": f"the {thing} is on"},
            ]
        found.append(turns)
    return found


@dataclass(frozen=True)
class Sample:
    """What every check starts from; no check changes it."""

    folder: Path
    """A scratch folder that is removed afterwards."""
    device: Device
    tokenizer: Any
    splits: Splits
    """N_TRAINED rows to train on, and held-out ones."""
    base_files: BaseFiles
    """The Llama-like base as a folder, as a recipe would name it."""

    @property
    def base_section(self) -> BaseSection:
        """The base as a recipe would name it, in fp32: the same figures on every machine."""
        return BaseSection(name=str(self.base_files.folder), dtype="fp32")

    @property
    def placement(self) -> Placement:
        """Dtype and place of the base."""
        return place(self.device, self.base_section)

    def scratch(self) -> Path:
        """Return a new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


def make_sample(folder: Path, device: Device) -> Sample:
    """Return the sample, with its files in `folder`."""
    tokenizer = tiny_tokenizer()
    base = folder / "base"
    tiny_base("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    return Sample(folder, device, tokenizer, tokenize_rows(folder, tokenizer), BaseFiles("doctor", None, base))


def tokenize_rows(folder: Path, tokenizer: Any) -> Splits:
    """Return the rows as training sees them: written to `folder`, read, tokenized anew, and held to their length."""
    paths = {"train": folder / "train.jsonl", "held_out": folder / "held_out.jsonl"}
    for path, part in zip(paths.values(), (rows()[:N_TRAINED], rows()[N_TRAINED:]), strict=True):
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in part), encoding="utf-8")
    section = DataSection(
        path=str(paths["train"]), eval_path=str(paths["held_out"]), max_seq_tokens=MAX_SEQ_TOKENS, too_long="fail"
    )
    with own_cache(folder / "cache"):
        return prepare_dataset(section, tokenizer, seed=0)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Keep the user's cache out of it: what it holds from before would hide what is broken now."""
    before = os.environ.get("LORA_TUNE_CACHE")
    os.environ["LORA_TUNE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LORA_TUNE_CACHE"]
        else:
            os.environ["LORA_TUNE_CACHE"] = before


def tiny_tokenizer(template: str = TEMPLATE) -> Any:
    """Return a byte-level BPE tokenizer of a few hundred words, learnt from the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytewise = pre_tokenizers.ByteLevel
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer, learnt.decoder = bytewise(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=_SPECIAL_TOKENS, initial_alphabet=bytewise.alphabet(), show_progress=False
    )
    learnt.train_from_iterator([turn["content"] for turns in rows() for turn in turns], trainer)
    pad, start, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt, bos_token=start, eos_token=end, pad_token=pad, unk_token=pad, chat_template=template
    )


def tiny_base(architecture: str) -> Any:
    """Return a random two-layer base in fp32, always the same one: `llama`, or `gpt2` for its transposed layers."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {
        # Wide enough spread that attention looks at some tokens more than at others.
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2 * MAX_SEQ_TOKENS, initializer_range=0.1,
            bos_token_id=1, eos_token_id=2,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=2 * MAX_SEQ_TOKENS, initializer_range=0.1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(settings[architecture]()).eval()


def adapted(base: Any, *, dropout: float = 0.0) -> Any:
    """Return the base with an adapter that changes its answers, as after some training; always the same one."""
    import torch

    torch.manual_seed(1)
    model = apply_lora(base, LORA.model_copy(update={"dropout": dropout}), adapter_dtype="fp32")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and the gradient of A with it
                weight.normal_(std=0.05)
    return model


def trainer_of(sample: Sample, model: Any, *, evaluation: EvalSection | None = None, callbacks: Any = (), **train: Any) -> Trainer:  # fmt: skip
    """Return the trainer that a recipe with these settings would get; by default one step over all rows at once."""
    settings = {"max_steps": 1, "micro_batch_sequences": N_TRAINED, "batching": "random", **plain_optimizer(), **train}
    return make_trainer(
        model, sample.tokenizer, sample.splits, TrainSection(**settings), evaluation or EvalSection(),
        placement=sample.placement, device=sample.device, folder=sample.scratch(), callbacks=callbacks,
        max_seq_tokens=MAX_SEQ_TOKENS,
    )  # fmt: skip


def plain_optimizer() -> dict[str, Any]:
    """Return settings under which a step's figures follow from its gradients by a short formula."""
    return {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e9}
