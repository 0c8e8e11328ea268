"""Write the smart-home demo data: spoken commands and the one JSON call each of them asks for.

Every row is a short chat. A "call" is a device, a room, an action and, for some actions, a number.
The calls are split before any sentence is written, so each held-out row asks for a call that
training never shows: the model has met the device, the room and the action, but not in this combination.

    python scripts/make_home_data.py           write recipes/data/home.jsonl and home.heldout.jsonl
    python scripts/make_home_data.py --check   exit 1 if the files differ from what would be written
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
SEED = 7
SYSTEM = "Reply with one JSON call."
TRAIN_ROWS_PER_SKILL = 24
HELDOUT_ROWS_PER_SKILL = 5

ROOMS = ("kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "nursery", "garage")

# What people put around an order ("{}" is the order) and around a hint such as "it's cold in here".
AROUND_ORDER = (
    "{}", "{}", "{}", "please {}", "{} please", "could you {}", "can you {}", "hey {}", "{} for me", "{} thanks",
    "would you {}", "ok now {}",
)  # fmt: skip
AROUND_HINT = ("{}", "{}", "{}", "hey {}", "sorry but {}", "hmm {}", "oh dear {}")


@dataclass(frozen=True)
class Call:
    """What the house should do."""

    device: str
    room: str
    action: str
    value: int | None = None

    def to_json(self) -> str:
        """The answer the model has to give, key order included."""
        fields: dict[str, str | int] = {"device": self.device, "room": self.room, "action": self.action}
        if self.value is not None:
            fields["value"] = self.value
        return json.dumps(fields)


@dataclass(frozen=True)
class Skill:
    """One thing a device can do, and the ways people ask for it."""

    device: str
    action: str
    orders: tuple[str, ...]
    hints: tuple[str, ...] = ()
    values: tuple[int | None, ...] = (None,)

    def calls(self) -> list[Call]:
        """Every call this skill allows."""
        return [Call(self.device, room, self.action, value) for room in ROOMS for value in self.values]

    def wordings(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every order and hint, each with what may be put around it."""
        return [(order, AROUND_ORDER) for order in self.orders] + [(hint, AROUND_HINT) for hint in self.hints]


SKILLS = (
    Skill(
        "lights", "on",
        ("turn on the ROOM lights", "switch the lights on in the ROOM", "light up the ROOM"),
        ("it's too dark in the ROOM", "i can't see a thing in the ROOM"),
    ),
    Skill(
        "lights", "off",
        ("turn off the ROOM lights", "switch the lights off in the ROOM", "kill the lights in the ROOM"),
        ("the lights are still burning in the ROOM", "nobody needs light in the ROOM any more"),
    ),
    Skill(
        "lights", "set",
        (
            "dim the ROOM lights to NUMBER percent", "set the lights in the ROOM to NUMBER percent",
            "put the ROOM lights at NUMBER percent",
        ),
        ("i'd like NUMBER percent light in the ROOM",),
        values=tuple(range(5, 100, 5)),
    ),
    Skill(
        "heating", "warmer",
        ("turn up the heating in the ROOM", "make the ROOM a bit warmer", "warm up the ROOM"),
        ("i'm freezing in the ROOM", "it's chilly in the ROOM"),
    ),
    Skill(
        "heating", "cooler",
        ("turn down the heating in the ROOM", "make the ROOM a bit cooler", "cool down the ROOM"),
        ("i'm melting in the ROOM", "it's far too hot in the ROOM"),
    ),
    Skill(
        "heating", "set",
        (
            "set the ROOM to NUMBER degrees", "heat the ROOM to NUMBER degrees",
            "keep the ROOM at NUMBER degrees",
        ),
        ("i want it to be NUMBER degrees in the ROOM",),
        values=tuple(range(15, 26)),
    ),
    Skill(
        "blinds", "open",
        ("open the ROOM blinds", "raise the blinds in the ROOM", "let some sun into the ROOM"),
        ("i'd love some daylight in the ROOM",),
    ),
    Skill(
        "blinds", "close",
        ("close the ROOM blinds", "lower the blinds in the ROOM", "shut the blinds in the ROOM"),
        ("the neighbours can see into the ROOM", "the sun is blinding me in the ROOM"),
    ),
    Skill(
        "speaker", "play",
        ("play some music in the ROOM", "put on a song in the ROOM", "start the music in the ROOM"),
        ("it's too quiet in the ROOM", "i feel like dancing in the ROOM"),
    ),
    Skill(
        "speaker", "stop",
        ("stop the music in the ROOM", "turn off the ROOM speaker", "silence the ROOM"),
        ("i can't hear myself think in the ROOM", "that's enough music in the ROOM"),
    ),
    Skill(
        "speaker", "set",
        (
            "set the ROOM speaker to volume NUMBER", "put the music in the ROOM at volume NUMBER",
            "change the volume in the ROOM to NUMBER",
        ),
        values=tuple(range(5, 100, 5)),
    ),
    Skill(
        "vacuum", "start",
        ("vacuum the ROOM", "send the vacuum to the ROOM", "clean the floor in the ROOM"),
        ("there are crumbs all over the ROOM", "the cat made a mess in the ROOM"),
    ),
    Skill(
        "timer", "set",
        (
            "set a NUMBER minute timer in the ROOM", "start a timer for NUMBER minutes in the ROOM",
            "put NUMBER minutes on the ROOM timer",
        ),
        values=tuple(range(2, 60)),
    ),
    Skill(
        "door", "lock",
        ("lock the ROOM door", "lock up the ROOM", "make sure the ROOM is locked"),
        ("i forgot to lock the ROOM",),
    ),
    Skill(
        "door", "unlock",
        ("unlock the ROOM door", "unlock the ROOM", "let the plumber into the ROOM"),
        ("i'm locked out of the ROOM", "i need to get into the ROOM"),
    ),
)  # fmt: skip


