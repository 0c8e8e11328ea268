"""Dtype and device policy, as a table: what runs here, and what only a GPU runs."""

import pytest

from lora_tune.model.load import Device, Placement, place
from lora_tune.recipe.schema import BaseSection
from lora_tune.training.trainer import loss_head

PLAIN_CPU, FAST_CPU = Device("cpu", computes_bf16=False), Device("cpu", computes_bf16=True)
AMPERE, TURING, MAC = (
    Device("cuda", computes_bf16=True),
    Device("cuda", computes_bf16=False),
    Device("mps", computes_bf16=False),
)


@pytest.mark.parametrize(("device", "quantization", "dtype", "expected"), [
    (PLAIN_CPU, "none", "auto", Placement("fp32", "fp32", autocast_bf16=False, device_map=None)),
    (PLAIN_CPU, "nf4", "auto", Placement("fp32", "fp32", autocast_bf16=False, device_map=None)),
    (PLAIN_CPU, "none", "bf16", Placement("bf16", "fp32", autocast_bf16=True, device_map=None)),
    (FAST_CPU, "none", "auto", Placement("bf16", "fp32", autocast_bf16=True, device_map=None)),
    (FAST_CPU, "nf4", "auto", Placement("bf16", "bf16", autocast_bf16=True, device_map=None)),
    (FAST_CPU, "none", "fp32", Placement("fp32", "fp32", autocast_bf16=False, device_map=None)),
    (AMPERE, "none", "auto", Placement("bf16", "fp32", autocast_bf16=True, device_map="cuda:0")),
    (AMPERE, "nf4", "auto", Placement("bf16", "bf16", autocast_bf16=True, device_map="cuda:0")),
    (AMPERE, "int8", "auto", Placement("bf16", "bf16", autocast_bf16=True, device_map="cuda:0")),
    (TURING, "nf4", "auto", Placement("fp32", "fp32", autocast_bf16=False, device_map="cuda:0")),
    (MAC, "none", "auto", Placement("fp32", "fp32", autocast_bf16=False, device_map="mps")),
])  # fmt: skip
def test_the_table(device, quantization, dtype, expected):
    assert place(device, BaseSection(name="x/y", quantization=quantization, dtype=dtype)) == expected


def test_who_computes_the_loss():
    class Takes:
        def forward(self, input_ids, logits_to_keep=0):
            """Like most causal language models."""

    class DoesNot:
        def forward(self, input_ids):
            """Like a few."""

    assert loss_head(PLAIN_CPU, Takes()) == "supervised"
    assert loss_head(PLAIN_CPU, DoesNot()) == "trl"
    assert loss_head(AMPERE, Takes()) == "trl"
