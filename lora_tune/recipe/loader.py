"""YAML + `--set` → a checked, frozen Recipe; every problem at once, each with its field, line and a suggestion."""

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from lora_tune.errors import LoraTuneError, MissingInputError, RecipeError, UsageError
from lora_tune.recipe.closed_yaml import ClosedYaml, Problem, parse
from lora_tune.recipe.conflicts import EXPECTED, conflicts
from lora_tune.recipe.schema import BUILTIN_BASES, BUILTIN_TEMPLATES, SECTIONS, MixedSet, Recipe, Section
from lora_tune.recipe.template import read_template

_FROM_SET = 0
"""Stands for a line number where the value came from `--set`."""

_PATH_FIELDS = (("data", "path"), ("data", "eval_path"), ("data", "chat_template"))
HUB = "hub:"
"""Begins the path of a dataset on a hub."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe and where it came from."""

    recipe: Recipe
    """Every setting, defaults filled in, file paths absolute."""

    path: Path
    """The file it was read from."""

    text: str
    """The file as written."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the checked recipe in `path`, with `section.key=value` overrides on top.

    Raises:
        MissingInputError: the recipe, or a file it names, is not there (exit 66).
        RecipeError: anything else is wrong; the message lists all of it (exit 65).
    """
    text = _read(path)
    document = parse(text)
    problems = list(document.problems)
    values = document.value
    if not problems and not isinstance(values, dict):
        problems.append(Problem("", None, "empty, or not a mapping of sections: base, data, lora, train, eval, output"))
    if not problems or isinstance(values, dict):
        sections = values if isinstance(values, dict) else {}
        unread = _apply_overrides(sections, overrides, document)
        problems += unread
        recipe, found = _validate(sections, document.lines)
        problems += [problem for problem in found if problem.field not in {bad.field for bad in unread}]
        recipe, found = _resolve_paths(recipe, path.parent, document.lines)
        problems += found
        if not problems:
            assert recipe is not None
            return LoadedRecipe(recipe=recipe, path=path, text=text)
    raise _report(path, problems)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out; loading it gives an equal recipe."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data for a passport: folders of this machine are left out of its paths."""
    values = recipe.model_dump(mode="json")
    for section, key in (*_PATH_FIELDS, ("base", "name")):
        value = values[section][key]
        if value is not None and Path(value).is_absolute():
            values[section][key] = Path(value).name
    for part in values["data"]["mix"]:
        if Path(part["path"]).is_absolute():
            part["path"] = Path(part["path"]).name
    return values


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as err:
        raise RecipeError(f"{path} is not UTF-8 text (byte {err.start})", where=str(path)) from err
    except IsADirectoryError as err:
        raise MissingInputError(f"{path} is a folder, not a recipe", where=str(path)) from err
    except OSError as err:
        raise MissingInputError(
            f"no recipe at {path} ({err.strerror})",
            hint="`lora-tune recipes ls` lists those that ship; `lora-tune recipes cp NAME FILE` copies one",
            where=str(path),
        ) from err


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], document: ClosedYaml) -> list[Problem]:
    problems = []
    for override in overrides:
        field, equals, text = override.partition("=")
        section, dot, key = field.strip().partition(".")
        if not equals or not section or (dot and not key):
            raise UsageError(f"--set {override}: expected section.key=value", hint="for example --set lora.rank=8")
        parsed = parse(text)
        if parsed.problems:
            problems.append(Problem(field.strip(), _FROM_SET, parsed.problems[0].message))
            continue
        target = values
        if dot:
            inner = values.get(section)
            if not isinstance(inner, dict):
                inner = values[section] = {}
            target = inner
        target[key if dot else section] = parsed.value
        document.lines[f"{section}.{key}" if dot else section] = _FROM_SET
    return problems


