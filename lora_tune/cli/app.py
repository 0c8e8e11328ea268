"""The command line: each command reads, calls and renders; heavy imports stand inside, so that --help answers at once."""

import errno
import signal
import sys
import traceback
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune import __version__
from lora_tune.cli import render, train_view
from lora_tune.cli.adapters_app import adapters_app
from lora_tune.cli.options import Adapter, Base, Debug, EngineName, Json, Quantization, Recipe, Registry, Sets
from lora_tune.cli.runs_app import runs_app
from lora_tune.errors import CannotWriteError, LoraTuneError, TrainingError, UsageError

INTERRUPTED = 130
_EXAMPLE = """Example: lora-tune recipes cp quickstart my.yaml && lora-tune train my.yaml && lora-tune chat home-assistant

Fine-tune a chat model with LoRA or QLoRA from one recipe.
"""
app = typer.Typer(
    help=_EXAMPLE, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
recipes_app = typer.Typer(help="Recipes that ship with lora_tune.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapters_app, name="adapters")
app.add_typer(runs_app, name="runs")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lora_tune {__version__}")
        raise typer.Exit


@app.callback(help=_EXAMPLE)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


@app.command()
def check(recipe: Recipe, set_: Sets = None, tokens: Annotated[bool, typer.Option("--tokens", help="Also tokenize every row.")] = False,
          html: Annotated[Path | None, typer.Option("--html", help="Write it as a page, with a histogram and sample rows; implies --tokens.")] = None,
          as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Check a recipe and its rows; no model is loaded, and nothing written but the page of --html."""
    from lora_tune.cli import recipe_verbs

    render.checked(
        recipe_verbs.check(recipe, set_ or (), tokens=tokens or html is not None, html=html), as_json=as_json
    )


@app.command()
def preview(recipe: Recipe, rows: Annotated[int, typer.Option("-n", min=1, help="Rows to show.")] = 3, set_: Sets = None,
            html: Annotated[Path | None, typer.Option("--html", help="Also write them as a page with coloured masks.")] = None,
            as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Show the tokens of some rows in colour, and which of them are trained."""
    from lora_tune.cli import recipe_verbs

    render.preview(recipe_verbs.preview(recipe, set_ or (), rows=rows, html=html), as_json=as_json)


@app.command()
def train(recipe: Recipe, set_: Sets = None,
          run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Run folder; default runs/NAME-TIME.")] = None,
          resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir, or with the newest unfinished one of this name.")] = False,
          allow_drift: Annotated[list[str] | None, typer.Option("--allow-drift", metavar="FIELD", help="A setting that may have changed since, train.epochs say; repeatable.")] = None,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the base is loaded; nothing is written.")] = False,
          registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Train an adapter from a recipe, prove it, measure it and put it into the registry."""
    from lora_tune.cli import recipe_verbs

    view = train_view.TrainView(as_json=as_json)
    with view:
        outcome = recipe_verbs.train(
            recipe, set_ or (), run_dir=run_dir, dry_run=dry_run, registry=registry, notify=view.notify,
            resume=resume, allowed_drift=allow_drift or (),
        )  # fmt: skip
    view.finish(outcome)


@app.command(name="eval")
def eval_(adapter: Adapter, data: Annotated[Path | None, typer.Option("--data", help="Rows to measure on; default the recipe's held-out rows.")] = None,
          base_too: Annotated[bool, typer.Option("--base-too/--adapter-only", help="Measure the base beside the adapter.")] = True,
          generate: Annotated[int, typer.Option("--generate", min=0, help="Longest generated answer in tokens; 0 generates none.")] = 64,
          rows: Annotated[int, typer.Option("--rows", min=1, help="At most so many rows are answered.")] = 200,
          base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Measure an adapter beside its base: loss, perplexity, token accuracy, exact match."""
    from lora_tune.cli import verbs

    with render.Progress() as progress:
        measured = verbs.evaluate(
            adapter,
            data,
            base_too=base_too,
            generate=generate,
            rows=rows,
            base=base,
            registry=registry,
            progress=progress,
        )
    render.evaluation(measured, as_json=as_json)


@app.command()
def chat(model: Annotated[str, typer.Argument(help="An adapter, or a base: builtin:…, folder, .gguf, hub id.", show_default=False)],
         prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt; without it, lines are read until the end.")] = None,
         system: Annotated[str | None, typer.Option("--system", help="System message; an adapter's own is the default.")] = None,
         system_from: Annotated[str | None, typer.Option("--system-from", help="Take the system message that this adapter was trained with.")] = None,
         max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
         temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
         base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Talk to an adapter or a base; answers stream, piped input works."""
    from lora_tune.cli import verbs

    with render.Progress() as progress:
        talk = verbs.open_chat(
            model, system=system, system_from=system_from, base=base, registry=registry, progress=progress
        )
    with closing(talk):
        render.chat(talk, prompt, max_tokens=max_tokens, temperature=temperature, as_json=as_json)


@app.command()
def serve(what: Annotated[str | None, typer.Argument(metavar="[BASE|RUN|ADAPTER]", help="A base, a run's folder, or an adapter; default the registry's prod, or its only adapter.", show_default=False)] = None,  # noqa: PLR0913, PLR0917 - each is an option of its own
          adapter: Annotated[list[str] | None, typer.Option("--adapter", metavar="[NAME=]ADAPTER", help="An adapter to serve, under another name or its own: a folder or in the registry; repeatable.")] = None,
          follow: Annotated[list[str] | None, typer.Option("--follow", metavar="ALIAS", help="Serve what this alias of the registry points to, now and whenever it moves; repeatable.")] = None,
          engine: Annotated[EngineName, typer.Option("--engine", help="auto: native, and simple where native cannot (DoRA, say). vllm: for many GPUs.")] = "auto",
          vllm_url: Annotated[list[str] | None, typer.Option("--vllm-url", metavar="URL", help="A vLLM server that runs already; repeatable for replicas.")] = None,
          host: Annotated[str, typer.Option("--host", help="Address to listen on; other than this machine's own only with an API key.")] = "127.0.0.1",
          port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
          api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="File with one API key a line; also LORA_TUNE_API_KEY.")] = None,
          admin_key_file: Annotated[Path | None, typer.Option("--admin-key-file", help="File with one admin key a line; also LORA_TUNE_ADMIN_KEY. Without one, nobody can load or promote over HTTP.")] = None,
          allow_host: Annotated[list[str] | None, typer.Option("--allow-host", metavar="HOST", help="Another name that requests may ask for; repeatable.")] = None,
          allow_origin: Annotated[list[str] | None, typer.Option("--allow-origin", metavar="ORIGIN", help="Web pages elsewhere that may ask, https://example.org; repeatable.")] = None,
          max_context: Annotated[int | None, typer.Option("--max-context", min=2, help="Most tokens of prompt and answer together; default what the base was made for.")] = None,
          max_running: Annotated[int, typer.Option("--max-running", min=1, max=4096, help="Answers at once; others wait.")] = 16,
          max_adapters: Annotated[int, typer.Option("--max-adapters", min=0, max=4096, help="Adapter versions in memory at once.")] = 16,
          max_rank: Annotated[int, typer.Option("--max-rank", min=1, max=1024, help="Largest rank of an adapter that comes later.")] = 64,
          name: Annotated[str | None, typer.Option("--name", help="What clients call the base; default its own name.")] = None,
          state: Annotated[Path | None, typer.Option("--state", help="File that holds what is loaded and promoted, over restarts; default in the registry.")] = None,
          page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the page at /.")] = True,
          quantization: Annotated[Quantization | None, typer.Option("--quantization", help="How the base is held in memory; default as its adapter was trained.")] = None,
          base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Serve a base and its adapters over an OpenAI-compatible API, with a page to try them."""
    from lora_tune.cli import serve_verbs

    wish = serve_verbs.ServeWish(
        what, tuple(adapter or ()), tuple(follow or ()), base=base, quantization=quantization, engine=engine, vllm_urls=tuple(vllm_url or ()),
        host=host, port=port, api_key_file=api_key_file, admin_key_file=admin_key_file, allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()), max_context=max_context, max_running=max_running, max_adapters=max_adapters,
        max_rank=max_rank, name=name, registry=serve_verbs.registry_root(registry), state=state, page=page,
    )  # fmt: skip
    with render.Progress() as progress:
        server = serve_verbs.open_server(wish, progress)
    render.serving(server.facts, as_json=as_json)
    server.run()


@app.command()
def merge(adapter: Adapter, out: Annotated[Path, typer.Argument(help="New folder for the merged model.", show_default=False)],
          also: Annotated[list[str] | None, typer.Option("--also", metavar="ADAPTER[=WEIGHT]", help="Another adapter to merge in; repeatable.")] = None,
          dtype: Annotated[str | None, typer.Option("--dtype", help="What is written: bf16 or fp32; default what the base computed in while training.")] = None,
          onto: Annotated[str, typer.Option("--onto", help="trained: the weights as they were while training; original: those of the base's files.")] = "trained",
          base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Merge an adapter into its base, with a receipt of what that changed."""
    from lora_tune.cli import adapter_verbs

    with render.Progress() as progress:
        receipt = adapter_verbs.merge(
            adapter, out, also=also or (), onto=onto, dtype=dtype, base=base, registry=registry, progress=progress
        )
    render.result(receipt, as_json=as_json, title=f"merged into {out}")


@app.command()
def export(adapter: Annotated[str, typer.Argument(help="An adapter, or a merged model's folder (for gguf).", show_default=False)],
           out: Annotated[Path, typer.Argument(help="New folder; of a merged model the new .gguf file.", show_default=False)],
           to: Annotated[str, typer.Option("--to", help="gguf (llama.cpp), ollama, mlx or peft.", show_default=False)],
           dtype: Annotated[str | None, typer.Option("--dtype", help="Of a whole model as gguf, and of ollama's base: f16, bf16 or q8_0.")] = None,
           base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write an adapter for another engine, checked against what was trained, or refuse with the way out."""
    from lora_tune.cli import adapter_verbs

    with render.Progress() as progress:
        report = adapter_verbs.export(adapter, out, to=to, dtype=dtype, base=base, registry=registry, progress=progress)
    render.result(report, as_json=as_json, title=f"written for {to}")


@app.command()
def doctor(what: Annotated[str | None, typer.Argument(metavar="RECIPE|BASE", help="Also look at this base, or a recipe's: its files and chat template.", show_default=False)] = None,
           as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Check the installed stack on a tiny model. Exit 0 only if all of it computes what it should, else 65; offline."""
    from lora_tune.cli import doctor_verb

    with render.Progress() as progress:
        found = doctor_verb.examine(what, progress)
    doctor_verb.diagnosis(found, as_json=as_json)
    if not found["ok"]:
        raise typer.Exit(TrainingError.exit_code)


@app.command()
def schema(as_json: Json = False, debug: Debug = False) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from lora_tune.cli import recipe_verbs

    render.json_object(recipe_verbs.schema())


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes and what each is for."""
    from lora_tune.recipe import shipped

    render.recipes(shipped.list_recipes(), as_json=as_json)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(show_default=False)], as_json: Json = False, debug: Debug = False
) -> None:
    """Print one recipe."""
    from lora_tune.recipe import shipped

    render.text(shipped.read_recipe(name), key="recipe", as_json=as_json)


@recipes_app.command("cp")
def recipes_cp(name: Annotated[str, typer.Argument(show_default=False)], file: Annotated[Path, typer.Argument(show_default=False)],
               as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Copy one recipe, and its demo data if it has any, to start your own from."""
    from lora_tune.recipe import shipped

    render.result(
        {"copied": [str(path) for path in shipped.copy_recipe(name, file)]},
        as_json=as_json,
        title=f"next: lora-tune check {file}",
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the code of docs/reference/exit-codes.md."""
    arguments = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        # Rows hold any character, and a terminal's encoding may lack it: show its number instead of failing.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Ended from outside, what is half-made is cleared away as after any other failure.
    signal.signal(signal.SIGTERM, _end)
    sys.exit(run(arguments))


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; the only place where every exception is caught."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="lora-tune", standalone_mode=False)
        # Typer answers Ctrl-C with this code by itself.
        return _interrupted(as_json=as_json) if code == INTERRUPTED else int(code) if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted(as_json=as_json)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): that is no error, but Python would print one at exit.
        sys.stdout = None
        return 0
    except Exception as err:  # noqa: BLE001 - the door of the command line
        if type(err).__name__ == "NoArgsIsHelpError":
            print(err.ctx.get_help(), file=sys.stderr)  # type: ignore[attr-defined]
            return UsageError.exit_code
        if debug:
            traceback.print_exc()
        return render.error(err if isinstance(err, LoraTuneError) else _translate(err), as_json=as_json)


def _interrupted(*, as_json: bool) -> int:
    if as_json:
        render.json_object({"error": {"code": "interrupted", "message": "interrupted", "hint": "", "where": ""}})
    else:
        render.note("\ninterrupted; what was written whole before stands as it was, nothing half-written is left")
    return INTERRUPTED


_UNFIT_PLACE = {errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG}
"""What a file system says of a place that is not what it should be; never of our own doing."""


def _translate(err: Exception) -> LoraTuneError:
    """Typer's own complaints are usage errors, a full disk is one anywhere; anything else is our bug, and says so."""
    if hasattr(err, "format_message") and hasattr(err, "exit_code"):
        context = getattr(err, "ctx", None)
        where = context.command_path if context is not None else "lora-tune"
        return UsageError(str(err.format_message()), hint=f"`{where} --help` shows what it takes")
    if isinstance(err, OSError) and err.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
        return CannotWriteError(
            f"{err.strerror}: {err.filename or 'a temporary file'}", hint="free some space there, then run it again"
        )
    if isinstance(err, OSError) and err.filename and err.errno in _UNFIT_PLACE:
        return CannotWriteError(
            f"{err.strerror}: {err.filename}", hint="make that place what it was, or give another place"
        )
    return LoraTuneError(
        f"{type(err).__name__}: {err}",
        hint="this is a bug of lora_tune: please report it, with the output of the same command and --debug",
    )


if __name__ == "__main__":
    main()
