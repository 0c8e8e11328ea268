"""What a recipe may say: one frozen section per part of a run, each setting with its default, limits and meaning.

`--help`, the JSON Schema and docs/reference/recipe.md are generated from here; there is no second default anywhere.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""What a run, an adapter or an alias may be called."""

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""What the name of a file of rows ends in."""

DATA_PACKINGS = (".gz", ".bz2", ".xz", ".zst")
"""What may follow when the file is packed."""

BUILTIN_BASES = ("builtin:smollm2-135m",)
"""Bases that need no hub; where each comes from stands in model/resolve.py."""

BUILTIN_TEMPLATES = ("builtin:plain",)
"""Chat templates that need no file; their text stands in recipe/template.py."""

TooLong = Literal["fail", "drop", "cut_left", "cut_right", "split"]
RowFormat = Literal["auto", "chat", "sharegpt", "prompt-completion", "alpaca", "text", "labelled", "preference", "kto"]
Share = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}(\.[0-9]{1,4})?%$")]
TargetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)]


class Section(BaseModel):
    """A closed, frozen part of a recipe: an unknown key is an error, a value never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BaseSection(Section):
    """The frozen pretrained weights that the adapter is trained on."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    """Hub id (`Qwen/Qwen3-8B`), local folder, `.gguf` file, or `builtin:smollm2-135m`."""

    revision: str | None = None
    """Commit, tag or branch of a hub id; null takes the hub's default branch, and the run records its commit."""

    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the base is held in memory: `none`, `nf4` (QLoRA: 4 bit, double quantization) or `int8`."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype; `auto` is bf16 where the device computes it fast, fp32 elsewhere."""


