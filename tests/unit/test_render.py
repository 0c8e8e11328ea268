"""What a terminal shows of the data: every loss is said, nothing is rounded away, and no row acts on the terminal."""

import io
import json
import re
import sys
import unicodedata
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.cli import ledger, render, train_view
from lora_tune.cli.app import main
from lora_tune.cli.visible import pieces, visible, visible_lines
from lora_tune.data.length import SetCounts
from lora_tune.errors import DataError

CLEAN = {field.name: 0 for field in fields(SetCounts)} | {
    "rows_read": 1200, "rows": 1200, "tokens": 50_000, "trained_tokens": 12_500, "answers": 1300, "longest_tokens": 99
}  # fmt: skip
LOSSES = ("rows_refused", "rows_cut", "rows_split", "rows_dropped", "trained_tokens_lost", "answers_without_end")


def _bins(rows, width=100, limit=10**9):
    return [
        {"tokens_from": n * width + 1, "tokens_to": (n + 1) * width, "rows": count, "too_long": n * width + 1 > limit}
        for n, count in enumerate(rows)
    ]


def _found(**data):
    """Return what `check --tokens` gives for one set."""
    return {
        "recipe": "r.yaml",
        "base": {"name": "some/base", "kind": "hub", "on_this_machine": True},
        "data": {
            "format": "chat", "detected": True, "train_rows": 1200, "held_out_rows": 30, "rows_left_out": 0, "labels": {}, **data
        },
        "steps": 75,
        "warnings": ["mind the gap"],
        "tokens": {"train": CLEAN},
        "ledger": {
            "counts": {"train": CLEAN},
            "sources": [{"source": "rows.jsonl", "rows": 1200, "rows_an_epoch": 1200}],
            "roles": {"user": {"tokens": 30_000, "trained": 0}, "assistant": {"tokens": 12_000, "trained": 11_999}},
            "tokens_by_row": {"train": _bins([5, 900, 295])},
            "tokenized": {"rows.jsonl": "tokenizer changed"},
            "digest": "ab" * 32,
        },
    }  # fmt: skip


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_share_is_never_rounded_to_nothing_or_to_all(part, whole):
    part = min(part, whole)
    shown = ledger.share(part, whole)
    assert (shown == "0%") == (part == 0)
    assert (shown == "100%") == (part == whole)
    value = float(shown.strip("<>%"))
    assert abs(value - 100 * part / whole) <= (0.1 if shown[0] in "<>" else 0.5) + 1e-9
    assert (shown[0] == "<") <= (100 * part / whole < value)
    assert (shown[0] == ">") <= (100 * part / whole > value)


def test_a_share_of_nothing_is_nothing():
    assert ledger.share(0, 0) == "0%"


def test_what_did_not_happen_is_not_mentioned():
    said = ledger.counts_in_words(CLEAN)
    assert said == "1,200 of 1,200 rows, 50,000 tokens, 12,500 trained (25%), longest row 99"


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_said_with_its_number(name):
    said = ledger.counts_in_words({**CLEAN, name: 4321})
    assert "4,321" in said
    assert said != ledger.counts_in_words(CLEAN)
    word = name.removeprefix("rows_").replace("trained_tokens_lost", "trained tokens lost").replace("_", " ")
    assert all(part in said for part in (word.split() if "answers" not in word else ["without their end"]))


def test_every_count_there_is_reaches_the_words():
    for field in fields(SetCounts):
        changed = {**CLEAN, "answers_without_end": 1, field.name: 7_654_321}
        assert "7,654,321" in ledger.counts_in_words(changed), field.name


