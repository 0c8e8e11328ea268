"""The commands of `lora-tune runs`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_tune.cli import render, run_views
from lora_tune.cli.options import Debug, Json
from lora_tune.cli.visible import visible

runs_app = typer.Typer(help="Runs: what they did, beside each other, and as a page.", no_args_is_help=True, rich_markup_mode=None)  # fmt: skip
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, its name, or the beginning of it.", show_default=False)]  # fmt: skip
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The folder that holds the runs.")]
RUNS = Path("runs")


@runs_app.command("list")
def list_(runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """List every run, the newest first: how far it came, its losses and its adapter."""
    from lora_tune.cli import run_verbs

    run_views.runs(run_verbs.list_runs(runs), as_json=as_json)


@runs_app.command()
def show(run: Run, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Show everything of one run, and what to do with it next."""
    from lora_tune.cli import run_verbs

    run_views.run(run_verbs.show(run, runs=runs), as_json=as_json)


@runs_app.command()
def compare(several: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Two runs or more, each as for `show`.", show_default=False)],
            runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Say what differs between runs, and the first step at which their losses are not the same to the last bit."""
    from lora_tune.cli import run_verbs

    run_views.comparison(run_verbs.compare(several, runs=runs), as_json=as_json)


@runs_app.command()
def report(run: Run, out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; default report.html in the run's folder.")] = None,
           watch: Annotated[bool, typer.Option("--watch", help="Write it again every few seconds until the run ends.")] = False,
           runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write a run as one page that needs nothing else: recipe, data, curves, figures, and how to use the adapter."""
    from lora_tune.cli import run_verbs

    written = run_verbs.report(run, runs=runs, out=out, watch=watch, say=render.note)
    render.json_object(written) if as_json else print(visible(written["page"]))
