"""Are exactly the assistant's words trained: in rows of our own, and in what a base's own chat template writes."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from lora_tune.data.dataset import as_examples
from lora_tune.data.messages import Conversation, Message
from lora_tune.data.rendering import LossMaskError
from lora_tune.data.tokens import IGNORE_INDEX, tokenize
from lora_tune.doctor.finding import Finding, bounded
from lora_tune.doctor.sample import END_OF_TURN, N_TRAINED, Sample, rows, tiny_tokenizer, tokenize_rows
from lora_tune.recipe.template import PLAIN_TEMPLATE

SPOKEN = (
    ("system", "You know the weather."),
    ("user", "Will it rain in Bergen tomorrow?"),
    ("assistant", "Yes, from noon on, eleven millimetres."),
    ("user", "Repeat after me: eleven millimetres."),
    ("assistant", "Certainly: eleven millimetres."),
)
"""What is asked of a base's own template; the user says some of the assistant's words."""

MAX_END_CHARS = 64
"""No template ends a turn with more than so many characters."""

_HINT = "do not train with this stack: it would train other words than the assistant's; install the tested versions"


def loss_mask(sample: Sample) -> Finding:
    """The tokens that reach the loss are those of the assistant's words and of their end-of-turn, in two templates."""
    wrong, n_tokens = 0, 0
    for template, write in ((None, _chatml), (PLAIN_TEMPLATE, _plain)):
        tokenizer = sample.tokenizer if template is None else tiny_tokenizer(template)
        examples = as_examples(tokenize_rows(sample.scratch(), tokenizer).train.rows)
        for example, turns in zip(examples, rows()[:N_TRAINED], strict=True):
            expected = _labels(tokenizer, example["input_ids"], write(turns))
            found = list(example["labels"])
            wrong += (
                sum(a != b for a, b in zip(found, expected, strict=True)) if len(found) == len(expected) else len(found)
            )
            n_tokens += len(found)
    detail = f"tokens of {n_tokens} whose label is not what the words of the rows say, in two chat templates"
    return bounded("loss mask", float(wrong), 0.0, detail, hint=_HINT)


def _chatml(turns: Iterable[dict[str, str]]) -> list[tuple[str, bool]]:
    """Return the text of a row in pieces, each with whether it is trained: what TEMPLATE writes, said once more by hand."""
    pieces = []
    for turn in turns:
        pieces.append((f"<|im_start|>{turn['role']}\n", False))
        pieces.append((turn["content"] + END_OF_TURN, turn["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def _plain(turns: Iterable[dict[str, str]]) -> list[tuple[str, bool]]:
    pieces = []
    for turn in turns:
        spoken = turn["role"] == "assistant"
        pieces.append((f"### {turn['role'].capitalize()}:\n", False))
        pieces.append((turn["content"] + (END_OF_TURN if spoken else ""), spoken))
        pieces.append(("\n\n", False))
    return pieces


def _labels(tokenizer: Any, ids: Sequence[int], pieces: Sequence[tuple[str, bool]]) -> list[int]:
    """Return the labels that these tokens must have; none if they do not read as the text.

    A token is trained where all of its characters are.
    """
    trained_chars = [on for text, on in pieces for _ in text]
    labels, start = [], 0
    for token in ids:
        end = start + len(tokenizer.decode([token]))
        labels.append(token if all(trained_chars[start:end]) and end > start else IGNORE_INDEX)
        start = end
    return labels if tokenizer.decode(list(ids)) == "".join(text for text, _ in pieces) else []


def base_template(tokenizer: Any, *, train_on: str = "assistant") -> Finding:
    """The base's own chat template lets exactly the assistant's words and their end-of-turn be trained."""
    name = "base's chat template"
    hint = "set data.chat_template to builtin:plain or to a template that ends each answer, and look at `lora-tune preview`"
    try:
        row, note = _tokenized(tokenizer, train_on)
    except LossMaskError as err:
        return Finding(name, "failed", f"rows in it cannot be trained on: {err.message}", hint=err.hint or hint)
    if train_on == "all":
        return Finding(name, "ok", "train_on: all trains whatever it writes, and it can be written", 0.0, 0.0)
    answers = [words for role, words in SPOKEN if role == "assistant"]
    runs = [
        tokenizer.decode([token for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for on, run in groupby(zip(row.input_ids, row.trained, strict=True), key=lambda pair: pair[1])
        if on
    ]
    expected = answers[-1:] if train_on == "last_assistant" else answers
    wrong = [text for text, words in zip(runs, expected, strict=False) if not _is_turn(text, words)]
    if wrong or len(runs) != len(expected):
        told = f"the trained tokens read {(wrong or runs)[:1]!r:.120}, not {expected[0]!r} and an end-of-turn"
        return Finding(name, "failed", told, float(len(wrong) or 1), 0.0, hint)
    ended = runs[-1][runs[-1].rindex(expected[-1]) + len(expected[-1]) :].strip()
    detail = f"trained runs that are not one answer and its end-of-turn ({ended!r}){note}"
    return Finding(name, "ok", detail, 0.0, 0.0)


def _is_turn(text: str, words: str) -> bool:
    """Return whether a run is the words once and then an end-of-turn, without another speaker's."""
    if text.count(words) != 1:
        return False
    before, after = text.split(words)
    others = [said for role, said in SPOKEN if role != "assistant"]
    return 0 < len(after.strip()) <= MAX_END_CHARS and not any(said in before + after for said in others)


def _tokenized(tokenizer: Any, train_on: str) -> tuple[Any, str]:
    """Return the row, and what had to be left out of it: some templates take no system message."""
    turns = tuple(Message(role, words) for role, words in SPOKEN)
    try:
        return tokenize(Conversation(turns, 1, "doctor"), tokenizer, train_on=train_on), ""
    except LossMaskError:
        row = tokenize(Conversation(turns[1:], 0, "doctor"), tokenizer, train_on=train_on)
        return row, "; it takes no system message"
