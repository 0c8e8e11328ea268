"""An adapter → a folder for `ollama create`: Modelfile, the base and the adapter as GGUF.

A chat template becomes a Go template only when it is made of constant texts between words: what stands between one role's
words and the next one's is measured on probes, and the result is compared with the trained template on conversations.

Source: ollama, template/template.go (what a template sees) and parser/parser.go (what a Modelfile keeps).
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.convert import AdapterOnBase, GgufDtype, Written
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.gguf_files import held_dtype, model_to_gguf, window_note, write_adapter_gguf
from lora_tune.adapter.gguf_words import template_begins_with_bos
from lora_tune.adapter.live import base_section
from lora_tune.adapter.manifest import AdapterManifest
from lora_tune.adapter.merge import write_trained_base
from lora_tune.data.messages import Message
from lora_tune.data.rendering import LossMaskError, render
from lora_tune.data.tokens import end_of_turn_ids, prompt_ids
from lora_tune.errors import RefusedError
from lora_tune.model.load import load_tokenizer
from lora_tune.model.resolve import Progress

BEGIN, END = "begin", "end"
_WAY_OUT = (
    "serve the adapter with `lora-tune serve`, or convert it with --to gguf and run llama.cpp with the base's template"
)
_PROBES = tuple((*first, *["user", "assistant"] * turns, "user") for first in ((), ("system",)) for turns in (0, 1, 2))
"""Orders of roles, each ending where the assistant is asked; one to three of the user's turns, with and without a system."""
_SAID = {
    "system": "You are terse. Use {{ .Role }} {% raw %} never; \"quote\" \\ it\nin two lines.",
    "user": "Café №1: what is 2 + 2 * 10?\n\n- {\"a\": [1, 23, 456]}\n- it's <b>bold</b> & $before",
    "assistant": "{\"answer\": 22}\nThat's all, 1234567 times — naïve.",
}  # fmt: skip
"""Words that a template or Ollama might treat otherwise than plain ones."""


@dataclass(frozen=True)
class ChatForm:
    """A chat template as constant texts between words."""

    between: Mapping[tuple[str, str], str]
    """(role before or `begin`, role after or `end`) → text; without `system` where the template refuses it."""
    begins_with_bos: bool
    """Whether the template begins with bos, which `between` leaves out: the engine writes it."""
    strips: bool
    """Whether the trained template takes white space off the ends of words, which Ollama does not."""
    stop: str
    """The token that ends the assistant's turn."""
    opening: str
    """What the model writes itself before the words of its answer."""

    @property
    def takes_system(self) -> bool:
        """Whether a system message may come first."""
        return (BEGIN, "system") in self.between


def write_ollama(on_base: AdapterOnBase, stage: Path, progress: Progress, *, dtype: GgufDtype | None) -> Written:
    """Write `Modelfile`, `base.gguf` and `adapter.gguf` into `stage`.

    `base.gguf` is what the adapter was trained on: of a quantized base, its weights quantized and dequantized again.

    Raises:
        RefusedError: the chat template is not made of constant texts between words, or llama.cpp does not run the base
            as transformers does (exit 77).
    """
    manifest, base = on_base.files.manifest, on_base.base
    own_template = manifest.tokenizer.own_template if manifest else None
    tokenizer = load_tokenizer(base, template_text=own_template)
    if own_template is not None:
        tokenizer = fence_template(tokenizer)
    form = chat_form(tokenizer)
    template = go_template(form)
    system = manifest.data.system_message if manifest else None
    compared = check_template(tokenizer, form, template, system)
    write_adapter_gguf(on_base, stage / "adapter.gguf")
    chosen = dtype or held_dtype(base.folder)
    progress(f"writing the base as {chosen} GGUF", 0.6)
    held = manifest.base.quantization if manifest else "none"
    if held == "none":
        model_to_gguf(base.folder, stage / "base.gguf", dtype=chosen, tokenizer=tokenizer)
    else:
        with tempfile.TemporaryDirectory(dir=stage) as folder:
            write_trained_base(base_section(on_base.files, str(base.folder)), base, Path(folder), progress)
            model_to_gguf(Path(folder), stage / "base.gguf", dtype=chosen, tokenizer=tokenizer)
    (stage / "Modelfile").write_text(modelfile(form, template, system), encoding="utf-8")
    trained = "" if held == "none" else f" as it was while training: {held}, dequantized"
    notes = [f"base.gguf holds the base in {chosen}{trained}"]
    if window := window_note(base.folder):
        notes.append(window)
    if form.strips:
        notes.append(
            "the trained template strips white space around messages, which Ollama does not: send them stripped"
        )
    if form.opening:
        notes.append(f"the model begins each answer with {ascii(form.opening)[:80]}, which Ollama shows")
    if not form.takes_system:
        notes.append("the trained template has no system message; Ollama leaves one out")
    return Written(
        checks=(f"the prompts of {compared} conversations are the trained template's, token for token",),
        notes=tuple(notes),
        next_command=f"ollama create {_model_name(manifest)} -f OUT/Modelfile",
    )