def _validate(values: Mapping[str, Any], lines: Mapping[str, int]) -> tuple[Recipe | None, list[Problem]]:
    """Check each section on its own, so that one mistake never hides another."""
    problems = [
        Problem(key, lines.get(key), f"unknown section{_did_you_mean(key, ['version', *SECTIONS])}")
        for key in values
        if key not in SECTIONS and key != "version"
    ]
    version = values.get("version", 1)
    if type(version) is not int or version != 1:  # true and 1.0 equal 1 too
        problems.append(Problem("version", lines.get("version"), f"found {version!r}; this tool reads version 1"))
    sections: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        given = values.get(name)
        if given is None:
            given = {}
        if not isinstance(given, dict):
            problems.append(
                Problem(name, lines.get(name), f"found {given!r}; expected settings: {', '.join(section.model_fields)}")
            )
            given = {}
        checked, found = _validate_section(name, section, given, lines)
        problems += found
        if checked is not None:
            sections[name] = checked
    if len(sections) < len(SECTIONS):
        return None, problems
    recipe = Recipe(version=1, **sections)  # type: ignore[arg-type]
    broken = {problem.field.partition("[")[0] for problem in problems}
    for field, message in conflicts(recipe):
        if field != "data.path" or not broken & {
            "data.path",
            "data.mix",
        }:  # a set that is wrong is not a set that is missing
            problems.append(Problem(field, lines.get(field), message + _way_out(recipe, field, lines)))
    return recipe, problems


def _way_out(recipe: Recipe, field: str, lines: Mapping[str, int]) -> str:
    """Return what to add to a `--set` that names the rows beside a recipe that names others."""
    if field != "data.path" or not recipe.data.mix:
        return ""
    from_set = {key for key in ("data.path", "data.mix") if lines.get(key) == _FROM_SET}
    other = {"data.mix": "data.path=null", "data.path": "data.mix=[]"}
    return f"; add `--set {other[from_set.pop()]}`" if len(from_set) == 1 else ""


def _validate_section(
    name: str, section: type[Section], given: dict[str, Any], lines: Mapping[str, int]
) -> tuple[Section | None, list[Problem]]:
    try:
        return section.model_validate(given), []
    except ValidationError as err:
        problems, wrong = [], set()
        for detail in err.errors(include_url=False):
            key = str(detail["loc"][0])
            field = f"{name}.{key}"
            if key == "mix" and len(detail["loc"]) > 1:
                wrong.add(key)
                problems.append(_mix_problem(detail, lines.get(field, lines.get(name))))
                continue
            if key in wrong:
                continue  # a union reports once per member
            wrong.add(key)
            problems.append(
                Problem(
                    field,
                    lines.get(field, lines.get(name)),
                    _explain(section, field, detail),
                )
            )
    # Keep what is right, so that settings that cannot go together are still found.
    try:
        return section.model_validate({key: value for key, value in given.items() if key not in wrong}), problems
    except ValidationError:
        return None, problems


def _mix_problem(detail: Any, line: int | None) -> Problem:
    """Name the set of data.mix and its setting."""
    number = detail["loc"][1] + 1
    if len(detail["loc"]) == 2:
        return Problem(f"data.mix[{number}]", line, f"found {detail['input']!r}; expected {EXPECTED['data.mix[]']}")
    key = str(detail["loc"][2])
    if detail["type"] == "extra_forbidden":
        message = f"unknown key{_did_you_mean(key, list(MixedSet.model_fields))}"
    elif detail["type"] == "missing":
        message = f"is required: {MixedSet.model_fields[key].description}"
    else:
        message = _wrong_value(f"data.{key}", detail)
    return Problem(f"data.mix[{number}].{key}", line, message)


def _explain(section: type[Section], field: str, detail: Any) -> str:
    key = field.partition(".")[2]
    if detail["type"] == "extra_forbidden":
        owners = [name for name, other in SECTIONS.items() if key in other.model_fields]
        if owners:
            return f"unknown key here; it belongs to section `{owners[0]}`"
        return f"unknown key{_did_you_mean(key, list(section.model_fields))}"
    if detail["type"] == "missing":
        return f"is required: {section.model_fields[key].description}"
    return _wrong_value(field, detail)


def _wrong_value(field: str, detail: Any) -> str:
    """Say what was found and what was expected, with the choice that was meant."""
    value, message = detail["input"], detail["msg"]
    if field in EXPECTED and "too_" not in detail["type"]:
        return f"found {value!r}; expected {EXPECTED[field]}"
    expected = message.replace("Tuple", "List")[0].lower() + message.replace("Tuple", "List")[1:]
    if isinstance(value, str) and detail["type"] == "literal_error":
        choices = [
            part.strip("' ") for part in message.removeprefix("Input should be ").replace(" or ", ", ").split(",")
        ]
        return f"found {value!r}; {expected}{_did_you_mean(value, choices)}"
    return f"found {value!r}; {expected}"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(known)}"