class MixedSet(Section):
    """One of several sets that are trained together."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder or `hub:OWNER/NAME`, as `data.path`."""

    revision: str | None = None
    """The full commit of a hub dataset."""

    format: RowFormat | None = None
    """How its rows are laid out; null takes `data.format`."""

    columns: Annotated[dict[str, str], Field(max_length=32)] | None = None
    """Its own column names; null takes `data.columns`."""

    repeat: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """How often each of its rows is trained in an epoch: 2 twice, 0.25 a quarter of the rows, chosen by the seed."""

    weight: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Its share of the mixture beside the other weights, by rows; all sets have a weight, or none."""


class DataSection(Section):
    """The rows, and which of their tokens are trained."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """Rows to train on: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` (also `.gz`, `.bz2`, `.xz`, `.zst`), a folder of
    those, or `hub:OWNER/NAME`; relative to the recipe."""

    revision: str | None = None
    """The full commit of a hub dataset, 40 hexadecimal digits: a moving branch would change the rows."""

    mix: Annotated[tuple[MixedSet, ...], Field(max_length=64, strict=False)] = ()
    """Several sets instead of `path`, each with `path` and, if wanted, `weight` or `repeat`, `format`, `columns`."""

    eval_path: str | None = None
    """Held-out rows in the same format; null holds out `eval_split` of the rows instead."""

    format: RowFormat = "auto"
    """How a row is laid out; `auto` looks at the columns and says what it found."""

    columns: Annotated[dict[str, str], Field(max_length=32)] = Field(default_factory=dict)
    """Other names of the format's columns, as `{ours: yours}`: `{prompt: question, completion: answer}`."""

    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """Which tokens are trained: every assistant message, the last one, those of the completion, or all tokens."""

    max_seq_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longest row in tokens, template included."""

    too_long: TooLong = "drop"
    """What happens to a longer row: stop the run, drop the row, cut its beginning or its end, or split it into several.
    Always counted."""

    max_lost_tokens: Share = "5%"
    """Largest share of the trained tokens that may be lost to `max_seq_tokens`; above it the run stops before it starts."""

    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """So many rows that cannot be used may be left out, the first 20 named; with more the run stops before it starts."""

    eval_split: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of the rows held out for evaluation, chosen by `train.seed`."""

    chat_template: str | None = None
    """A Jinja file, or `builtin:plain` for a base without a template; null takes the base's own."""


class AugmentSection(Section):
    """More variety from a small set: training rows only, seeded, counted; all off by default."""

    copies: Annotated[int, Field(ge=0, le=20)] = 0
    """Changed copies of each training row, made with the changes below; the row itself always stays."""

    case: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the copies whose user messages are written in lower case, upper case or with a capital first letter."""

    typos: Annotated[float, Field(ge=0.0, le=0.2)] = 0.0
    """Share of the words of user messages that get a slip of the keyboard in a copy."""

    punctuation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the copies whose user messages lose or gain a final mark."""

    prompts: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^[^{}]*\{prompt\}[^{}]*$", max_length=4096)], ...],
        Field(max_length=256, strict=False),
    ] = ()
    """Ways to say the same, each with `{prompt}` once; a copy's first user message is put into one of them."""

    balance_labels: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Labelled rows: rare labels are repeated up to this share of the commonest label's rows; 0 repeats none."""

    neftune_alpha: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """NEFTune: uniform noise on the embeddings while training, scaled by alpha / sqrt(tokens x width); 5 is usual."""


class LoraSection(Section):
    """The adapter's shape."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Inner dimension R of the two low-rank factors."""

    alpha: Annotated[float, Field(gt=0.0, le=65_536.0, allow_inf_nan=False)] = 32.0
    """The update is multiplied by alpha / rank (rslora: alpha / sqrt(rank))."""

    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the adapter's inputs that is zeroed while training."""

    targets: (
        Literal["all-linear"] | Annotated[tuple[TargetName, ...], Field(min_length=1, max_length=256, strict=False)]
    ) = "all-linear"
    """Which layers get an adapter: every linear layer but the output head, or names such as `[q_proj, v_proj]`."""

    variant: Literal["lora", "rslora", "dora"] = "lora"
    """Plain LoRA, rank-stabilised scaling, or weight-decomposed LoRA."""

    @property
    def scaling(self) -> float:
        """The factor in front of B·A."""
        return float(self.alpha / self.rank**0.5) if self.variant == "rslora" else float(self.alpha / self.rank)


class TrainSection(Section):
    """The optimization."""

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning, the one method today; recorded in the adapter's passport."""

    epochs: Annotated[float, Field(gt=0.0, le=1000.0)] = 2.0
    """Passes over the training rows."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Train exactly this many steps instead of `epochs`."""

    micro_batch_sequences: Annotated[int, Field(ge=1, le=4096)] = 4
    """Rows in one forward pass."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Forward passes in one step."""

    batching: Literal["auto", "grouped", "random", "packed"] = "auto"
    """How rows share a micro-batch: `grouped` by like length, at `random`, or several rows `packed` up to `data.max_seq_tokens`
    with attention kept within each; `auto` groups where that saves a tenth of the tokens, else random."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 2e-4
    """Peak learning rate of AdamW; LoRA wants about ten times that of full fine-tuning."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate moves after the warm-up."""

    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    """Share of the steps in which the learning rate rises from 0."""

    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """AdamW's decoupled weight decay, on the adapter's weights."""

    max_grad_norm: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Gradients are scaled down to this global norm."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    save_every_steps: Annotated[int, Field(ge=1)] | None = 50
    """Write a checkpoint every so many steps; null writes one at the end, at each new best, and when the run is stopped."""

    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """So many of the newest checkpoints are kept, and the one with the lowest held-out loss."""

    on_oom: Literal["stop", "shrink"] = "stop"
    """When memory runs out: stop, or go on with a smaller micro-batch and as much more accumulation, which trains the same
    steps."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds the adapter's initial weights, the held-out split, the mixture and the copies of rows, their order and
    dropout."""


class EvalSection(Section):
    """What is measured on the held-out rows."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Measure the held-out loss every so many steps; null measures it after training only."""

    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many measurements without a lower held-out loss, and keep the best weights."""

    generate: Annotated[int, Field(ge=0, le=8192)] = 0
    """Longest generated answer in tokens, for exact match; 0 generates nothing."""

    generate_rows: Annotated[int, Field(ge=1)] = 200
    """At most so many held-out rows are answered by generation."""


class OutputSection(Section):
    """Where the result goes."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] = "adapter"
    """The adapter's name in the registry: lower-case letters, digits and hyphens."""


class Recipe(Section):
    """A whole run in one file."""

    version: Literal[1] = 1
    """Version of the recipe format."""

    base: BaseSection
    data: DataSection
    augment: AugmentSection = AugmentSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()


SECTIONS: dict[str, type[Section]] = {
    "base": BaseSection,
    "data": DataSection,
    "augment": AugmentSection,
    "lora": LoraSection,
    "train": TrainSection,
    "eval": EvalSection,
    "output": OutputSection,
}
