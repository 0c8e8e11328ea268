"""The passport: `lora_tune.json` beside PEFT's files, saying what the adapter was trained on and how it behaves."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_tune.errors import AdapterError

FILE_NAME = "lora_tune.json"
MAX_TEMPLATE_CHARS = 64 * 1024
MAX_PROBES = 16
MAX_PROBE_TOKENS = 4096
MAX_TOP_TOKENS = 64
# Control characters, line separators, turned text and halves of characters: a terminal may obey them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FREE_TEXT = {"tokenizer": {"own_template"}, "data": {"system_message"}}
"""Words for the model, of several lines; they are never shown as they are."""

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_TokenId = Annotated[int, Field(ge=0, le=2**31)]
_TopIds = Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=MAX_TOP_TOKENS)]
_TopLogprobs = Annotated[tuple[float, ...], Field(min_length=1, max_length=MAX_TOP_TOKENS)]


class _Facts(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class BaseFacts(_Facts):
    """The base that the adapter was trained on."""

    name: _Name
    """Hub id, `builtin:…`, or the name of the local folder or file."""
    revision: _Commit | None
    """The hub's commit."""
    quantization: Literal["none", "nf4", "int8"]
    """How the base was held in memory while training."""
    dtype: Literal["bf16", "fp32"]
    """Compute dtype while training."""
    config: _Digest
    """sha256 of the base's config."""
    tensors: _Digest
    """sha256 of its tensors' names, dtypes and shapes."""
    weights: _Digest
    """sha256 over its weights."""


class TokenizerFacts(_Facts):
    """What turned messages into tokens."""

    tokenizer: _Digest
    """sha256 of vocabulary and rules."""
    chat_template: _Digest
    """sha256 of the chat template's text."""
    own_template: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] | None
    """The template's text when it is not the base's own."""


class LoraFacts(_Facts):
    """The adapter's shape."""

    rank: int
    alpha: float
    scaling: float
    dropout: float
    variant: Literal["lora", "rslora", "dora"]
    targets: tuple[str, ...]
    """Names of the adapted layers, sorted."""
    n_parameters: int
    """Trained numbers."""


class DataFacts(_Facts):
    """What it was trained on, without its text, but for a system message that all rows share."""

    digest: _Digest
    """sha256 over tokens and loss masks of the used rows."""
    rows: int
    tokens: int
    trained_tokens: int
    train_on: str
    max_seq_tokens: int
    system_message: str | None
    """The system message of every row, which the adapter expects when it is used; None when rows differ or have none."""


class ParentFacts(_Facts):
    """One of the adapters that another was made from."""

    name: _Name
    digest: _Digest
    """Content digest: of its weights and its config."""
    weight: float
    """Factor in front of its change."""
    verified: bool
    """Whether it had a passport; without one, only its layers' widths were compared with the base."""


class MadeFrom(_Facts):
    """How an adapter was made from others, without training."""

    method: Literal["concat", "svd", "ties", "dare", "resize", "fold"]
    parents: Annotated[tuple[ParentFacts, ...], Field(min_length=1, max_length=16)]
    density: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Share of each change that was kept (ties, dare)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None
    """Which entries were dropped (dare)."""


class Probe(_Facts):
    """A fixed prompt and what the trained model says to it: whoever loads the adapter can check for the same."""

    prompt: str
    """The user's words; probes are the tool's own and hold no training data."""
    input_ids: Annotated[tuple[_TokenId, ...], Field(min_length=2, max_length=MAX_PROBE_TOKENS)]
    """Prompt and the trained model's greedy answer, [T]."""
    answer_start: Annotated[int, Field(ge=1)]
    """Index in `input_ids` where the answer begins."""
    top_ids: tuple[_TopIds, ...]
    """For each answer position, the likeliest token ids, [A][K]."""
    top_logprobs: tuple[_TopLogprobs, ...]
    """Their log-probabilities, [A][K]."""
    base_logprobs: tuple[_TopLogprobs, ...]
    """What the base without the adapter gives the same tokens, [A][K]: the adapter's effect shows as a difference."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.answer_start > len(self.input_ids):
            raise ValueError(f"answer_start is past the {len(self.input_ids)} tokens")
        positions = max(1, len(self.input_ids) - self.answer_start)
        width = len(self.top_ids[0]) if self.top_ids else 0
        for field in ("top_ids", "top_logprobs", "base_logprobs"):
            rows = getattr(self, field)
            if len(rows) != positions or any(len(row) != width for row in rows):
                raise ValueError(f"{field} must hold {positions} rows, all as wide as the first of top_ids")
        return self


class AdapterManifest(_Facts):
    """Everything an adapter says about itself."""

    format: Literal[1] = 1
    """Version of this file's format."""
    name: _Name
    base: BaseFacts
    tokenizer: TokenizerFacts
    lora: LoraFacts
    data: DataFacts
    recipe: dict[str, Any]
    """The resolved recipe, folders of the machine left out; the door checks it."""
    recipe_digest: _Digest
    weights_digest: _Digest
    """sha256 of `adapter_model.safetensors`."""
    config_digest: _Digest
    """sha256 of `adapter_config.json`."""
    versions: dict[str, str]
    """Of Python and of the libraries that trained it."""
    figures: dict[str, float]
    """What training measured."""
    probes: Annotated[tuple[Probe, ...], Field(min_length=1, max_length=MAX_PROBES)]
    made_from: MadeFrom | None = None
    """How it was made from other adapters; None when it was trained. Recipe and data are then those of its parents."""


def read_manifest(text: str, *, where: str) -> AdapterManifest:
    """Return the passport in `text`.

    Raises:
        AdapterError: it is not a passport (exit 77).
    """
    try:
        manifest = AdapterManifest.model_validate_json(text)
    except ValidationError as err:
        raise AdapterError(
            f"{where}: {first_problem(err)}", hint="the passport was changed or is of another version", where=where
        ) from err
    shown = manifest.model_dump(mode="json", exclude=_FREE_TEXT)
    bad = next((words for words in _strings(shown) if has_control(words)), None)
    if bad is not None:
        raise AdapterError(
            f"{where}: {bad[:60]!a} holds control characters", hint="do not use this adapter", where=where
        )
    return manifest


def first_problem(err: ValidationError) -> str:
    """Return `field: what is wrong` of the first problem, with nothing in it that a terminal obeys."""
    first = err.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"{ascii(field[:120])[1:-1]}: {first['msg'][:200]}" if field else first["msg"][:200]


def has_control(text: str) -> bool:
    """Return whether a terminal would do anything else than show this text on its line."""
    return _CONTROL.search(text) is not None


def dump_manifest(manifest: AdapterManifest) -> str:
    """Return the passport as canonical JSON: sorted keys, no times."""
    return json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False) + "\n"


def _strings(value: object) -> Iterator[str]:
    """Every string in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
