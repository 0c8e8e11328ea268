"""A run's outcome → report.json, and the values that a terminal shows of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.registry import Version
from lora_tune.training.trainer import Outcome


@dataclass(frozen=True)
class RunReport:
    """Everything a finished run says."""

    run: Path
    adapter: Path
    version: Version
    digest: str
    """Content digest of the adapter."""
    weights_digest: str
    weights_bytes: int
    """Size of adapter_model.safetensors."""
    parameter_bytes: int
    """Bytes of the LoRA weights alone."""
    counts: dict[str, dict[str, int]]
    data: dict[str, Any]
    """The ledger: where every row and token went, by source and by role."""
    outcome: Outcome
    evaluation: dict[str, Any] | None
    seconds: dict[str, float]
    """Wall time by part of the run."""

    def as_dict(self) -> dict[str, Any]:
        """The report as report.json holds it."""
        return {
            "run": str(self.run),
            "adapter": {
                "folder": str(self.adapter),
                "registry": self.version.spec,
                "digest": self.digest,
                "weights_digest": self.weights_digest,
                "weights_bytes": self.weights_bytes,
                "parameter_bytes": self.parameter_bytes,
            },
            "data": self.counts,
            "data_ledger": self.data,
            "training": self.outcome.as_dict(),
            "evaluation": self.evaluation,
            "seconds": self.seconds,
        }
