"""What a run's files say, as values that are checked: another version wrote them, a killed run, or a stranger.

Every fact may be missing; what is there has its type and is finite.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
Words = Annotated[str, Field(max_length=1_000_000)]


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class StepLine(_Written):
    """A line of metrics.jsonl: one step. A loss that was no number is None."""

    step: Count
    steps: Count | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: Count | None = None
    trained_tokens: Count | None = None
    padding_share: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    elapsed_seconds: float | None = None
    eta_seconds: float | None = None


class HeldOutLine(_Written):
    """A line of metrics.jsonl: the held-out rows measured while training."""

    step: Count
    held_out_loss: float | None


class LengthBin(_Written):
    """Rows with so many tokens."""

    tokens_from: Count
    tokens_to: Count
    rows: Count
    too_long: bool = False


class SourceRows(_Written):
    """Rows of one source."""

    source: Words
    rows: Count
    rows_an_epoch: Count


class RoleTokens(_Written):
    """Tokens of one role."""

    tokens: Count
    trained: Count


class DataLedger(_Written):
    """What became of every row."""

    digest: Words | None = None
    """sha256 over tokens and loss masks."""
    format: Words | None = None
    train_rows: Count | None = None
    held_out_rows: Count | None = None
    rows_left_out: Count | None = None
    counts: dict[str, dict[str, Count]] = Field(default_factory=dict)
    sources: tuple[SourceRows, ...] = Field(default=(), strict=False)
    roles: dict[str, RoleTokens] = Field(default_factory=dict)
    labels: dict[str, Count] = Field(default_factory=dict)
    tokens_by_row: dict[str, list[LengthBin]] = Field(default_factory=dict)
    warnings: list[Words] = Field(default_factory=list)


class Resumed(_Written):
    """Where a run that had stopped went on."""

    step: Count
    changed: dict[str, Any] = Field(default_factory=dict)
    """Fields that the user let change, with what they were and are."""


class RunFacts(_Written):
    """run.json."""

    run_id: Words | None = None
    started_at: float | None = None
    """Seconds since 1970."""
    versions: dict[str, Words] = Field(default_factory=dict)
    base: dict[str, Words | None] = Field(default_factory=dict)
    chat_template: Words | None = None
    data: DataLedger = DataLedger()
    recipe_digest: Words | None = None
    resumed: list[Resumed] = Field(default_factory=list)
    warnings: list[Words] = Field(default_factory=list)


class ReportAdapter(_Written):
    """The adapter that a run made."""

    registry: Words | None = None
    """Its version, as `home@3`."""
    digest: Words | None = None
    weights_digest: Words | None = None
    weights_bytes: Count | None = None
    parameter_bytes: Count | None = None


class TrainingFigures(_Written):
    """What training did."""

    steps: Count | None = None
    epochs: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    """Mean loss of the last tenth of the steps."""
    tokens: Count | None = None
    trained_tokens: Count | None = None
    batching: Words | None = None
    padding_share: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    best_step: Count | None = None
    held_out_loss: float | None = None


class MeasuredAnswer(_Written):
    """One held-out row, answered."""

    where: Words = ""
    prompt: Words = ""
    expected: Words = ""
    base: Words | None = None
    adapter: Words | None = None


class MeasuredFigures(_Written):
    """Figures on the held-out rows."""

    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    exact_match: float | None = None
    n_answers: Count | None = None


class MeasuredRows(_Written):
    """Base beside adapter on the held-out rows."""

    base: MeasuredFigures | None = None
    adapter: MeasuredFigures | None = None
    answers: list[MeasuredAnswer] = Field(default_factory=list)


class ReportFile(_Written):
    """report.json."""

    adapter: ReportAdapter | None = None
    training: TrainingFigures = TrainingFigures()
    evaluation: MeasuredRows | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time by part."""
    warnings: list[Words] = Field(default_factory=list)


class CheckpointManifest(_Written):
    """manifest.json of a checkpoint."""

    step: Count
    run_id: Words
    files: dict[str, Any]
    """Size, or size and digest, by name."""
