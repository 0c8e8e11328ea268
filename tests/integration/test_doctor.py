"""The doctor finds nothing in a healthy stack, and in each sabotaged one exactly the checks fail that should."""

import contextlib
import dataclasses
import io
import json
import tempfile

import pytest
import torch

from lora_tune.cli.app import run as run_command
from lora_tune.data.tokens import IGNORE_INDEX
from lora_tune.doctor import run, stack
from lora_tune.doctor.adapter_checks import nf4_levels
from lora_tune.doctor.mask_checks import base_template
from lora_tune.doctor.sample import TEMPLATE, make_sample, tiny_tokenizer
from lora_tune.model.dense import quiet
from lora_tune.model.load import Device
from tests.tiny import TEMPLATES, write_recipe

NAMES = [check.name for check in run.CHECKS]


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("doctor"), Device("cpu", computes_bf16=False))


def call(*arguments):
    """Run one command in this process and return (exit code, what it printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_command(list(arguments))
    return code, printed.getvalue()


@pytest.fixture(scope="session")
def healthy(tiny_bases, tmp_path_factory):
    """Return exit code, JSON and what is left in the folder of temporary files."""
    scratch, base = tmp_path_factory.mktemp("scratch"), tiny_bases()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        code, printed = call("doctor", str(base), "--json")
    return code, json.loads(printed), list(scratch.iterdir())


def failures(sample, names):
    """Return the findings that failed, by name, of these checks."""
    with quiet():
        findings = run.run_checks(
            sample, [check for check in run.CHECKS if check.name in names], lambda label, share: None
        )
    assert [finding.name for finding in findings] == [name for name in NAMES if name in names]
    return {finding.name: finding for finding in findings if finding.verdict == "failed"}


# A healthy stack


def test_a_healthy_stack_passes_every_check_within_its_bound_and_leaves_nothing_behind(healthy):
    code, found, left = healthy
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert code == 0
    assert found["ok"]
    assert left == []
    assert found["seconds"] < 90
    for name in (*NAMES, "versions", "imports", "base's files", "base's chat template"):
        assert by_name[name]["verdict"] == "ok", by_name[name]
        assert by_name[name]["hint"] == ""
    measured = [finding for finding in found["findings"] if finding["measured"] is not None]
    assert len(measured) >= len(NAMES)
    assert all(finding["measured"] <= finding["bound"] for finding in measured)
    assert {"device", "bf16", "flash attention", "memory", "disk"} <= by_name.keys()


def test_the_levels_of_nf4_are_those_that_the_paper_prints():
    printed = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
               0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert nf4_levels().tolist() == pytest.approx(printed, abs=1e-6)


# Sabotaged ones: each replaces something of an upstream library or of ours


def loss_without_the_number_of_tokens(patch):
    import transformers

    patch.setattr(transformers.Trainer, "_get_num_items_in_batch", lambda self, batches, device: None)


def loss_divided_by_the_accumulation(patch):
    from lora_tune.training.trainer import Trainer

    honest = Trainer.compute_loss
    patch.setattr(Trainer, "compute_loss", lambda self, *arguments, **keywords:
                  honest(self, *arguments, **keywords) / self.args.gradient_accumulation_steps)  # fmt: skip


def packed_rows_that_see_each_other(patch):
    import transformers.masking_utils

    patch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda *arguments, **keywords: None)


def packed_rows_that_see_each_other_and_a_blind_proof(patch):
    packed_rows_that_see_each_other(patch)
    patch.setattr("lora_tune.training.trainer.check_packing", lambda *arguments, **keywords: None)


def labels_shifted_by_one(patch):
    from lora_tune.data import dataset

    honest = dataset.loss_labels
    patch.setattr(dataset, "loss_labels", lambda ids, trained: honest(ids, [*trained[1:], False]))


def the_user_s_words_trained(patch):
    from lora_tune.data.messages import Conversation

    patch.setattr(Conversation, "trained_messages", lambda self, train_on:
                  [i for i, message in enumerate(self.messages) if message.role == "user"])  # fmt: skip


def end_of_turn_not_trained(patch):
    from lora_tune.data import dataset

    honest = dataset.loss_labels
    patch.setattr(dataset, "loss_labels", lambda ids, trained:
                  [IGNORE_INDEX if token == 2 else token for token in honest(ids, trained)])  # fmt: skip


def padding_trained(patch):
    from lora_tune.training import trainer

    honest = trainer.make_trainer

    def make(*arguments, **keywords):
        made = honest(*arguments, **keywords)
        collate = made.data_collator

        def careless(rows):
            batch = collate(rows)
            return {**batch, "labels": torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])}

        made.data_collator = careless
        if made.feed.batching != "packed":
            made.feed = dataclasses.replace(made.feed, collate=careless)
        return made

    patch.setattr(trainer, "make_trainer", make)
    patch.setattr("lora_tune.doctor.sample.make_trainer", make)


def attention_mask_ignored(patch):
    from transformers.models.llama import modeling_llama

    honest = modeling_llama.create_causal_mask
    patch.setattr(modeling_llama, "create_causal_mask", lambda *arguments, **keywords:
                  honest(*arguments, **{**keywords, "attention_mask": None}))  # fmt: skip


def dropout_that_never_ends(patch):
    patch.setattr(torch.nn.Dropout, "forward", lambda self, x: torch.nn.functional.dropout(x, self.p, training=True))


def checkpointing_that_drops_gradients(patch):
    import transformers.modeling_utils

    def detached(function, hidden, *arguments, **keywords):
        return function(hidden.detach(), *arguments)

    patch.setattr(transformers.modeling_utils, "checkpoint", detached)


def checkpointing_that_keeps_everything(patch):
    import transformers.modeling_utils

    patch.setattr(
        transformers.modeling_utils, "checkpoint", lambda function, *arguments, **keywords: function(*arguments)
    )


def optimizer_step_skipped(patch):
    patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def optimizer_that_climbs(patch):
    honest = torch.optim.AdamW.step

    def climb(self, closure=None):
        for group in self.param_groups:
            group["lr"] = -group["lr"]
        honest(self, closure)
        for group in self.param_groups:
            group["lr"] = -group["lr"]

    patch.setattr(torch.optim.AdamW, "step", climb)


def a_weight_of_the_base_left_trainable(patch):
    from lora_tune.doctor import sample

    honest = sample.apply_lora

    def apply(*arguments, **keywords):
        model = honest(*arguments, **keywords)
        next(weight for name, weight in model.named_parameters() if "norm" in name or "ln_" in name).requires_grad_()
        return model

    patch.setattr(sample, "apply_lora", apply)


def resume_that_forgets_the_optimizer(patch):
    from lora_tune.training.keeper import Keeper

    patch.setattr(Keeper, "load_optimizer", lambda self: None)


def resume_that_forgets_the_random_state(patch):
    from lora_tune.training import snapshot

    patch.setattr(snapshot, "restore_random", lambda states: None)


def scaling_of_another_variant(patch):
    import peft

    honest = peft.LoraConfig
    patch.setattr(peft, "LoraConfig", lambda **settings: honest(**{**settings, "use_rslora": True}))


def scaling_doubled_by_loading(patch):
    import peft

    honest = peft.set_peft_model_state_dict

    def load(model, state, adapter_name="default", **keywords):
        found = honest(model, state, adapter_name=adapter_name, **keywords)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling[adapter_name] *= 2
        return found

    patch.setattr(peft, "set_peft_model_state_dict", load)


def scaling_doubled_by_loading_and_a_blind_proof(patch):
    scaling_doubled_by_loading(patch)
    patch.setattr("lora_tune.adapter.export.prove_reload", lambda *arguments, **keywords: 0.0)


def weights_not_loaded_and_a_blind_proof(patch):
    import peft

    honest = peft.set_peft_model_state_dict
    patch.setattr(peft, "set_peft_model_state_dict", lambda model, state, **keywords:
                  honest(model, {name: torch.zeros_like(weight) for name, weight in state.items()}, **keywords))  # fmt: skip
    patch.setattr("lora_tune.adapter.export.prove_reload", lambda *arguments, **keywords: 0.0)


def adapter_that_cannot_be_switched_off(patch):
    import peft

    patch.setattr(peft.PeftModel, "disable_adapter", lambda self: contextlib.nullcontext())


def merge_without_scaling(patch):
    from lora_tune.adapter import merge

    honest = merge.changed_weight
    patch.setattr(merge, "changed_weight", lambda weight, changes, **keywords:
                  honest(weight, [dataclasses.replace(change, scaling=1.0) for change in changes], **keywords))  # fmt: skip


def fp4_in_place_of_nf4(patch):
    from transformers import BitsAndBytesConfig

    patch.setattr("lora_tune.model.load.quantization_plan", lambda quantization, dtype: None if quantization == "none" else
                  BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=dtype))  # fmt: skip


def nf4_that_quantizes_nothing(patch):
    patch.setattr("lora_tune.model.load.quantization_plan", lambda quantization, dtype: None)


SABOTAGES = {
    loss_without_the_number_of_tokens: {"accumulation"},
    loss_divided_by_the_accumulation: {"accumulation"},
    packed_rows_that_see_each_other: {"packing"},
    packed_rows_that_see_each_other_and_a_blind_proof: {"packing"},
    labels_shifted_by_one: {"loss mask", "gradients", "held-out loss"},
    the_user_s_words_trained: {"loss mask"},
    end_of_turn_not_trained: {"loss mask", "gradients", "held-out loss"},
    padding_trained: {"padding", "gradients", "accumulation", "packing", "held-out loss"},
    attention_mask_ignored: {"batched answers"},
    dropout_that_never_ends: {"held-out loss"},
    checkpointing_that_drops_gradients: {"checkpointing"},
    checkpointing_that_keeps_everything: {"checkpointing"},
    optimizer_step_skipped: {"optimizer step"},
    optimizer_that_climbs: {"optimizer step"},
    a_weight_of_the_base_left_trainable: {"optimizer step", "gradients", "saved = loaded"},
    resume_that_forgets_the_optimizer: {"resume"},
    resume_that_forgets_the_random_state: {"resume"},
    scaling_of_another_variant: {"gradients", "held-out loss", "batched answers", "adapter on", "saved = loaded"},
    scaling_doubled_by_loading: {"saved = loaded"},
    scaling_doubled_by_loading_and_a_blind_proof: {"saved = loaded", "merged = adapter"},
    weights_not_loaded_and_a_blind_proof: {"saved = loaded", "merged = adapter"},
    adapter_that_cannot_be_switched_off: {"adapter off"},
    merge_without_scaling: {"merged = adapter"},
    fp4_in_place_of_nf4: {"nf4"},
    nf4_that_quantizes_nothing: {"nf4"},
}
"""Sabotage → the checks that must fail, and no other."""

QUICK = {
    "loss mask",
    "padding",
    "held-out loss",
    "batched answers",
    "adapter on",
    "adapter off",
    "nf4",
    "optimizer step",
}


def named(sabotage):
    return sabotage.__name__


@pytest.mark.parametrize("sabotage", [each for each in SABOTAGES if SABOTAGES[each] & QUICK], ids=named)
def test_a_sabotaged_stack_fails_a_check_that_is_made_for_it(sample, monkeypatch, sabotage):
    sabotage(monkeypatch)
    name = min(SABOTAGES[sabotage] & QUICK)
    failed = failures(sample, {name})
    assert failed.keys() == {name}
    assert failed[name].hint


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=named)
def test_a_sabotaged_stack_fails_exactly_the_checks_that_should(sample, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert failures(sample, NAMES).keys() == SABOTAGES[sabotage]


# Templates and versions


def test_a_template_without_an_end_of_turn_fails():
    endless = TEMPLATE.replace("<|im_end|>", "")
    found = base_template(tiny_tokenizer(endless))
    assert found.verdict == "failed"
    assert found.hint


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion", "all"])
def test_templates_of_every_kind_pass(name, train_on):
    found = base_template(tiny_tokenizer(TEMPLATES[name]), train_on=train_on)
    assert found.verdict == "ok", found


def test_a_version_outside_its_range_fails_and_the_hint_installs_the_tested_one(monkeypatch):
    assert stack.versions().verdict == "ok"
    true = stack.version
    monkeypatch.setattr(stack, "version", lambda name: "99.0" if name == "transformers" else true(name))
    found = stack.versions()
    assert found.verdict == "failed"
    assert found.detail.startswith("transformers 99.0 is not ")
    assert found.hint.startswith("pip install 'transformers")
    assert "torch" not in found.hint


def test_a_library_that_is_not_there_fails_and_one_of_an_extra_does_not():
    found = stack.versions(["no-such-library>=1", "numpy>=1", 'no-such-extra>=1; extra == "serve"'])
    assert (found.verdict, found.detail) == ("failed", "no-such-library is not installed")


def test_little_disk_is_a_warning_and_no_failure(monkeypatch):
    monkeypatch.setattr(stack, "MIN_DISK_GIB", 1e9)
    found = stack.disk()
    assert found.verdict == "warning"
    assert found.hint


def test_free_memory_is_the_container_s_where_that_is_less(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n")
    free = {}
    for limit in ("max", str(6 * 2**30), str(99 * 2**30)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
        free[limit] = stack._free_memory_gib(meminfo, tmp_path)
    assert list(free.values()) == [16.0, 4.0, 16.0]
    assert stack._free_memory_gib(tmp_path / "none", tmp_path) is None


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(stack, "_has_nvidia", lambda: True)
    assert stack.device().verdict == "warning"


# The command


def only(monkeypatch, *names):
    monkeypatch.setattr(run, "CHECKS", tuple(check for check in run.CHECKS if check.name in names))


def test_a_failed_check_is_seen_in_the_exit_code_the_json_and_the_table(monkeypatch):
    only(monkeypatch, "nf4", "adapter off")
    fp4_in_place_of_nf4(monkeypatch)
    code, printed = call("doctor", "--json")
    found = json.loads(printed)
    assert (code, found["ok"], found["counts"]["failed"]) == (65, False, 1)
    code, printed = call("doctor")
    assert code == 65
    (line,) = [line for line in printed.splitlines() if "FAILED" in line]
    assert line.startswith("nf4 ")
    assert "hint: set base.quantization: none" in printed
    assert "not healthy" in printed.splitlines()[-1]


def test_what_a_check_raises_is_a_finding_and_the_next_check_is_still_made(monkeypatch, sample):
    import bitsandbytes

    def broken(*arguments, **keywords):
        raise RuntimeError("symbol not found")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    failed = failures(sample, {"nf4", "adapter off"})
    assert failed.keys() == {"nf4"}
    assert failed["nf4"].detail.startswith("RuntimeError: ")


def test_the_base_and_the_template_of_a_recipe_are_looked_at(tmp_path, tiny_bases, monkeypatch):
    only(monkeypatch)
    template = tmp_path / "endless.jinja"
    template.write_text(TEMPLATE.replace("<|im_end|>", ""), encoding="utf-8")
    for extra, code in (({}, 0), ({"chat_template": str(template)}, 65)):
        recipe = write_recipe(tmp_path, tiny_bases(), data=extra)
        assert call("doctor", str(recipe), "--json")[0] == code


def test_a_base_that_is_not_on_this_machine_is_not_fetched(monkeypatch):
    only(monkeypatch)
    code, printed = call("doctor", "builtin:smollm2-135m", "--json")
    skipped = [finding["name"] for finding in json.loads(printed)["findings"] if finding["verdict"] == "skipped"]
    assert (code, skipped) == (0, ["base's files", "base's chat template"])


def test_a_damaged_base_fails(tmp_path, tiny_bases, monkeypatch):
    import shutil

    only(monkeypatch)
    base = tmp_path / "base"
    shutil.copytree(tiny_bases(), base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, printed = call("doctor", str(base), "--json")
    (found,) = [finding for finding in json.loads(printed)["findings"] if finding["name"] == "base's files"]
    assert (code, found["verdict"]) == (65, "failed")
