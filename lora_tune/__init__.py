"""LoRA and QLoRA fine-tuning from one YAML file, with a measurement behind every claim."""

import os

__version__ = "0.1.0"

# Before any upstream library is imported: none of them may call home (TRL sends a ping when a trainer is made).
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
# tokenizers warns, and may hang, when a process forks after it has used its threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
