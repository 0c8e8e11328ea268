"""A base and an adapter in memory, checked against the adapter's passport before anything is answered."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.manifest import AdapterManifest
from lora_tune.errors import AdapterError, AdapterMismatchError, MissingInputError, UsageError
from lora_tune.model.dense import BaseFiles, quiet, ready_base
from lora_tune.model.fingerprint import (
    fingerprint,
    read_config,
    read_shapes,
    recall_base,
    tokenizer_digest,
    tokenizer_files,
)
from lora_tune.model.load import Dtype, detect_device, load_base, load_tokenizer, place
from lora_tune.model.resolve import Progress, locate
from lora_tune.recipe.schema import BaseSection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
CONV1D_FAMILIES = ("gpt2", "openai-gpt")
"""Model types whose layers hold their weights as [in, out]; see `is_turned`."""
HEADS = ("lm_head", "embed_out")
"""What transformers' models call their output head; it is a Linear in every family."""
_NUMBERED = re.compile(r"(?:^|\.)([^.]+\.\d+\..+)$")
"""What stands in a name from its first numbered part on, `layers.0.…`: the same in a file and in the model."""


@dataclass(frozen=True)
class LiveModel:
    """A model to talk to or measure."""

    model: Any
    tokenizer: Any
    base: BaseSection
    base_files: BaseFiles
    adapter: AdapterFiles | None
    """None for the base alone."""


def open_live(
    adapter: AdapterFiles,
    progress: Progress,
    *,
    base_name: str | None = None,
    quantization: Literal["none", "nf4", "int8"] | None = None,
    dtype: Dtype | None = None,
) -> LiveModel:
    """Return the adapter on its base.

    Nothing that the adapter names is downloaded; a base that the user names is.

    Args:
        adapter: checked by the door.
        progress: told what is being done.
        base_name: another place of the same base (a folder, say); None takes the passport's.
        quantization: how to hold the base in memory; None holds it as when the adapter was trained.
        dtype: what to compute in; None takes what the recipe asked for.

    Raises:
        AdapterMismatchError: base, tokenizer or template are not those it was trained with (exit 77).
        AdapterError: its passport asks for what this base cannot do (exit 77).
        MissingInputError: the base is not there (exit 66).
    """
    section = base_section(adapter, base_name)
    if quantization is not None:
        section = section.model_copy(update={"quantization": quantization})
    if dtype is not None:
        section = section.model_copy(update={"dtype": dtype})
    files = ready_base(section, progress)
    check_belongs(adapter, files)
    tokenizer = load_tokenizer(files, template_text=own_template(adapter))
    if own_template(adapter) is not None or not _is_builtin(section):
        tokenizer = fence_template(tokenizer)
    with quiet():
        base = load_base(files, section)
        _check_probe_ids(adapter, base)
        model = attach_adapter(
            base,
            adapter,
            name="default",
            adapter_dtype=place(detect_device(), section).adapter_dtype,
        )
    return LiveModel(model, tokenizer, section, files, adapter)


def add_adapters(live: LiveModel, others: Sequence[AdapterFiles]) -> list[str]:
    """Put more adapters beside the first one, and return the names of all in the model, in this order."""
    names = ["default"]
    for number, files in enumerate(others, start=1):
        names.append(f"adapter{number}")
        adapter_dtype = place(detect_device(), live.base).adapter_dtype
        attach_adapter(live.model, files, name=names[-1], adapter_dtype=adapter_dtype)
    return names


def activate_sum(live: LiveModel, weights: Mapping[str, float]) -> None:
    """Make these adapters the active ones, each times its weight, which is asked once: peft adds their outputs up."""
    live.model.base_model.set_adapter(list(weights))
    for module in live.model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # peft's layers; attention layers have a plain number of that name
            for name in weights.keys() & scaling.keys():
                scaling[name] *= weights[name]


