"""A base and an adapter in memory, checked against the adapter's passport before anything is answered."""

from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.door import AdapterFiles, check_fits
from lora_tune.adapter.manifest import AdapterManifest
from lora_tune.errors import AdapterMismatchError, MissingInputError
from lora_tune.model.dense import BaseFiles, quiet, ready_base
from lora_tune.model.fingerprint import fingerprint, read_shapes, recall_base, tokenizer_digest, tokenizer_files
from lora_tune.model.load import detect_device, load_base, load_tokenizer, place
from lora_tune.model.resolve import Progress
from lora_tune.recipe.schema import BaseSection


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
) -> LiveModel:
    """Return the adapter on its base.

    Args:
        adapter: checked by the door.
        progress: told what is being done.
        base_name: another place of the same base (a folder, say); None takes the passport's.
        quantization: how to hold the base in memory; None holds it as when the adapter was trained.

    Raises:
        AdapterMismatchError: base, tokenizer or template are not those it was trained with (exit 77).
        MissingInputError: the base is not there (exit 66).
    """
    section = base_section(adapter, base_name)
    if quantization is not None:
        section = section.model_copy(update={"quantization": quantization})
    files = ready_base(section, progress)
    check_belongs(adapter, files)
    template = adapter.manifest.tokenizer.own_template if adapter.manifest else None
    tokenizer = load_tokenizer(files, template)
    with quiet():
        model = attach_adapter(
            load_base(files, section),
            adapter,
            name="default",
            adapter_dtype=place(detect_device(), section).adapter_dtype,
        )
    return LiveModel(model, tokenizer, section, files, adapter)


def open_base(section: BaseSection, progress: Progress, *, chat_template: str | None = None) -> LiveModel:
    """Return the base alone."""
    files = ready_base(section, progress)
    return LiveModel(load_base(files, section), load_tokenizer(files, chat_template), section, files, None)


def base_section(adapter: AdapterFiles, base_name: str | None = None) -> BaseSection:
    """Return which base the adapter wants, and how it was held in memory while training.

    Raises:
        MissingInputError: the adapter does not say where its base is, or only named a folder that is not here (exit 66).
    """
    manifest = adapter.manifest
    facts = manifest.base if manifest else None
    hub = facts is not None and facts.revision is not None and base_name is None
    name = base_name or (facts.name if facts else adapter.base_name)
    if facts and base_name is None and not hub and not name.startswith("builtin:"):
        # A passport names a local base by its last part only; this machine may still know where it stands.
        known = recall_base(facts.weights)
        if known is None:
            raise MissingInputError(
                f"{adapter.folder} was trained on the local base {name!r}, which is not known on this machine",
                hint="name its folder or file with --base",
            )
        name = known
    if not name:
        raise MissingInputError(
            f"{adapter.folder} does not say which base it was trained on", hint="name it with --base"
        )
    return BaseSection(
        name=name,
        revision=facts.revision if facts and hub else None,
        quantization=facts.quantization if facts else "none",
        # What the recipe asked for, not what `auto` chose on the machine that trained it.
        dtype=manifest.recipe["base"]["dtype"] if manifest else "auto",
    )


def check_belongs(adapter: AdapterFiles, files: BaseFiles) -> None:
    """Check base, tokenizer and template against the passport; without one, the layers' widths only.

    Raises:
        AdapterMismatchError: something differs; the message names the field (exit 77).
    """
    check_fits(adapter, read_shapes(files.folder))
    manifest: AdapterManifest | None = adapter.manifest
    if manifest is None:
        return
    found = fingerprint(files.folder).as_dict()
    template = manifest.tokenizer.own_template
    tokenizer = load_tokenizer(files, template)
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
            f"{adapter.folder.name} was trained on {manifest.base.name}, but the one at hand differs in {', '.join(different)}: "
            f"{field} is {found[field][:12]}…, the passport says {said[field][:12]}…",
            hint=f"use {manifest.base.name}{' at revision ' + manifest.base.revision if manifest.base.revision else ''} "
            "as it was, or train the adapter anew on this base",
            where=f"base.{field}" if field in ("config", "tensors", "weights") else f"tokenizer.{field}",
        )