def _resolve_paths(
    recipe: Recipe | None, folder: Path, lines: Mapping[str, int]
) -> tuple[Recipe | None, list[Problem]]:
    """Make file paths absolute (they are relative to the recipe) and name those that are not there."""
    if recipe is None:
        return None, []
    problems = []
    changed: dict[str, Section] = {}
    for name, key in (*_PATH_FIELDS, ("base", "name")):
        value = getattr(getattr(recipe, name), key)
        if value is None:
            continue
        field = f"{name}.{key}"
        found = _base_place(value, folder) if name == "base" else _file_place(value, folder, key)
        if isinstance(found, _NoPlace):
            problems.append(Problem(field, lines.get(field), found.reason, missing=found.missing))
        elif found != value:
            changed[name] = changed.get(name, getattr(recipe, name)).model_copy(update={key: found})
    mix = []
    for part in recipe.data.mix:
        found = _file_place(part.path, folder, "path")
        if isinstance(found, _NoPlace):
            problems.append(Problem("data.mix", lines.get("data.mix"), found.reason, missing=found.missing))
        else:
            mix.append(part.model_copy(update={"path": found}))
    if mix:
        changed["data"] = changed.get("data", recipe.data).model_copy(update={"mix": tuple(mix)})
    return recipe.model_copy(update=changed), problems


@dataclass(frozen=True)
class _NoPlace:
    """Why a path or name of the recipe leads nowhere."""

    reason: str
    missing: bool
    """True when it is well-formed and only not there."""


def _file_place(value: str, folder: Path, key: str) -> str | _NoPlace:
    """Return the absolute path of a file, or of a folder of rows; a template is read too, since that is cheap here."""
    builtin = key == "chat_template" and value.startswith("builtin:")
    if builtin and value not in BUILTIN_TEMPLATES:
        return _NoPlace(f"no built-in template {value!r}{_did_you_mean(value, BUILTIN_TEMPLATES)}", missing=False)
    if builtin or (key != "chat_template" and value.startswith(HUB)):
        return value
    try:
        full = _absolute(value, folder)
        if not full.is_file() and (key == "chat_template" or not full.is_dir()):
            return _NoPlace(f"no file at {full}", missing=True)
        if key == "chat_template":
            read_template(str(full))
    except (OSError, RuntimeError) as err:
        return _NoPlace(_unusable(value, err), missing=True)
    except LoraTuneError as err:
        return _NoPlace(err.message, missing=isinstance(err, MissingInputError))
    return str(full)


def _base_place(value: str, folder: Path) -> str | _NoPlace:
    """Return a local base's absolute path; a hub id and a built-in stay as they are."""
    if value.startswith("builtin:"):
        if value not in BUILTIN_BASES:
            return _NoPlace(f"no built-in base {value!r}{_did_you_mean(value, BUILTIN_BASES)}", missing=False)
        return value
    try:
        local = _absolute(value, folder)
        if not value.endswith(".gguf") and not value.startswith((".", "/", "~")) and not local.is_dir():
            return value
        return str(local) if local.exists() else _NoPlace(f"nothing at {local}", missing=True)
    except (OSError, RuntimeError) as err:
        return _NoPlace(_unusable(value, err), missing=True)


def _unusable(value: str, err: OSError | RuntimeError) -> str:
    shown = value if len(value) <= 100 else f"{value[:100]}…"
    return f"{shown!r} is no usable path: {err.strerror if isinstance(err, OSError) else err}"


def _absolute(value: str, folder: Path) -> Path:
    return Path(folder.resolve(), Path(value).expanduser())


def _place(problem: Problem) -> str:
    if problem.line == _FROM_SET:
        return "--set "
    return f"line {problem.line}: " if problem.line else ""


def _report(path: Path, problems: Sequence[Problem]) -> RecipeError | MissingInputError:
    ordered = sorted(problems, key=lambda p: (not p.line, p.line or 0))
    shown = [f"  {_place(p)}{p.field + ': ' if p.field else ''}{p.message}" for p in ordered]
    count = f"{len(ordered)} problem{'s' if len(ordered) != 1 else ''}"
    first = next((p.line for p in ordered if p.line), None)
    kind = MissingInputError if all(p.missing for p in ordered) else RecipeError
    return kind(
        f"{path}: {count}\n" + "\n".join(shown),
        hint="correct the recipe; docs/reference/recipe.md explains every setting (`lora-tune schema` for editors)",
        where=f"{path}:{first}" if first else str(path),
    )