def plain(text: str) -> str:
    """Lower case, letters, digits and single spaces only: how two sentences are compared."""
    return " ".join(re.sub(r"[^a-z0-9 ]", "", text.lower()).split())


def split_calls(skill: Skill, turn: int, rng: random.Random) -> tuple[list[Call], list[Call]]:
    """Deal the calls of a skill into those for training and those held out.

    Every fourth call along the diagonals of the room x value table is held out, and the next skill
    starts one further on, so every room is left out equally often and hints at no particular device.
    """
    train, held_out = [], []
    for call in skill.calls():
        diagonal = ROOMS.index(call.room) + skill.values.index(call.value) + turn
        (train if diagonal % 4 else held_out).append(call)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def write_rows(skill: Skill, calls: list[Call], count: int, taken: set[str], rng: random.Random) -> list[dict]:
    """Write `count` chats that go round the calls and the wordings in turn, each with a sentence not in `taken`."""
    rows = []
    wordings = skill.wordings()
    for number in range(count):
        if number % len(wordings) == 0:
            rng.shuffle(wordings)
        call = calls[number % len(calls)]
        wording, frames = wordings[number % len(wordings)]
        bare = wording.replace("ROOM", call.room).replace("NUMBER", str(call.value))
        text = rng.choice([s for s in (frame.format(bare) for frame in frames) if plain(s) not in taken])
        taken.add(plain(text))
        rows.append(chat(text, call))
    return rows


def chat(text: str, call: Call) -> dict:
    """One row in the chat format."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": call.to_json()},
        ]
    }


def make_files() -> dict[str, str]:
    """The text of both files, by file name."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    train: list[dict] = []
    held_out: list[dict] = []
    for turn, skill in enumerate(SKILLS):
        seen, unseen = split_calls(skill, turn, rng)
        train += write_rows(skill, seen, TRAIN_ROWS_PER_SKILL, taken, rng)
        held_out += write_rows(skill, unseen, HELDOUT_ROWS_PER_SKILL, taken, rng)
    rng.shuffle(train)
    rng.shuffle(held_out)
    files = {"home.jsonl": train, "home.heldout.jsonl": held_out}
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


def main() -> int:
    """Write both files, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the smart-home demo data.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    stale = 0
    for name, text in make_files().items():
        path = DATA / name
        if not check:
            DATA.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path} ({text.count(chr(10))} rows)")
        elif not path.exists() or path.read_bytes() != text.encode():
            print(f"{path} is out of date", file=sys.stderr)
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
