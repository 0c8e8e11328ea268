"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Recipe = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object (train: JSON Lines) instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Adapter = Annotated[
    str,
    typer.Argument(help="A folder, or name, name@3, name@sha256:…, or an alias in the registry.", show_default=False),
]
Base = Annotated[
    str | None, typer.Option("--base", help="Another place of the same base: a folder, .gguf file or hub id.")
]
Registry = Annotated[
    Path | None, typer.Option("--registry", help="Registry folder; default LORA_TUNE_ADAPTERS, or adapters/.")
]
EngineName = Literal["auto", "native", "simple", "vllm"]
Quantization = Literal["none", "nf4", "int8"]
