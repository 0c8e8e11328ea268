"""The commands of `lora-tune adapters`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.cli import adapter_views, render
from lora_tune.cli.options import Adapter, Base, Debug, Json, Registry
from lora_tune.errors import RefusedError

adapters_app = typer.Typer(
    help="Adapters in the registry, or in a folder.", no_args_is_help=True, rich_markup_mode=None
)
Alias = Annotated[str, typer.Argument(help="A name that points to one version.")]
Name = Annotated[str | None, typer.Option("--name", help="Name in the registry; default the one it has.")]


@adapters_app.command("list")
def list_(registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:
    """List every adapter version in the registry, and the aliases that point to it."""
    from lora_tune.cli import adapter_verbs

    adapter_views.adapters(adapter_verbs.list_adapters(registry), as_json=as_json)


@adapters_app.command()
def inspect(adapter: Adapter, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what an adapter says about itself, after every check that needs no base."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.inspect(adapter, registry), as_json=as_json)


@adapters_app.command()
def verify(
    adapter: Adapter, base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Replay the adapter's golden probes on the base at hand; exit 0 only when it behaves as when it was trained."""
    from lora_tune.cli import adapter_verbs

    with render.Progress() as progress:
        result = adapter_verbs.verify(adapter, base=base, registry=registry, progress=progress)
    render.result(result, as_json=as_json)


@adapters_app.command()
def lint(adapter: Adapter, engine: Annotated[str, typer.Option("--for", help="vllm, sglang, llamacpp or peft.", show_default=False)],
         max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="What the server runs with (vLLM: --max-lora-rank).")] = None,
         registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Say whether another engine loads the adapter and answers as it was trained; exit 0 only if so, else 77."""
    from lora_tune.cli import adapter_verbs

    found = adapter_verbs.lint(adapter, engine=engine, max_rank=max_rank, registry=registry)
    adapter_views.portability(found, as_json=as_json)
    if found["verdict"] != "loads":
        raise typer.Exit(RefusedError.exit_code)


@adapters_app.command()
def promote(
    adapter: Adapter, alias: Alias = "prod", registry: Registry = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Point an alias to a version; whoever names the alias gets that version."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.promote(adapter, alias, registry), as_json=as_json)


@adapters_app.command()
def rollback(alias: Alias = "prod", registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:
    """Point an alias to the version that it pointed to before."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.rollback(alias, registry), as_json=as_json)


@adapters_app.command()
def remove(adapter: Adapter, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:
    """Remove a version (name@3) or an alias; refused while an alias points to the version."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.remove(adapter, registry), as_json=as_json)


@adapters_app.command("import")
def import_(path: Annotated[Path, typer.Argument(help="An adapter's folder, or a tar made by `adapters export`.", show_default=False)],
            name: Name = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Copy an adapter into the registry as the next version of its name, checked like any stranger's."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.import_(path, name, registry), as_json=as_json)


@adapters_app.command("export")
def export_(adapter: Adapter, out: Annotated[Path, typer.Argument(help="A new .tar file.", show_default=False)],
         registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write a version as a tar with digests, byte for byte the same every time."""
    from lora_tune.cli import adapter_verbs

    render.result(adapter_verbs.export_tar(adapter, out, registry), as_json=as_json)


@adapters_app.command()
def compose(  # noqa: PLR0913, PLR0917 - a command line
            adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]…", show_default=False)],
            name: Annotated[str, typer.Option("--name", help="Name of the new adapter.", show_default=False)],
            method: Annotated[str, typer.Option("--method", help="concat (exact, ranks add up), svd, ties or dare.")] = "concat",
            rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of the new adapter; not for concat.")] = None,
            density: Annotated[float, typer.Option("--density", help="Share of each change that ties and dare keep.")] = 0.5,
            seed: Annotated[int, typer.Option("--seed", min=0, help="Which entries dare drops.")] = 0,
            unverified: Annotated[bool, typer.Option("--allow-unverified", help="Take adapters without a passport too.")] = False,
            base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Make one adapter of several, measured against their exact weighted sum."""
    from lora_tune.cli import adapter_verbs

    plan: dict[str, Any] = {"method": method, "name": name, "rank": rank, "density": density, "seed": seed, "allow_unverified": unverified}  # fmt: skip
    with render.Progress() as progress:
        made = adapter_verbs.compose(adapters, plan=plan, base=base, registry=registry, progress=progress)
    adapter_views.derived(made, as_json=as_json)


@adapters_app.command()
def resize(adapter: Adapter, rank: Annotated[int, typer.Option("--rank", min=1, help="The new rank.", show_default=False)],
           name: Name = None, base: Base = None, registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write an adapter in another rank, and say how much of it that keeps."""
    from lora_tune.cli import adapter_verbs

    with render.Progress() as progress:
        made = adapter_verbs.resize(adapter, rank=rank, name=name, base=base, registry=registry, progress=progress)
    adapter_views.derived(made, as_json=as_json)


@adapters_app.command()
def fold(
    adapter: Adapter,
    name: Name = None,
    base: Base = None,
    registry: Registry = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an rsLoRA adapter as plain LoRA, exactly: for engines that do not know rsLoRA."""
    from lora_tune.cli import adapter_verbs

    with render.Progress() as progress:
        made = adapter_verbs.resize(adapter, rank=None, name=name, base=base, registry=registry, progress=progress)
    adapter_views.derived(made, as_json=as_json)


@adapters_app.command()
def push(adapter: Adapter, repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.", show_default=False)],
         public: Annotated[bool, typer.Option("--public", help="Make the repository public; default private.")] = False,
         dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files; the network is not touched.")] = False,
         branch: Annotated[str | None, typer.Option("--branch", help="Branch to commit to; default main.")] = None,
         registry: Registry = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Send an adapter with its model card and passport to the Hugging Face hub."""
    from lora_tune.cli import adapter_verbs

    sent = adapter_verbs.push(adapter, repo, public=public, dry_run=dry_run, branch=branch, registry=registry)
    render.result(sent, as_json=as_json)
