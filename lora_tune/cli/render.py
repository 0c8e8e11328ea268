"""Values → a terminal, a pipe or JSON. Results go to stdout, everything else to stderr; no meaning in colour alone."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from lora_tune.cli import ledger
from lora_tune.cli.visible import visible, visible_lines
from lora_tune.errors import LoraTuneError


class Talker(Protocol):
    """A conversation that can be continued."""

    @property
    def name(self) -> str:
        """What is talked to."""

    def answer(self, turns: list[dict[str, str]], *, max_tokens: int, temperature: float) -> Any:
        """Yield the answer's text piece by piece."""


def json_object(value: Any) -> None:
    """Print one JSON object, in ASCII; numbers that are not finite become null, so that every reader can read it."""
    print(json.dumps(plain(value), allow_nan=False))


def note(message: str) -> None:
    """Say something on stderr; it keeps its lines, and nothing else in it acts on the terminal."""
    print(_harmless(message), file=sys.stderr)


def error(err: LoraTuneError, *, as_json: bool) -> int:
    """Show an error and return its exit code."""
    if as_json:
        json_object({"error": err.as_dict()})
    else:
        note(f"error: {err.message}" + (f"\n\nhint: {err.hint}" if err.hint else ""))
    return err.exit_code


def coloured(stream: Any) -> bool:
    """Return whether colour is wanted: NO_COLOR and FORCE_COLOR decide, then whether it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def text(value: str, *, key: str, as_json: bool) -> None:
    """Print a text as it is."""
    if as_json:
        json_object({key: value})
    else:
        print(value, end="" if value.endswith("\n") else "\n")


def result(values: Mapping[str, Any], *, as_json: bool, title: str = "") -> None:
    """Print named values, nested ones indented."""
    if as_json:
        json_object(values)
        return
    if title:
        print(title)
    _print_values(values, indent=2 if title else 0)


def checked(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what `check` found."""
    if as_json:
        json_object({"ok": True, **found})
        return
    data, base = found["data"], found["base"]
    print(f"{found['recipe']} is right")
    print(f"  base    {base['name']} ({'on this machine' if base['on_this_machine'] else 'will be fetched'})")
    rows = f"{data['train_rows']:,} rows to train on, {data['held_out_rows']:,} held out"
    print(f"  data    {rows}; {ledger.format_in_words(data)}")
    if data["labels"]:
        print(f"  labels  {ledger.labels_in_words(data['labels'])}")
    print(f"  steps   {'known with --tokens' if found['steps'] is None else format(found['steps'], ',')}")
    if "batching" in found:
        print(f"  batches {found['batching']['chosen']}, {found['batching']['padding_share']:.1%} padding")
    if "page" in found:
        print(f"  page    {visible(found['page'])}")
    if "ledger" in found:
        for line in ledger.ledger_lines(found["ledger"], blocks=_draws_blocks(sys.stdout)):
            print(f"  {line}")
    for warning in found["warnings"]:
        note(f"warning: {warning}")


def preview(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print rows token by token; trained ones stand in brackets, and in colour where there is colour."""
    if as_json:
        json_object(found)
        return
    on, off = ("\x1b[30;42m", "\x1b[0m") if coloured(sys.stdout) else ("[", "]")
    for row in found["rows"]:
        trained = sum(token["trained"] for token in row["tokens"])
        print(
            f"{visible(row['where'])}: {len(row['tokens'])} tokens, {trained} trained (train_on: {found['train_on']})"
        )
        print(
            "".join(f"{on}{shown}{off}" if trained else shown for trained, shown in map(_shown, row["tokens"])) + "\n"
        )
    for line in ledger.set_lines(found["counts"]):
        print(line)
    if "page" in found:
        print(f"page: {visible(found['page'])}")


def evaluation(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print base beside adapter, and some answers."""
    if as_json:
        json_object(found)
        return
    print(f"{visible(found['data'])}: {ledger.counts_in_words(found['counts'])}")
    print_evaluation(found)
    for warning in found["warnings"]:
        note(f"warning: {warning}")


def recipes(rows: Sequence[Mapping[str, str]], *, as_json: bool) -> None:
    """Print the shipped recipes."""
    if as_json:
        json_object({"recipes": list(rows)})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['for']}")


def chat(talk: Talker, prompt: str | None, *, max_tokens: int, temperature: float, as_json: bool) -> None:
    """Answer one prompt, or every line of standard input as one conversation."""
    turns: list[dict[str, str]] = []
    asking = prompt is None and sys.stdin.isatty()
    if asking:
        note(f"talking to {talk.name}; an empty line or Ctrl-D ends it")
    while True:
        asked = prompt if prompt is not None else _ask(asking)
        if asked is None:
            break
        turns.append({"role": "user", "content": asked})
        answer = ""
        for piece in talk.answer(turns, max_tokens=max_tokens, temperature=temperature):
            answer += piece
            if not as_json:
                print(piece, end="", flush=True)
        turns.append({"role": "assistant", "content": answer})
        if not as_json:
            print(flush=True)
        if prompt is not None:
            break
    if as_json:
        json_object({"model": talk.name, "messages": turns, "answer": turns[-1]["content"] if turns else None})


