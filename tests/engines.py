"""What tests of engines share: random adapters that PEFT itself writes, answers collected, PEFT's own answers as oracle."""

import queue
from pathlib import Path
from typing import Any

from lora_tune.adapter.door import AdapterFiles, open_adapter
from lora_tune.serving.engine import BASE, Finish, Sampling, Token, Work

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    rank: int = 4,
    targets: list[str] | None = None,
    scale: float = 0.15,
    **more: Any,
) -> Path:
    """Write an adapter with random weights, large enough to change answers, by PEFT's save_pretrained."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets or TARGETS.get(model.config.model_type, ALL),
        init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=model.config.model_type == "gpt2", **more,
    )  # fmt: skip
    live = peft.get_peft_model(model, settings)
    for name, parameter in live.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0.0, scale)
    live.save_pretrained(folder)
    return folder


def open_written(folder: Path, base: Path, **more: Any) -> AdapterFiles:
    """Write one and take it through the door."""
    return open_adapter(write_adapter(folder, base, **more))


def peft_answers(
    base: Path, adapter: Path | None, prompts: list[list[int]], n_tokens: int, **more: Any
) -> list[list[int]]:
    """Return greedy answers of transformers' generate, one prompt at a time, past every end of turn."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **more).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, min_new_tokens=n_tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
            )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def peft_margins(base: Path, adapter: Path | None, prompt: list[int], answer: list[int]) -> list[float]:
    """Return by how much the likeliest token's logit exceeds the next one's, at each place of an answer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2).values
    return (top[:, 0] - top[:, 1]).tolist()


class Collected:
    """A sink that keeps what it is told; `wait` blocks until the last event."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.events: queue.Queue[Token | Finish] = queue.Queue()
        self.finish: Finish | None = None

    def __call__(self, event: Token | Finish) -> None:
        self.events.put(event)

    def wait(self, timeout: float = 60.0) -> "Collected":
        while self.finish is None:
            event = self.events.get(timeout=timeout)
            if isinstance(event, Finish):
                self.finish = event
            else:
                self.tokens.append(event)
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def ask(engine: Any, prompt: list[int], adapter: str = BASE, **sampling: Any) -> Collected:
    """Begin an answer; greedy and past every end of turn unless told otherwise."""
    collected = Collected()
    settings = {"max_tokens": 12, "ignore_end": True} | sampling
    collected.answering = engine.submit(Work(tuple(prompt), adapter, Sampling(**settings)), collected)  # type: ignore[attr-defined]
    return collected
