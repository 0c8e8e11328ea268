"""The trained adapter → a folder of PEFT's own layout with passport and model card, proved equal before it appears."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_tune.adapter.apply import attach_adapter, trained_weights
from lora_tune.adapter.card import model_card
from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, open_adapter
from lora_tune.adapter.live import check_belongs
from lora_tune.adapter.manifest import (
    FILE_NAME,
    AdapterManifest,
    BaseFacts,
    DataFacts,
    LoraFacts,
    Probe,
    TokenizerFacts,
    dump_manifest,
)
from lora_tune.adapter.probes import probe_logits, record_probes
from lora_tune.errors import TrainingError
from lora_tune.model.dense import BaseFiles
from lora_tune.model.fingerprint import (
    canonical_digest,
    file_digest,
    fingerprint,
    tokenizer_digest,
    tokenizer_files,
)
from lora_tune.model.load import Dtype
from lora_tune.recipe.schema import BaseSection, LoraSection
from lora_tune.staging import staged_folder, write_file

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from: all that its passport says beside its weights and probes."""

    name: str
    base: BaseSection
    base_files: BaseFiles
    dtype: Dtype
    adapter_dtype: Dtype
    lora: LoraSection
    data: DataFacts
    own_template: str | None
    """The chat template's text when it is not the base's own."""
    recipe: dict[str, Any]
    """Resolved and portable."""
    figures: Mapping[str, float]


def export_adapter(model: Any, tokenizer: Any, folder: Path, origin: Provenance) -> AdapterFiles:
    """Write the live adapter to `folder` and return it as the door sees it.

    It is written beside `folder`, loaded back through the door next to the live model, compared on the probes, and only
    then renamed: `folder` never holds an adapter that is not proved equal to what was trained.

    Raises:
        TrainingError: the reloaded adapter answers differently, or its weights are not finite (exit 65).
        CannotCreateError, CannotWriteError: the folder exists, or the disk is full (exit 73, 74).
    """
    with staged_folder(folder) as stage:
        model.eval()
        _refuse_non_finite(model)
        _write_peft_files(model, stage, base_name=_public_name(origin.base, origin.base_files))
        probes = record_probes(model, tokenizer)
        manifest = _manifest(model, tokenizer, stage, origin, probes)
        (stage / FILE_NAME).write_text(dump_manifest(manifest), encoding="utf-8")
        (stage / "README.md").write_text(model_card(manifest), encoding="utf-8")
        # What could never be opened again is not exported.
        check_belongs(open_adapter(stage), origin.base_files)
        prove_reload(model, open_adapter(stage), probes, adapter_dtype=origin.adapter_dtype)
    return open_adapter(folder)


def add_figures(folder: Path, figures: Mapping[str, float]) -> AdapterFiles:
    """Write what was measured after the export into passport and card, each in one step; weights and config stay."""
    files = open_adapter(folder)
    assert files.manifest is not None
    manifest = files.manifest.model_copy(update={"figures": dict(files.manifest.figures) | dict(figures)})
    write_file(folder / FILE_NAME, dump_manifest(manifest))
    write_file(folder / "README.md", model_card(manifest))
    return open_adapter(folder)


def prove_reload(model: Any, files: AdapterFiles, probes: tuple[Probe, ...], *, adapter_dtype: Dtype) -> float:
    """Load the files beside the live adapter and return the largest difference of a logit, which must be 0.

    Raises:
        TrainingError: it is not 0.
    """
    live = [probe_logits(model, probe.input_ids, probe.answer_start) for probe in probes]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attach_adapter(model, files, name="reloaded", adapter_dtype=adapter_dtype)
    try:
        again = [probe_logits(model, probe.input_ids, probe.answer_start) for probe in probes]
    finally:
        model.delete_adapter("reloaded")
        model.set_adapter("default")
        for parameter in trainable:
            parameter.requires_grad_(requires_grad=True)
    delta = max(float((a - b).abs().max()) for a, b in zip(live, again, strict=True))
    if delta != 0.0:
        raise TrainingError(
            f"the exported adapter answers differently from the trained one: a logit differs by {delta:.3g}; nothing was exported",
            hint="this should not happen: please report it, with the recipe",
        )
    return delta


def library_versions() -> dict[str, str]:
    """Return the versions of Python, this tool and the libraries that train."""
    return {"python": platform.python_version(), "lora_tune": version("lora-tune")} | {
        name: version(name) for name in LIBRARIES
    }


def _refuse_non_finite(model: Any) -> None:
    import torch

    for name, weight in trained_weights(model).items():
        if not bool(torch.isfinite(weight).all()):
            raise TrainingError(
                f"{name} holds NaN or infinity after training; nothing was exported", hint="lower train.learning_rate"
            )


def _write_peft_files(model: Any, stage: Path, *, base_name: str) -> None:
    # save_embedding_layers=False: the default asks a hub at every save, and may add the base's embeddings.
    model.save_pretrained(stage, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"])
    path = stage / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes targets in hash order, and the base as a path on this machine.
    config |= {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": base_name}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _manifest(
    model: Any, tokenizer: Any, stage: Path, origin: Provenance, probes: tuple[Probe, ...]
) -> AdapterManifest:
    written = open_adapter(stage)
    identity = fingerprint(origin.base_files.folder)
    digests = tokenizer_digest(tokenizer_files(origin.base_files.folder), chat_template=tokenizer.chat_template)
    return AdapterManifest(
        name=origin.name,
        base=BaseFacts(
            name=_public_name(origin.base, origin.base_files),
            revision=origin.base_files.revision,
            quantization=origin.base.quantization,
            dtype=origin.dtype,
            **identity.as_dict(),
        ),
        tokenizer=TokenizerFacts(**digests, own_template=origin.own_template),
        lora=LoraFacts(
            rank=origin.lora.rank,
            alpha=origin.lora.alpha,
            scaling=origin.lora.scaling,
            dropout=origin.lora.dropout,
            variant=origin.lora.variant,
            targets=written.shape.targets,
            n_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        ),
        data=origin.data,
        recipe=origin.recipe,
        recipe_digest=canonical_digest(origin.recipe),
        weights_digest=file_digest(stage / WEIGHTS),
        config_digest=file_digest(stage / CONFIG),
        versions=library_versions(),
        figures=dict(origin.figures),
        probes=probes,
    )


def _public_name(base: BaseSection, files: BaseFiles) -> str:
    """What others may know the base by: a hub id or built-in as it is, a local path by its last part."""
    return files.name if files.revision or base.name.startswith("builtin:") else Path(files.name).name