def open_base(section: BaseSection, progress: Progress, *, template_text: str | None = None) -> LiveModel:
    """Return the base alone, with its own chat template or another one's text.

    A template that comes with a base which is not built in is a stranger's program, and is fenced.
    """
    files = ready_base(section, progress)
    tokenizer = load_tokenizer(files, template_text=template_text)
    if template_text is None and not _is_builtin(section):
        tokenizer = fence_template(tokenizer)
    return LiveModel(load_base(files, section), tokenizer, section, files, None)


def base_section(adapter: AdapterFiles, base_name: str | None = None) -> BaseSection:
    """Return which base the adapter is put on, and how it was held in memory while training.

    The user's `base_name` may be anything. What the adapter names is taken only when it is a built-in or on this machine
    already, and never as a path: an adapter decides neither what is downloaded nor which file is opened.

    Raises:
        MissingInputError: the adapter does not name its base, or one that is not on this machine (exit 66).
    """
    manifest = adapter.manifest
    facts = manifest.base if manifest else None
    if base_name is not None:
        name, revision = _given_base(base_name), None
        if facts is not None and name == facts.name:
            revision = facts.revision
    elif facts is not None and facts.revision is None and not facts.name.startswith("builtin:"):
        # A passport names a local base by its last part only; this machine may still know where it stands.
        known = recall_base(facts.weights)
        if known is None:
            raise MissingInputError(
                f"{adapter.folder} was trained on the local base {facts.name!r}, which is not known on this machine",
                hint="name its folder or file with --base",
            )
        name, revision = known, None
    else:
        name, revision = (facts.name, facts.revision) if facts else (adapter.base_name, None)
        _check_present(adapter, name, revision)
    return BaseSection(
        name=name,
        revision=revision,
        quantization=facts.quantization if facts else "none",
        # What the recipe asked for, not what `auto` chose on the machine that trained it.
        dtype=manifest.recipe["base"]["dtype"] if manifest else "auto",
    )


def _is_builtin(section: BaseSection) -> bool:
    return section.name.startswith("builtin:")


def _given_base(name: str) -> str:
    """Return the base that the user named, as a recipe takes it: a path is absolute."""
    if not 1 <= len(name) <= 512:
        raise UsageError(f"--base has {len(name)} characters; expected 1 to 512", hint="name a folder, file or hub id")
    path = Path(name)
    is_path = name.startswith(("/", ".")) or path.is_dir() or (name.endswith(".gguf") and path.is_file())
    return str(path.resolve()) if is_path else name


def _check_present(adapter: AdapterFiles, name: str, revision: str | None) -> None:
    if not name:
        raise MissingInputError(
            f"{adapter.folder} does not say which base it was trained on", hint="name it with --base"
        )
    if name.startswith("builtin:"):
        return
    if not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise MissingInputError(
            f"{adapter.folder} names its base as {name!r}; paths that an adapter names are not opened",
            hint="name the base with --base",
        )
    if not locate(BaseSection(name=name, revision=revision)).present:
        raise MissingInputError(
            f"{adapter.folder} was trained on {name}{f' at {revision}' if revision else ''}, which is not on this machine",
            hint=f"run again with --base {name} to download it",
        )