def chat_form(tokenizer: Any) -> ChatForm:
    """Return the chat template as constant texts between words.

    Raises:
        RefusedError: it is something else (exit 77).
    """
    between: dict[tuple[str, str], str] = {}
    for roles in _PROBES:
        try:
            found = _texts_between(tokenizer, roles)
        except LossMaskError as err:
            if "system" in roles:
                continue
            raise _no_form(str(err)) from err
        for pair, text in zip(zip((BEGIN, *roles), (*roles, END), strict=True), found, strict=True):
            if between.setdefault(pair, text) != text:
                raise _no_form(f"what it writes between {pair[0]} and {pair[1]} depends on where they stand")
    if (BEGIN, "system") in between and ("system", "user") not in between:
        raise _no_form("it takes a system message at some places only")
    has_bos = bool(template_begins_with_bos(tokenizer))
    if has_bos:
        bos = str(tokenizer.bos_token)
        between = {pair: text.removeprefix(bos) if pair[0] == BEGIN else text for pair, text in between.items()}
    return ChatForm(between, has_bos, _strips(tokenizer), _stop(tokenizer), _opening(tokenizer))


def go_template(form: ChatForm) -> str:
    """Return the form as a Go template over Ollama's `.Messages`; every text is a quoted constant, so nothing is trimmed."""
    lines = ['{{- $before := "begin" -}}', "{{- range .Messages -}}"]
    if not form.takes_system:
        lines.append('{{- if ne .Role "system" -}}')
    asked = form.between["user", END]
    for number, ((before, role), text) in enumerate((p, t) for p, t in form.between.items() if p[1] != END):
        lines.append(f'{{{{- {"else " * (number > 0)}if and (eq $before "{before}") (eq .Role "{role}") -}}}}')
        lines.append(f"{{{{- {_quoted(text)} -}}}}")
    lines += ["{{- end -}}", "{{- .Content -}}", "{{- $before = .Role -}}"]
    if not form.takes_system:
        lines.append("{{- end -}}")
    lines += ["{{- end -}}", '{{- if eq $before "user" -}}', f"{{{{- {_quoted(asked)} -}}}}", "{{- end -}}"]
    return "\n".join(lines)


def modelfile(form: ChatForm, template: str, system: str | None) -> str:
    """Return the Modelfile: the two GGUF files beside it, the template, where to stop, the system message of training."""
    lines = [
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        f'TEMPLATE """{template}"""',
        f'PARAMETER stop "{form.stop}"',
    ]
    if system is not None and form.takes_system:
        lines.append(f'SYSTEM """{_kept(system)}"""')
    return "\n".join(lines) + "\n"


def check_template(tokenizer: Any, form: ChatForm, template: str, system: str | None) -> int:
    """Compare the Go template with the trained one, token for token, and return the number of conversations.

    Raises:
        RefusedError: a conversation's tokens differ (exit 77).
    """
    bos = [tokenizer.bos_token_id] if form.begins_with_bos else []
    compared = 0
    for roles in _PROBES:
        if "system" in roles and not form.takes_system:
            continue
        for said in (_SAID, _SAID | {"system": system or "Be brief."}):
            turns = [(role, f"{said[role]} ({number})") for number, role in enumerate(roles)]
            turns = [(role, said[role]) if role == "system" else (role, words) for role, words in turns]
            if form.strips:
                turns = [(role, words.strip()) for role, words in turns]
            wanted = prompt_ids(tokenizer, [Message(role, words) for role, words in turns])
            found = [*bos, *tokenizer(render_go(template, turns), add_special_tokens=False)["input_ids"]]
            if found != wanted:
                raise _no_form(f"for the roles {', '.join(roles)} it writes other tokens than its plain form would")
            compared += 1
    return compared


def render_go(template: str, turns: Sequence[tuple[str, str]]) -> str:
    """Return what Go's text/template makes of the template: only of the statements that `go_template` writes.

    Args:
        template: actions that trim the white space around them, and nothing else.
        turns: (role, words).
    """
    actions = _actions(template)
    out: list[str] = []
    scope = {"$before": "", ".Role": "", ".Content": ""}

    def run(start: int, stop: int) -> None:
        at = start
        while at < stop:
            action = actions[at]
            if action == "range .Messages":
                last = _closing(actions, at)
                for role, words in turns:
                    scope.update({".Role": role, ".Content": words})
                    run(at + 1, last)
                at = last
            elif action.startswith("if "):
                at = branch(at)
            elif assigned := re.fullmatch(r"(\$before) :?= (.+)", action):
                scope[assigned[1]] = _operand(assigned[2], scope)
            else:
                out.append(_operand(action, scope))
            at += 1

    def branch(at: int) -> int:
        last, taken = _closing(actions, at), False
        while actions[at] != "end":
            following = _closing(actions, at, at_else=True)
            if not taken and _holds(actions[at].removeprefix("else ").removeprefix("if "), scope):
                taken = True
                run(at + 1, following)
            at = following
        return last

    run(0, len(actions))
    return "".join(out)


