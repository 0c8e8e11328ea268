"""YAML 1.2 as data only: no anchors, aliases, tags, duplicate keys or `${…}`; every value keeps its line."""

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.tokens import DirectiveToken, DocumentStartToken

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
_DATA_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null")}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    field: str
    """Dotted path of the field, such as `lora.rank`; empty for the file as a whole."""

    line: int | None
    """Line in the recipe, counted from 1; None when the value came from `--set`, or the field is absent."""

    message: str
    """What is wrong with it."""

    missing: bool = False
    """True when the recipe is well-formed but names a file that is not there."""


@dataclass
class ClosedYaml:
    """A parsed document: plain values, the line of each, and all that was refused."""

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str) -> ClosedYaml:
    """Return the document in `text`; what is refused stands in `problems`, and nothing is ever executed."""
    document = ClosedYaml()
    if len(text.encode()) > MAX_BYTES:
        document.problems.append(Problem("", None, f"larger than {MAX_BYTES // 1024} KiB; a recipe is a short file"))
        return document
    try:
        document.problems += _directives(text) or _refused_syntax(YAML(typ="safe", pure=True), text)
        reader = YAML(typ="safe", pure=True)
        if not document.problems:
            root = reader.compose(text)
            document.value = None if root is None else _value(root, "", document, reader, depth=0)
    except RecursionError:
        document.problems.append(Problem("", None, f"nested deeper than {MAX_DEPTH} levels"))
    except MarkedYAMLError as err:
        line = err.problem_mark.line + 1 if err.problem_mark else None
        document.problems.append(Problem("", line, f"not valid YAML: {err.problem or err.context}"))
    except (YAMLError, ValueError) as err:
        document.problems.append(Problem("", None, f"not valid YAML: {str(err).splitlines()[0]}"))
    return document


def _directives(text: str) -> list[Problem]:
    """Look at the bare tokens before anything else: `%YAML 1.1` would make another language of what follows."""
    problems = []
    for token in YAML(typ="safe", pure=True).scan(text):
        if isinstance(token, DirectiveToken):
            line = token.start_mark.line + 1
            problems.append(Problem("", line, f"directive %{token.name}: a recipe is YAML 1.2 and has no directives"))
        elif isinstance(token, DocumentStartToken):
            break
    return problems


def _refused_syntax(reader: YAML, text: str) -> list[Problem]:
    """Look at the bare events first: an alias bomb must not be expanded, nor a tag looked up."""
    problems = []
    depth = 0
    for event in reader.parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            problems.append(Problem("", line, f"alias *{event.anchor}: write the value out; a recipe has no aliases"))
        elif getattr(event, "anchor", None):
            problems.append(Problem("", line, f"anchor &{event.anchor}: a recipe has no anchors"))
        if getattr(event, "tag", None) is not None:
            problems.append(Problem("", line, "an explicit tag (!…): a recipe is plain data"))
        depth += {"MappingStartEvent": 1, "SequenceStartEvent": 1, "MappingEndEvent": -1, "SequenceEndEvent": -1}.get(
            type(event).__name__, 0
        )
        if depth > MAX_DEPTH:
            return [*problems, Problem("", line, f"nested deeper than {MAX_DEPTH} levels")]
    return problems


def _value(node: Node, path: str, document: ClosedYaml, reader: YAML, *, depth: int) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        return _mapping(node, path, document, reader, depth=depth)
    if isinstance(node, SequenceNode):
        return [_value(item, f"{path}[{i}]", document, reader, depth=depth + 1) for i, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    if node.tag in _DATA_TAGS:
        return reader.constructor.construct_object(node)
    if re.search(r"\$\{", node.value):
        document.problems.append(
            Problem(path, node.start_mark.line + 1, "${…} is not replaced in a recipe; write the value, or use --set")
        )
    return node.value


def _mapping(node: MappingNode, path: str, document: ClosedYaml, reader: YAML, *, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            document.problems.append(Problem(path, line, "a key must be a plain word"))
            continue
        key = str(key_node.value)
        inner = f"{path}.{key}" if path else key
        if key in first_line:
            document.problems.append(Problem(inner, line, f"written twice; first on line {first_line[key]}"))
            continue
        first_line[key] = line
        document.lines[inner] = line
        values[key] = _value(value_node, inner, document, reader, depth=depth + 1)
    return values
