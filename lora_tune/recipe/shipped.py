"""The recipes that ship: their list, their texts, and copies to start one's own from."""

import difflib
import sys
from pathlib import Path

from lora_tune.errors import CannotCreateError, MissingInputError
from lora_tune.recipe.loader import load_recipe


def recipes_folder() -> Path:
    """Return where the shipped recipes are."""
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lora_tune" / "recipes"


def list_recipes() -> list[dict[str, str]]:
    """Return name and purpose (its header's first line) of each shipped recipe."""
    folder = recipes_folder()
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        header = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        found.append({"name": path.relative_to(folder).with_suffix("").as_posix(), "for": header})
    return found


def read_recipe(name: str) -> str:
    """Return a shipped recipe's text."""
    return _path(name).read_text(encoding="utf-8")


def copy_recipe(name: str, file: Path) -> list[Path]:
    """Copy a shipped recipe to `file`, and the demo rows it names to `data/` beside it; return what was written.

    Raises:
        CannotCreateError: something else is there already, or the place cannot be written (exit 73).
    """
    source = _path(name)
    recipe = load_recipe(source).recipe
    text = source.read_text(encoding="utf-8").replace("../data/", "data/")
    rows = [Path(path) for path in (recipe.data.path, recipe.data.eval_path) if path is not None]
    wanted = {file: text.encode()} | {file.parent / "data" / row.name: row.read_bytes() for row in rows}
    try:
        missing = {
            path: content for path, content in wanted.items() if not (path.is_file() and path.read_bytes() == content)
        }
        taken = [path for path in missing if path.exists()]
        if taken:
            raise CannotCreateError(f"{taken[0]} exists already and is never overwritten", hint="give another name")
        for path, content in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as err:
        raise CannotCreateError(
            f"cannot write {err.filename or file}: {err.strerror}", hint="give another place"
        ) from err
    return list(missing)


def _path(name: str) -> Path:
    known = [row["name"] for row in list_recipes()]
    wanted = name.removesuffix(".yaml")
    matches = [known_name for known_name in known if wanted in (known_name, known_name.rsplit("/", 1)[-1])]
    if not matches:
        close = difflib.get_close_matches(wanted, known, n=1)
        raise MissingInputError(
            f"no recipe {name!r}{f'; did you mean {close[0]}?' if close else ''}",
            hint="`lora-tune recipes ls` lists them",
        )
    return recipes_folder() / f"{matches[0]}.yaml"
