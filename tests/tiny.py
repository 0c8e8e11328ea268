"""Tiny random bases of real architectures, and a real byte-level BPE tokenizer, built in code: no binary assets."""

import json
from pathlib import Path
from typing import Any

from lora_tune.recipe.template import PLAIN_TEMPLATE

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "turn on the lights in the kitchen", "turn off the radio in the hall", "open the door", "close the blinds please",
    '{"device": "lights", "room": "kitchen", "action": "on"}', "What is the capital of France? Paris.", "0 1 2 3 4 5 6 7 8 9",
    "system user assistant ### System: ### User: ### Assistant:",
]  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "plain": PLAIN_TEMPLATE,
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML,
    "trimming": CHATML.replace("message['content']", "message['content'] | trim"),
    "thinking block": CHATML.replace(
        "message['role'] + '\n' +", "message['role'] + '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') +"
    ),
    "bos first": "{{ bos_token }}" + CHATML,
}  # fmt: skip
"""Chat templates of the kinds there are; each ends a turn with `<|im_end|>`."""
ARCHITECTURES = ("llama", "qwen3", "gemma", "mistral", "phi3", "gpt2")


def tiny_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of about 400 words with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_model(architecture: str, *, vocab: int = 512, seed: int = 0) -> Any:
    """Return a random two-layer model of the architecture, in fp32."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    wide = {"vocab_size": vocab, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    configs = {
        "llama": lambda: hf.LlamaConfig(**wide, tie_word_embeddings=True),
        "qwen3": lambda: hf.Qwen3Config(**wide, head_dim=16),
        "gemma": lambda: hf.GemmaConfig(**wide, head_dim=16),
        "mistral": lambda: hf.MistralConfig(**wide, sliding_window=None),
        "phi3": lambda: hf.Phi3Config(**wide),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocab, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
    }  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(configs[architecture]()).eval()


def save_tiny_base(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """Write a tiny base with its tokenizer as a folder that transformers loads."""
    tiny_model(architecture, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def home_rows(count: int) -> list[dict[str, Any]]:
    """Return chat rows that a tiny model can be trained on, no two alike."""
    rooms = ("kitchen", "hall", "garage", "office", "attic")
    devices = ("lights", "radio", "door", "blinds")
    rows = []
    for n in range(count):
        room, device, action = rooms[n % 5], devices[(n // 5) % 4], ("on", "off")[(n // 20) % 2]
        answer = json.dumps({"device": device, "room": room, "action": action})
        rows.append({"messages": [
            {"role": "system", "content": "Reply with one JSON call."},
            {"role": "user", "content": f"turn {action} the {device} in the {room}{' please' * (n // 40)}"},
            {"role": "assistant", "content": answer},
        ]})  # fmt: skip
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(
    folder: Path, base: Path | str, /, *, rows: int = 24, held_out: int = 4, **sections: dict[str, Any]
) -> Path:
    """Write rows and a recipe that trains a tiny base for two steps; `sections` add to it or change it."""
    everything = home_rows(rows + held_out)
    write_jsonl(folder / "rows.jsonl", everything[:rows])
    recipe: dict[str, dict[str, Any]] = {
        "base": {"name": str(base), "dtype": "fp32"},  # the same figures on every machine
        "data": {"path": "rows.jsonl", "max_seq_tokens": 256},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"max_steps": 2, "micro_batch_sequences": 4, "learning_rate": 1e-2},
        "output": {"name": "tiny"},
    }
    if held_out:
        write_jsonl(folder / "held.jsonl", everything[rows:])
        recipe["data"]["eval_path"] = "held.jsonl"
    for name, values in sections.items():
        recipe.setdefault(name, {}).update(values)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"version": 1, **recipe}, indent=1), encoding="utf-8")  # JSON is YAML 1.2
    return path