def test_parts_of_split_rows_are_called_sequences():
    assert ledger.counts_in_words({**CLEAN, "rows": 1300, "rows_split": 90}).startswith(
        "1,300 sequences from 1,200 rows (90 split), "
    )


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 25), st.booleans())
def test_a_histogram_counts_every_row_once_in_few_lines(rows, limit_bin, blocks):
    lines = ledger.histogram_lines(_bins(rows, limit=limit_bin * 100), blocks=blocks)
    assert len(lines) <= 15  # about twelve bars, one more at the limit, and the header
    found = [
        re.match(r"\s*([\d,]+)[–-]([\d,]+)\s+([\d,]+)  (\S+)(  over the limit)?$", line) for line in lines[1:]
    ]  # fmt: skip
    bars = [match for match in found if match]
    assert sum(int(bar[3].replace(",", "")) for bar in bars) == sum(rows)
    for bar in bars:
        first, last = int(bar[1].replace(",", "")), int(bar[2].replace(",", ""))
        assert bool(bar[5]) == (first > limit_bin * 100)
        assert bar[5] or last <= max(limit_bin * 100, 100)
        assert int(bar[3].replace(",", "")) == sum(rows[(first - 1) // 100 : last // 100])
    assert blocks or all(line.isascii() for line in lines)


def test_the_longest_bar_is_the_commonest_length_and_one_row_is_still_seen():
    lines = ledger.histogram_lines(_bins([1, 10**6, 10**6 // 2]), blocks=False)[1:]
    drawn = [line.count("#") for line in lines]
    assert drawn[1] == 2 * drawn[2] > drawn[0] == 1


def test_sources_are_shown_only_when_there_is_something_to_say():
    one = {"source": "a.jsonl", "rows": 10, "rows_an_epoch": 10}
    assert ledger.source_lines([one]) == []
    assert any("30" in line for line in ledger.source_lines([{**one, "rows_an_epoch": 30}]))
    lines = ledger.source_lines([one, {"source": "b.jsonl", "rows": 40, "rows_an_epoch": 30}])
    assert [line.split() for line in lines[1:]] == [["a.jsonl", "10", "10", "25%"], ["b.jsonl", "40", "30", "75%"]]
    assert len({len(line) for line in lines[1:]}) == 1


def test_of_many_labels_the_commonest_and_the_rarest_are_named():
    labels = {f"l{n}": 100 - n for n in range(40)}
    said = ledger.labels_in_words(labels)
    assert said.startswith("40: l0 100, l1 99, ")
    assert said.endswith("rarest: l39 61")
    assert "l20" not in said
    assert ledger.labels_in_words({"yes": 2, "no": 5}) == "2: no 5, yes 2"


def test_a_terminal_sees_what_check_found(capsys):
    render.checked(_found(labels={"joy": 800, "fear": 400}), as_json=False)
    said = capsys.readouterr()
    for words in (
        "r.yaml is right", "some/base (on this machine)", "1,200 rows to train on, 30 held out; format chat (detected)",
        "2: joy 800, fear 400", "steps   75", "train: 1,200 of 1,200 rows", "101–200   900", "tokenizer changed",
    ):  # fmt: skip
        assert words in said.out, words
    assert ["assistant", "12,000", "11,999", ">99.9%"] in [line.split() for line in said.out.splitlines()]
    assert "source " not in said.out
    assert said.err == "warning: mind the gap\n"
    assert "\x1b" not in said.out


def test_rows_without_tokens_are_shown_too(capsys):
    found = _found(rows_left_out=3)
    del found["ledger"], found["tokens"]
    render.checked(found, as_json=False)
    assert "3 left out, since they cannot be used" in capsys.readouterr().out


def test_json_holds_everything(capsys):
    render.checked(_found(labels={"é": 1}), as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == {"ok": True, **_found(labels={"é": 1})}
    assert said.err == ""


def test_a_terminal_without_block_characters_gets_ascii(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    render.checked(_found(), as_json=False)
    assert "101-200   900  ####" in raw.getvalue().decode("ascii")


def test_a_character_that_the_terminal_lacks_is_no_failure(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with pytest.raises(SystemExit) as left:
        main(["recipes", "ls"])
    assert left.value.code == 0
    print("日")
    assert raw.getvalue().endswith(rb"\u65e5" + b"\n")


def test_a_run_says_what_became_of_its_data(capsys):
    found = _found()
    counts = {"train": {**CLEAN, "rows_dropped": 17}, "held_out": CLEAN}
    event = {"event": "data", **found["data"], **found["ledger"], "counts": counts, "warnings": ["mind the gap"]}
    train_view.TrainView(as_json=False).notify(event)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "data: format chat (detected)"
    assert lines[1].startswith("  train: 1,200 of 1,200 rows (17 dropped), ")
    assert lines[2].startswith("  held out: 1,200 of 1,200 rows, ")
    assert "  trained by role: user 0%, assistant >99.9%" in lines
    assert "  rows.jsonl was tokenized: tokenizer changed" in lines
    assert lines[-1] == "warning: mind the gap"
    event["tokenized"] = {"rows.jsonl": ledger.KEPT}
    train_view.TrainView(as_json=False).notify(event)
    assert "was tokenized" not in capsys.readouterr().err


def test_what_the_store_says_of_kept_tokens_is_what_is_left_unsaid():
    from pathlib import Path

    import lora_tune

    store = Path(lora_tune.__file__).parent / "data" / "store.py"
    assert f'"{ledger.KEPT}"' in store.read_text(encoding="utf-8")


def _acts(text):
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"]


@given(st.text(st.characters()))
def test_no_character_of_a_row_acts_on_the_page_or_the_terminal(text):
    assert _acts(visible(text)) == []
    assert set(_acts(visible_lines(text))) <= {"\n", "\t"}
    assert "".join(piece for is_sign, piece in pieces(text) if not is_sign) == "".join(
        c for c in text if not _acts(c)
    )  # fmt: skip
    assert sum(is_sign for is_sign, _ in pieces(text)) == len(_acts(text))


@pytest.mark.parametrize(("text", "shown"), [
    ("plain é 日本 👨‍👩‍👧", "plain é 日本 👨‍👩‍👧"), ("\x1b[31m", "␛[31m"), ("a\x00b", "a␀b"), ("\u202egnp", "⟨U+202E⟩gnp"),
    ("\x7f", "␡"), ("\x9b1m", "⟨U+009B⟩1m"), ("a\r\nb", "a␍⏎b"), ("\ufeffx", "⟨U+FEFF⟩x"), ("\U000e0041", "⟨U+E0041⟩"),
])  # fmt: skip
def test_acting_characters_stand_as_signs(text, shown):
    assert visible(text) == shown


def test_preview_marks_trained_tokens_and_lets_no_escape_through(capsys, monkeypatch):
    tokens = [
        {"id": 1, "text": "ask\x1b]0;owned\x07", "trained": False}, {"id": 2, "text": "yes\n", "trained": True},
        {"id": 3, "text": "<end>", "trained": True},
    ]  # fmt: skip
    found = {"rows": [{"where": "r:1", "tokens": tokens}], "counts": {"train": CLEAN}, "train_on": "assistant"}
    render.preview(found, as_json=False)
    said = capsys.readouterr().out
    assert "r:1: 3 tokens, 2 trained (train_on: assistant)" in said
    assert "ask␛]0;owned␇[yes⏎\n][<end>]" in said
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    render.preview(found, as_json=False)
    assert "\x1b[30;42m<end>\x1b[0m" in capsys.readouterr().out


def test_a_written_page_is_named(capsys):
    render.checked({**_found(), "page": "out/lint.html"}, as_json=False)
    assert "  page    out/lint.html\n" in capsys.readouterr().out


HOSTILE = "rows.jsonl:1: column \x1b[31mevil\x07\u202e\nsecond line"


def test_messages_keep_their_lines_and_nothing_in_them_acts_on_the_terminal(capsys):
    render.note(HOSTILE)
    render.error(DataError(HOSTILE, hint=HOSTILE), as_json=False)
    render.Progress().note(HOSTILE)
    said = capsys.readouterr().err
    assert _acts(said.replace("\n", "")) == []
    assert said.count("column ␛[31mevil␇⟨U+202E⟩\nsecond line\n") == 4


def test_what_stays_beside_a_drawn_bar_does_not_act_on_the_terminal_either():
    from rich.console import Console

    class Bars:
        console = Console(file=io.StringIO(), color_system=None)

        def update(self, task, *, description, completed):
            self.console.print(description, markup=False)

    progress = render.Progress()
    progress._bars = Bars()
    progress.note(HOSTILE)
    progress(HOSTILE, 0.5)
    said = Bars.console.file.getvalue()
    assert "evil" in said
    assert _acts(said.replace("\n", "")) == []


def test_an_evaluation_says_its_warnings_and_its_sources(capsys):
    figures = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5, "exact_match": None, "n_answers": 0}
    found = {
        "data": "a.jsonl, \x1b[31mb.jsonl", "counts": CLEAN, "warnings": ["mind the gap"], "adapter": figures, "answers": []
    }  # fmt: skip
    render.evaluation(found, as_json=False)
    said = capsys.readouterr()
    assert said.out.startswith("a.jsonl, ␛[31mb.jsonl: 1,200 of 1,200 rows")
    assert said.err == "warning: mind the gap\n"
