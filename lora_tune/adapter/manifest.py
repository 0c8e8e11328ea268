"""The passport: `lora_tune.json` beside PEFT's files, saying what the adapter was trained on and how it behaves."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.errors import AdapterError

FILE_NAME = "lora_tune.json"
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BaseFacts(_Facts):
    """The base that the adapter was trained on."""

    name: str
    """Hub id, `builtin:…`, or the name of the local folder or file."""
    revision: str | None
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
    own_template: str | None
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


class Probe(_Facts):
    """A fixed prompt and what the trained model says to it: whoever loads the adapter can check for the same."""

    prompt: str
    """The user's words; probes are the tool's own and hold no training data."""
    input_ids: tuple[int, ...]
    """Prompt and the trained model's greedy answer, [T]."""
    answer_start: int
    """Index in `input_ids` where the answer begins."""
    top_ids: tuple[tuple[int, ...], ...]
    """For each answer position, the likeliest token ids, [A][K]."""
    top_logprobs: tuple[tuple[float, ...], ...]
    """Their log-probabilities, [A][K]."""
    base_logprobs: tuple[tuple[float, ...], ...]
    """What the base without the adapter gives the same tokens, [A][K]: the adapter's effect shows as a difference."""


class AdapterManifest(_Facts):
    """Everything an adapter says about itself."""

    format: Literal[1] = 1
    """Version of this file's format."""
    name: str
    base: BaseFacts
    tokenizer: TokenizerFacts
    lora: LoraFacts
    data: DataFacts
    recipe: dict[str, Any]
    """The resolved recipe, folders of the machine left out."""
    recipe_digest: _Digest
    weights_digest: _Digest
    """sha256 of `adapter_model.safetensors`."""
    config_digest: _Digest
    """sha256 of `adapter_config.json`."""
    versions: dict[str, str]
    """Of Python and of the libraries that trained it."""
    figures: dict[str, float]
    """What training measured."""
    probes: tuple[Probe, ...]


def read_manifest(text: str, *, where: str) -> AdapterManifest:
    """Return the passport in `text`.

    Raises:
        AdapterError: it is not a passport (exit 77).
    """
    try:
        return AdapterManifest.model_validate_json(text)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise AdapterError(
            f"{where}: {field}: {first['msg']}", hint="the passport was changed or is of another version", where=where
        ) from err


def dump_manifest(manifest: AdapterManifest) -> str:
    """Return the passport as canonical JSON: sorted keys, no times."""
    return json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False) + "\n"
