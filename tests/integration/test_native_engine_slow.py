"""The real base: 100 prompts over 4 adapters mixed in one batch, token for token what PEFT's generate says of each alone."""

import os
import random

import pytest

from lora_tune.adapter.door import open_adapter
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.model.dense import ready_base
from lora_tune.model.load import load_base, load_tokenizer
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.native import NativeEngine
from tests.engines import ask, peft_answers, peft_margins, write_adapter

WORDS = [
    "sea",
    "lights",
    "kitchen",
    "bicycle",
    "prime",
    "number",
    "story",
    "paris",
    "weather",
    "music",
    "garden",
    "river",
    "engine",
    "letter",
    "moon",
    "bread",
]
N_PROMPTS, N_TOKENS = 100, 16


@pytest.mark.slow
def test_a_hundred_prompts_over_four_adapters_mixed(tmp_path, monkeypatch):
    if os.environ.get("LORA_TUNE_REAL_CACHE"):
        monkeypatch.setenv("LORA_TUNE_CACHE", os.environ["LORA_TUNE_REAL_CACHE"])
    section = BaseSection(name="builtin:smollm2-135m", dtype="fp32")
    files = ready_base(section, lambda *_: None)
    tokenizer = load_tokenizer(files)
    engine = NativeEngine(load_base(files, section), [], max_context_tokens=512)
    adapters = [
        open_adapter(write_adapter(tmp_path / f"a{n}", files.folder, seed=n, rank=8, scale=0.03)) for n in range(4)
    ]
    for n, adapter in enumerate(adapters):
        engine.load(f"a{n}", adapter)
    draw = random.Random(0)
    prompts = [
        prompt_ids(tokenizer, [Message("user", " ".join(draw.choices(WORDS, k=draw.randint(1, 25))))])
        for _ in range(N_PROMPTS)
    ]
    begun = [ask(engine, prompt, f"a{n % 4}", max_tokens=N_TOKENS) for n, prompt in enumerate(prompts)]
    found = [answer.wait(600).ids for answer in begun]
    engine.close()
    different = []
    for key, adapter in enumerate(adapters):
        alone = peft_answers(files.folder, adapter.folder, prompts[key::4], N_TOKENS, dtype="float32")
        for prompt, ours, theirs in zip(prompts[key::4], found[key::4], alone, strict=True):
            if ours != theirs:
                place = next(i for i in range(N_TOKENS) if ours[i] != theirs[i])
                margin = peft_margins(files.folder, adapter.folder, prompt, theirs)[place]
                different.append({"adapter": key, "place": place, "margin of the likeliest token": margin})
    assert not different
    assert len({tuple(answer) for answer in found}) > N_PROMPTS // 2
