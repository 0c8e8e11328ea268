"""Changed copies of rows that keep their meaning: only what users say is changed, never an answer."""

import random
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from lora_tune.data.lint import SetLint, UsableRow, content_hash
from lora_tune.data.messages import Conversation, Message, PlainText
from lora_tune.recipe.schema import AugmentSection

_WORD = re.compile(r"(?<![\w@/.:-])[^\W\d_]{4,}(?![\w@/:-])")
"""Words that may get a typo: letters alone, not part of an address, a path or an identifier."""
_FINAL_MARKS = ".!?…"


@dataclass(frozen=True)
class Original:
    """A training row of which copies are made."""

    row: Conversation | PlainText
    place: int
    """Where it stands, packed."""
    times: int
    """How often it is trained in an epoch: so often its copies are made, each another."""


def augmented_rows(
    rows: Iterable[Original], lint: SetLint, section: AugmentSection, *, seed: int, held_out: Collection[int] = ()
) -> Iterator[UsableRow]:
    """Yield up to `copies` changed copies of each row; one that came out as another, or as a held-out row, is left out.

    Args:
        rows: the training rows; plain texts have no user message to change.
        lint: takes note of the copies.
        section: which changes, and how often.
        seed: the same seed gives the same copies, whatever rows stand before.
        held_out: content hashes of the rows that are measured on.
    """
    for original in rows:
        row = original.row
        if not isinstance(row, Conversation):
            continue
        known = {row.messages}
        for number in range(section.copies * original.times):
            chance = random.Random(f"augment {seed} {number} {row.as_json()}")  # noqa: S311 - variety, not a secret
            copy = vary(row, section, chance)
            if copy.messages in known:
                continue
            known.add(copy.messages)
            if content_hash(copy.as_json()) in held_out:
                lint.n_held_out += 1
            else:
                yield lint.usable(copy, original.place)


def vary(conversation: Conversation, section: AugmentSection, chance: random.Random) -> Conversation:
    """Return the conversation with its user messages changed as `chance` has it."""
    change_case = chance.random() < section.case and chance.choice((str.lower, str.upper, _capitalised))
    change_end = chance.random() < section.punctuation
    prompt = chance.choice(section.prompts) if section.prompts else "{prompt}"

    def changed(message: Message, *, first: bool) -> Message:
        words = message.content
        if first:
            words = prompt.replace("{prompt}", words)
        if section.typos:
            words = _WORD.sub(
                lambda found: _slip(found[0], chance) if chance.random() < section.typos else found[0], words
            )
        if change_end:
            words = _other_end(words, chance)
        if change_case:
            words = change_case(words)
        return replace(message, content=words)

    first_user = next(i for i, message in enumerate(conversation.messages) if message.role == "user")
    messages = tuple(
        changed(message, first=index == first_user) if message.role == "user" else message
        for index, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)


def _capitalised(words: str) -> str:
    return words[:1].upper() + words[1:]


def _slip(word: str, chance: random.Random) -> str:
    """Return the word with two letters swapped, one missing or one doubled; its first letter stays."""
    place = chance.randrange(1, len(word) - 1)
    kind = chance.choice(("swap", "drop", "double"))
    if kind == "swap":
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + ("" if kind == "drop" else word[place] * 2) + word[place + 1 :]


def _other_end(words: str, chance: random.Random) -> str:
    bare = words.rstrip()
    if bare.endswith(tuple(_FINAL_MARKS)):
        return bare.rstrip(_FINAL_MARKS) or words
    return bare + chance.choice((".", "!", " ."))