def serving(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what is served where, and a first request to copy."""
    for warning in facts["warnings"]:
        note(f"warning: {warning}")
    if as_json:
        json_object(facts)
        sys.stdout.flush()
        return
    held = "" if facts["quantization"] == "none" else f", held in {facts['quantization']}"
    why = f" ({visible(facts['engine_why'])})" if facts["engine_why"] else ""
    print(f"engine   {facts['engine']}{why}")
    print(f"base     {visible(facts['base'])}{held}, {facts['max_context_tokens']:,} tokens of context")
    for adapter in facts["adapters"]:
        aliases = f", also as {', '.join(adapter['aliases'])}" if adapter["aliases"] else ""
        print(f"adapter  {adapter['id']}{aliases}: {_VERDICTS[adapter['verdict']]}")
    print(f"url      {facts['url']}" + ("/  (page), /v1 (OpenAI's API)" if facts["page"] else "/v1  (OpenAI's API)"))
    key = ' -H "Authorization: Bearer $LORA_TUNE_API_KEY"' if facts["needs_key"] else ""
    asked = {"model": facts["model"], "messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps(asked).replace("'", "\\u0027")
    print(f"try      curl {facts['url']}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()


_VERDICTS = {
    "equal": "answers as in training",
    "close": "answers close to how it did in training",
    "unverified": "unverified: it has no passport",
}


def _ask(asking: bool) -> str | None:
    if asking:
        print("> ", end="", file=sys.stderr, flush=True)
    while True:
        line = sys.stdin.readline()
        if not line or (asking and not line.strip()):
            return None
        if line.strip():
            return line.strip()


class Progress:
    """Says on stderr what takes long: a bar on a terminal, plain lines in a pipe."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._task: Any = None
        self._label = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bars

            words = TextColumn("{task.description}", markup=False)
            self._bars = Bars(BarColumn(20), TaskProgressColumn(), words, console=Console(stderr=True), transient=True)
            self._task = self._bars.add_task("", total=1.0)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, label: str, share: float) -> None:
        """Take note that `share` (0 to 1) of `label` is done."""
        if self._bars is not None:
            self._bars.update(self._task, description=_harmless(label), completed=share)
        elif label != self._label:
            note(f"{label} …")
        self._label = label

    @property
    def drawing(self) -> bool:
        """True on a terminal."""
        return self._bars is not None

    def note(self, message: str) -> None:
        """Say one line that stays."""
        if self._bars is not None:
            self._bars.console.print(_harmless(message), markup=False, highlight=False, soft_wrap=True)
        else:
            note(message)


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Print what was measured on held-out rows, base beside adapter, with some answers."""
    columns = [who for who in ("base", "adapter") if found.get(who)]
    print(f"{'held-out rows':<16}" + "".join(f"{who:>10}" for who in columns))
    for name, form in (("loss", ".4f"), ("perplexity", ".3f"), ("token_accuracy", ".1%"), ("exact_match", ".1%")):
        values = [found[who][name] for who in columns]
        if any(value is not None for value in values):
            shown = [format(value, form) if value is not None else "–" for value in values]
            rows = f"  of {found['adapter']['n_answers']} rows" if name == "exact_match" else ""
            print(f"{name.replace('_', ' '):<16}" + "".join(f"{value:>10}" for value in shown) + rows)
    for answer in found["answers"][:3]:
        print(f"  asked    {_one_line(answer['prompt'])}\n  expected {_one_line(answer['expected'])}")
        for who in columns:
            print(f"  {who:<8} {_one_line(answer[who])}")


def _print_values(values: Mapping[str, Any], *, indent: int) -> None:
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, Mapping):
            print(f"{' ' * indent}{key}")
            _print_values(value, indent=indent + 2)
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            print(f"{' ' * indent}{key}")
            for item in value:
                print(f"{' ' * (indent + 2)}{', '.join(f'{name} {_number(inner)}' for name, inner in item.items())}")
        else:
            shown = ", ".join(map(_number, value)) if isinstance(value, list | tuple) else _number(value)
            print(f"{' ' * indent}{key:<{width}}  {shown}")


def _number(value: object) -> str:
    return visible(f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value))


def _draws_blocks(stream: Any) -> bool:
    """Return whether the stream's encoding has block characters."""
    try:
        "█▏–⋮".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _shown(token: Mapping[str, Any]) -> tuple[bool, str]:
    return token["trained"], visible_lines(token["text"])


def _harmless(message: str) -> str:
    """Return the message with its own line breaks; what stands in it may be a stranger's text."""
    return "\n".join(visible(line) for line in message.split("\n"))


def _one_line(answer: str, limit: int = 110) -> str:
    flat = visible(" ".join(answer.split()))
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