def check_belongs(adapter: AdapterFiles, files: BaseFiles) -> None:
    """Check base, tokenizer and template against the passport; without one, the layers' widths only.

    Raises:
        AdapterMismatchError: something differs; the message names the field (exit 77).
    """
    conv1d = read_config(files.folder).get("model_type") in CONV1D_FAMILIES
    check_fits(adapter, read_shapes(files.folder), conv1d=conv1d)
    manifest: AdapterManifest | None = adapter.manifest
    if manifest is None:
        return
    found = fingerprint(files.folder).as_dict()
    tokenizer = load_tokenizer(files, template_text=own_template(adapter))
    found |= tokenizer_digest(tokenizer_files(files.folder), chat_template=tokenizer.chat_template)
    said = {
        "config": manifest.base.config,
        "tensors": manifest.base.tensors,
        "weights": manifest.base.weights,
        "tokenizer": manifest.tokenizer.tokenizer,
        "chat_template": manifest.tokenizer.chat_template,
    }
    different = [field for field in said if said[field] != found[field]]
    if different:
        field = different[0]
        raise AdapterMismatchError(
            f"{adapter.folder} was trained on {manifest.base.name}, but the one at hand differs in {', '.join(different)}: "
            f"{field} is {found[field][:12]}…, the passport says {said[field][:12]}…",
            hint=f"use {manifest.base.name}{' at revision ' + manifest.base.revision if manifest.base.revision else ''} "
            "as it was, or train the adapter anew on this base",
            where=f"base.{field}" if field in ("config", "tensors", "weights") else f"tokenizer.{field}",
        )


def check_fits(files: AdapterFiles, base_shapes: Mapping[str, tuple[int, ...]], *, conv1d: bool) -> None:
    """Check that every adapted layer exists in the base with fitting widths.

    Args:
        files: the adapter.
        base_shapes: tensor name → shape of the base, from its safetensors headers.
        conv1d: the base's layers, but for its head, hold their weights as [in, out] (GPT-2's Conv1D), not as [out, in].

    Raises:
        AdapterMismatchError: a layer is missing or of other widths (exit 77).
    """
    widths = {name.removesuffix(".weight"): shape for name, shape in base_shapes.items() if name.endswith(".weight")}
    tails: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in widths.items():
        tails.setdefault(tail_of(name), []).append(shape)
    hint = f"load it on {files.base_name or 'the base it was trained on'}"
    for module in files.shape.modules:
        # The parts before the layer's number differ between a file and the model, and several towers share the rest.
        found = [widths[module]] if module in widths else tails.get(tail_of(module), [])
        rows_in = files.tensors[f"base_model.model.{module}.lora_A.weight"].shape[1]
        rows_out = files.tensors[f"base_model.model.{module}.lora_B.weight"].shape[0]
        if not found:
            raise AdapterMismatchError(f"the adapter changes {module}, but the base has no such layer", hint=hint)
        turned = is_turned(module, conv1d=conv1d)
        if ((rows_in, rows_out) if turned else (rows_out, rows_in)) not in found:
            raise AdapterMismatchError(
                f"{module} is {rows_in} → {rows_out} in the adapter, but its weight in the base is "
                f"{' or '.join(map(str, found[:3]))}, {'[in, out]' if turned else '[out, in]'}",
                hint=hint,
            )


def is_turned(module: str, *, conv1d: bool) -> bool:
    """Return whether the layer's weight is stored as [in, out]: in a family of Conv1D layers every one but the head's."""
    return conv1d and module.rsplit(".", 1)[-1] not in HEADS


def tail_of(name: str) -> str:
    """Return the part of a layer's name that a file and the model share."""
    match = _NUMBERED.search(name)
    # Without a number, only the model's own prefix is left out (`head.x` for `model.head.x`).
    return match[1] if match else name.removeprefix("model.")


def own_template(adapter: AdapterFiles) -> str | None:
    """Return the template's text that the passport carries; it is never the name of a file."""
    return adapter.manifest.tokenizer.own_template if adapter.manifest else None


def _check_probe_ids(adapter: AdapterFiles, base: Any) -> None:
    if adapter.manifest is None:
        return
    vocabulary = min(rows.weight.shape[0] for rows in (base.get_input_embeddings(), base.get_output_embeddings()))
    for number, probe in enumerate(adapter.manifest.probes):
        highest = max(*probe.input_ids, *(max(row) for row in probe.top_ids))
        if highest >= vocabulary:
            raise AdapterError(
                f"{adapter.folder}: probe {number} holds token {highest}, but the base knows {vocabulary} tokens",
                hint="the passport was changed; fetch the adapter again",
                where=f"probes.{number}",
            )