def _model_name(manifest: AdapterManifest | None) -> str:
    """Return the adapter's name where it is one that Ollama and a shell take, and a plain one otherwise."""
    taken = manifest is not None and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", manifest.name)
    return manifest.name if manifest is not None and taken else "my-adapter"


def _texts_between(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """Return what the template writes before, between and after the words of these roles."""
    words = [f"w{number}q7x" for number in range(len(roles))]
    messages = [Message(role, word) for role, word in zip(roles, words, strict=True)]
    rest, texts = render(tokenizer, messages, add_generation_prompt=True), []
    for word in words:
        if rest.count(word) != 1:
            raise _no_form("it leaves words out, or writes them twice")
        text, _, rest = rest.partition(word)
        texts.append(text)
    if any(word in text for word in words for text in texts):
        raise _no_form("it writes words in another order")
    return [*texts, rest]


def _strips(tokenizer: Any) -> bool:
    text = render(tokenizer, [Message("user", "\n w0q7x \n")], add_generation_prompt=True)
    return "\n w0q7x \n" not in text


def _opening(tokenizer: Any) -> str:
    turn = [Message("user", "w0q7x"), Message("assistant", "w1q7x")]
    asked = render(tokenizer, turn[:1], add_generation_prompt=True)
    # That the finished turn begins with the prompt is what `_stop` has found out.
    return render(tokenizer, turn).removeprefix(asked).partition("w1q7x")[0]


def _stop(tokenizer: Any) -> str:
    try:
        (number,) = end_of_turn_ids(tokenizer)
    except (LossMaskError, ValueError) as err:
        raise _no_form(f"it does not end the assistant's turn with a token: {err}") from err
    token = str(tokenizer.convert_ids_to_tokens(number))
    if number not in tokenizer.all_special_ids and number not in tokenizer.added_tokens_decoder:
        raise _no_form("it ends the assistant's turn with a common word")
    if '"' in token or not token.isprintable():
        raise _no_form(f"its end of turn {ascii(token)[:40]} cannot be written into a Modelfile")
    return token


def _kept(system: str) -> str:
    """Return the system message when a Modelfile keeps it: it drops what cannot be printed, and ends at three quotes."""
    kept = all(char.isprintable() or char in "\n\t" for char in system)
    if not kept or '"""' in system or system.endswith('"'):
        raise RefusedError(
            "the system message that the adapter was trained with cannot be written into a Modelfile: it holds three "
            "quotes (or ends with one) or characters that Ollama drops",
            hint=_WAY_OUT,
        )
    return system


def _no_form(reason: str) -> RefusedError:
    return RefusedError(
        f"the chat template cannot be written as Ollama's: {reason}",
        hint=_WAY_OUT,
        where="tokenizer.chat_template",
    )


def _quoted(text: str) -> str:
    """Return the text as a Go string in ASCII, which a Modelfile keeps as it is."""
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}

    def one(char: str) -> str:
        if char in named:
            return named[char]
        if " " <= char <= "~":
            return char
        return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"

    return '"' + "".join(map(one, text)) + '"'


_ACTION = re.compile(r'\s*\{\{- ((?:"(?:[^"\\]|\\.)*"|[^"{}])+) -\}\}\s*')


def _actions(template: str) -> list[str]:
    """Return the statements between `{{-` and `-}}`; outside of them there is white space only, which Go trims."""
    actions, at = [], 0
    while at < len(template):
        match = _ACTION.match(template, at)
        assert match is not None, template[at : at + 40]
        actions.append(match[1])
        at = match.end()
    return actions


def _closing(actions: Sequence[str], at: int, *, at_else: bool = False) -> int:
    """Return where the block that opens at `at` ends, or has its next `else`."""
    depth = 0
    for position in range(at + 1, len(actions)):
        action = actions[position]
        if depth == 0 and (action == "end" or (at_else and action.startswith("else "))):
            return position
        depth += action.startswith(("if ", "range ")) - (action == "end")
    raise AssertionError("a block without an end")


def _holds(condition: str, scope: Mapping[str, str]) -> bool:
    """Return whether `eq a b`, `ne a b` or `and (…) (…)` holds."""
    if both := re.fullmatch(r"and \((.+?)\) \((.+?)\)", condition):
        return _holds(both[1], scope) and _holds(both[2], scope)
    how, left, right = condition.split(" ")
    return (_operand(left, scope) == _operand(right, scope)) == (how == "eq")


def _operand(text: str, scope: Mapping[str, str]) -> str:
    """Return a variable's or field's value, or a quoted text's."""
    if text in scope:
        return scope[text]
    escapes = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(
        r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))",
        lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else escapes.get(m[3], m[3]),
        text[1:-1],
    )
