"""A base → a running engine: which one can hold what is asked for, and everything about the base that serving needs."""

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.live import check_belongs, own_template
from lora_tune.errors import MissingInputError, RecipeError, UnsupportedError
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.fingerprint import fingerprint
from lora_tune.model.generate import stop_ids
from lora_tune.model.load import detect_device, load_base, load_tokenizer, place
from lora_tune.model.resolve import Progress
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import Engine, ServedBase
from lora_tune.serving.places import ends_of

EngineName = Literal["auto", "native", "simple", "vllm"]
UNSAID_CONTEXT_TOKENS = 4096
"""The context of a base whose config names none."""


def open_engine(
    section: BaseSection,
    *,
    engine: EngineName,
    progress: Progress,
    needs: Sequence[AdapterFiles] = (),
    max_adapters: int,
    max_rank: int,
    max_running: int,
    served_name: str | None = None,
    max_context: int | None = None,
    vllm_url: Sequence[str] = (),
) -> tuple[Engine, ServedBase, str]:
    """Return an engine on the base, the base, and why it is this engine: empty if it is what was asked for.

    Args:
        section: the base, and how it is held in memory.
        engine: `auto` takes native, and simple where native cannot hold the base or one of the adapters; with URLs, vllm.
        progress: told what is being done.
        needs: adapters that will be loaded; they must belong to the base. None is loaded here.
        max_adapters: adapters at once.
        max_rank: largest rank of one.
        max_running: answers at once; the simple engine has a bound of its own.
        served_name: what clients call the base; None takes the section's name, of a path its last part.
        max_context: most tokens of prompt and answer together; None takes what the base was made for.
        vllm_url: of vLLM servers that run already.

    Raises:
        AdapterMismatchError: one of `needs` was trained on another base (exit 77).
        UnsupportedError: the engine that was asked for cannot hold the base, or one of `needs` (exit 69).
        MissingInputError: the base is not there, or has no chat template (exit 66).
        UnreachableError: there is no vLLM (exit 69).
    """
    files = ready_base(section, progress)
    for adapter in needs:
        check_belongs(adapter, files)
    if engine == "vllm" or (engine == "auto" and vllm_url):
        base = _served(section, files, _generation_of(files), needs, name=served_name, max_context=max_context)
        opened = _open_vllm(base, vllm_url, (max_adapters, max_rank, max_running), progress)
        return opened, base, "" if engine == "vllm" else "its URL was given"
    why = _why_not_native(needs)
    if why and engine == "native":
        raise UnsupportedError(f"the native engine cannot be used: {why}", hint="leave out --engine, or take simple")
    progress(f"loading {files.name}", 0.0)
    model = load_base(files, section)
    base = _served(section, files, model, needs, name=served_name, max_context=max_context)
    if engine != "simple" and not why:
        found = _try_native(model, base, (max_adapters, max_rank, max_running))
        if not isinstance(found, UnsupportedError):
            return found, base, ""
        if engine == "native":
            raise found
        why = found.message
        # The native engine took the model's layers over before it gave up; there is no room for two.
        del model
        gc.collect()
        model = load_base(files, section)
    return _open_simple(model, base, max_adapters), base, why


def _open_simple(model: Any, base: ServedBase, max_adapters: int) -> Engine:
    from lora_tune.serving.simple import SimpleEngine

    dtype = place(detect_device(), base.section).adapter_dtype
    return SimpleEngine(
        model, base.ends, max_context_tokens=base.max_context_tokens, max_adapters=max_adapters, adapter_dtype=dtype
    )


def _why_not_native(needs: Sequence[AdapterFiles]) -> str:
    dora = [adapter.folder.name for adapter in needs if adapter.shape.variant == "dora"]
    return f"it does not hold DoRA adapters, and {', '.join(dora)} is one" if dora else ""


def _try_native(model: Any, base: ServedBase, limits: tuple[int, int, int]) -> "Engine | UnsupportedError":
    """Return the native engine on the model, or why it cannot hold it."""
    from lora_tune.serving.forward import unsupported
    from lora_tune.serving.native import NativeEngine

    reason = unsupported(model)
    if reason:
        return UnsupportedError(
            f"the native engine cannot hold {base.name}: {reason}", hint="leave out --engine, or take simple"
        )
    max_adapters, max_rank, max_running = limits
    try:
        return NativeEngine(
            model, base.ends, max_context_tokens=base.max_context_tokens,
            max_running=max_running, max_adapters=max_adapters, max_rank=max_rank,
        )  # fmt: skip
    except UnsupportedError as err:
        return UnsupportedError(err.message, hint=err.hint)  # the traceback of the first one holds the model


def _open_vllm(base: ServedBase, urls: Sequence[str], limits: tuple[int, int, int], progress: Progress) -> Engine:
    from lora_tune.serving.vllm import connect_vllm, start_vllm
    from lora_tune.serving.vllm_child import ChildLimits

    sizes = ChildLimits(*limits)
    return connect_vllm(base, urls, sizes, os.environ) if urls else start_vllm(base, sizes, progress, os.environ)


def _served(
    section: BaseSection, files: BaseFiles, model: Any, needs: Sequence[AdapterFiles], *, name: str | None, max_context: int | None
) -> ServedBase:  # fmt: skip
    """Return what serving knows of the base; of `model` only the two configs are read."""
    tokenizer = _tokenizer(files, needs)
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNSAID_CONTEXT_TOKENS
    return ServedBase(
        name=name or _called(section.name),
        section=section,
        files=files,
        tokenizer=tokenizer,
        ends=_ends(files, model, tokenizer, needs),
        max_context_tokens=min(made_for, max_context or made_for),
        weights_digest=fingerprint(files.folder).weights,
    )


def _called(name: str) -> str:
    """Return what clients call a base: of a path only its last part, which says nothing of this machine."""
    if name.endswith(".gguf"):
        return Path(name).stem
    return Path(name).name if Path(name).is_absolute() else name


def _tokenizer(files: BaseFiles, needs: Sequence[AdapterFiles]) -> Any:
    """Return the base's tokenizer; a base without a chat template is asked with that of its first adapter that has one."""
    try:
        return load_tokenizer(files)
    except RecipeError as err:
        templates = [template for template in map(own_template, needs) if template is not None]
        if not templates:
            raise MissingInputError(
                err.message, hint="name an adapter whose passport carries a template, or an instruction-tuned base"
            ) from err
        return fence_template(load_tokenizer(files, template_text=templates[0]))


def _ends(files: BaseFiles, model: Any, tokenizer: Any, needs: Sequence[AdapterFiles]) -> tuple[int, ...]:
    """Return the ids that end an answer, of the base and of every template that the adapters carry."""
    found = set(stop_ids(model, tokenizer))
    for template in {template for template in map(own_template, needs) if template is not None}:
        found.update(ends_of(files, template))
    return tuple(sorted(found))


def _generation_of(files: BaseFiles) -> Any:
    """Return the base's config and generation config, as a model has them, without loading it."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    try:
        generation = GenerationConfig.from_pretrained(files.folder)
    except OSError:  # there is none: transformers makes it of the config
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)
