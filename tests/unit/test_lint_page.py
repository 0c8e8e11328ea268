"""The page of `check --html` and `preview --html`: right numbers, hostile rows as plain text, nothing from elsewhere."""

import re
from dataclasses import fields
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.cli import page
from lora_tune.cli.page import lint_page, preview_page, write_page
from lora_tune.data.length import SetCounts
from lora_tune.errors import CannotCreateError

TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "div", "p", "h1", "h2", "h3", "dl",
    "dt", "dd", "small", "ul", "li", "span", "i", "em", "bdi", "strong", "mark", "details", "summary", "figure", "figcaption", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "svg", "defs", "pattern", "rect", "path", "line", "text",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "id", "aria-labelledby", "aria-hidden", "aria-label", "role", "tabindex",
    "scope", "open", "title", "width", "height", "style", "x", "y", "dx", "x1", "x2", "y1", "y2", "d", "text-anchor", "patternunits",
    "patterntransform",
}  # fmt: skip
CLEAN = {field.name: 0 for field in fields(SetCounts)} | {
    "rows_read": 1200, "rows": 1200, "tokens": 50_000, "trained_tokens": 12_500, "answers": 1300, "longest_tokens": 99
}  # fmt: skip


class Page(HTMLParser):
    """A page read by another program than the one that wrote it: tags, attributes, and text by the element around it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.values = set(), set(), []
        self.open, self.texts, self.rows, self.cells, self.row = [], {}, [], [], None
        self.tokens, self.marked, self.spans = [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value for name, value in attrs if name in ("title", "aria-label") and value]
        classes = dict(attrs).get("class") or ""
        if tag != "meta":
            self.open.append((tag, classes))
        if (tag, classes) == ("div", "tokens"):
            self.tokens.append("")
            self.marked.append("")
        self.spans += tag == "span" and ("div", "tokens") in self.open
        if tag == "tr":
            self.row = []
        if tag in ("td", "th") and self.row is not None:
            self.row.append("")
        if tag == "rect":
            self.cells.append(dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert tag == self.open.pop()[0]
        if tag == "tr":
            self.rows.append(self.row)
            self.row = None

    def handle_data(self, data):
        if not self.open:
            assert data.strip() == ""
            return
        self.texts.setdefault(self.open[-1][0], []).append(data)
        if ("div", "tokens") in self.open:
            self.tokens[-1] += data
            self.marked[-1] += data if any(tag == "mark" for tag, _ in self.open) else ""
        if self.row:
            self.row[-1] += data

    def all_text(self):
        return "".join(text for texts in self.texts.values() for text in texts)


def _bins(rows, width=100, limit=10**9):
    return [
        {"tokens_from": n * width + 1, "tokens_to": (n + 1) * width, "rows": count, "too_long": n * width + 1 > limit}
        for n, count in enumerate(rows)
    ]


def _row(*texts, where="rows.jsonl:1"):
    """Return a sample row; a text in a tuple is trained."""
    return {"where": where, "tokens": [
        {"id": n, "text": text[0] if isinstance(text, tuple) else text, "trained": isinstance(text, tuple)}
        for n, text in enumerate(texts)
    ]}  # fmt: skip


def _found(*, samples=(), labels=None, warnings=(), ledger=None, **more):
    return {
        "recipe": "my/recipe.yaml",
        "base": {"name": "some/base", "kind": "hub", "on_this_machine": False},
        "data": {
            "format": "chat", "detected": True, "train_rows": 1200, "held_out_rows": 30, "rows_left_out": 0, "labels": labels or {},
        },
        "steps": 75,
        "warnings": list(warnings),
        "tokens": {"train": CLEAN},
        "ledger": {
            "counts": {"train": CLEAN},
            "sources": [{"source": "rows.jsonl", "rows": 1200, "rows_an_epoch": 1200}],
            "roles": {"user": {"tokens": 30_000, "trained": 0}, "assistant": {"tokens": 15_000, "trained": 7_500}},
            "tokens_by_row": {"train": _bins([5, 0, 1195])},
            "tokenized": {"rows.jsonl": "kept from before"},
            "digest": "ab" * 32,
            **(ledger or {}),
        },
        "samples": list(samples),
        **more,
    }  # fmt: skip


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</div></mark></section><h1>Ready</h1>", "\"><b onclick='x'>",
    "</style><style>*{display:none}</style>", "<!--", "]]>", "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;&amp;", "</title><base href=//x>",
    "<svg onload=x>", "javascript:x", "`${x}`",
]  # fmt: skip
ACTING = {"\u202e": "⟨U+202E⟩", "\x00": "␀", "\x1b": "␛", "\ufeff": "⟨U+FEFF⟩", "\r": "␍", "\ud800": "⟨U+D800⟩"}


def _everywhere(text):
    """Return a page with the text in every place where something from outside stands."""
    return lint_page(_found(
        samples=[_row(text, (text,), where=f"{text}:1")], labels={text: 3, "other": 2}, warnings=[f"about {text}"], recipe=text,
        base={"name": text, "kind": "hub", "on_this_machine": True},
        ledger={
            "sources": [{"source": text, "rows": 1, "rows_an_epoch": 2}], "tokenized": {text: text, f"{text}2": text},
            "roles": {text: {"tokens": 2, "trained": 1}},
        },
    ))  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_rows_is_only_ever_text(text):
    plain, hostile = Page(_everywhere("ZQZ")), Page(_everywhere(text))
    assert hostile.tags == plain.tags <= TAGS
    assert hostile.attributes == plain.attributes <= ATTRIBUTES
    assert hostile.tokens == [text * 2]
    assert hostile.marked == [text]
    assert f"about {text}" in hostile.texts["li"]
    assert hostile.all_text().count(text) == plain.all_text().count("ZQZ") > 10


@pytest.mark.parametrize(("text", "sign"), ACTING.items())
def test_characters_that_act_are_signs_everywhere(text, sign):
    written = _everywhere(f"a{text}b")
    assert text not in written
    read = Page(written)
    assert read.tokens == [f"a{sign}b" * 2]
    assert f"a{sign}b" in read.texts["bdi"]
    written.encode()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.text(), st.booleans()), max_size=8))
def test_a_row_reads_as_its_tokens_and_the_marks_as_what_is_trained(tokens):
    from lora_tune.cli.visible import visible_lines

    row = _row(*((text,) if trained else text for text, trained in tokens))
    read = Page(lint_page(_found(samples=[row])))
    # The page shows a tab by its sign, the terminal as a tab; line breaks are kept by both.
    shown = [visible_lines(text.replace("\t", "⇥")) for text, _ in tokens]
    assert read.tokens == ["".join(shown)]
    assert read.marked == ["".join(text for text, (_, trained) in zip(shown, tokens, strict=True) if trained)]
    assert read.spans == len(tokens)


def test_the_page_needs_nothing_else():
    written = _everywhere("x")
    assert re.findall(r"(?:[\s\"]src=|href|url|@import|https?:|//)[^\s;]*", written) == ["url(#over)"]
    assert "default-src 'none'" in written
    assert "<script" not in written


def test_every_count_stands_in_the_ledger_with_its_number():
    counts = {field.name: 1_000_001 + n for n, field in enumerate(fields(SetCounts))}
    second = {name: value + 5_000_000 for name, value in counts.items()}
    for written in (
        lint_page(_found(ledger={"counts": {"train": counts, "held_out": second}, "tokens_by_row": {}})),
        preview_page({"rows": [], "counts": {"train": counts, "held_out": second}, "train_on": "assistant"}),
    ):
        rows = Page(written).rows
        assert rows[0] == ["Count", "train", "held out"]
        shown = [cell.split()[0].replace(",", "") for row in rows[1:] if len(row) == 3 for cell in row[1:]]
        assert sorted(map(int, shown)) == sorted([*counts.values(), *second.values()])


def test_shares_stand_beside_the_counts():
    counts = {**CLEAN, "trained_tokens_lost": 2_500}
    rows = {row[0]: row[1:] for row in Page(lint_page(_found(ledger={"counts": {"train": counts}}))).rows}
    assert rows["Trained tokens"] == ["12,500 25%"]  # of 50,000
    assert rows["Trained tokens lostcut or dropped with their row"] == ["2,500 17%"]  # of 15,000
    assert rows["user"][:3] == ["30,000", "0", "0%"]
    assert rows["assistant"][:3] == ["15,000", "7,500", "50%"]


def test_role_bars_are_as_long_as_their_tokens_and_filled_as_far_as_they_are_trained():
    bars = [bar["width"] for bar in Page(lint_page(_found())).cells if bar.get("class") in ("rest", "full")]
    assert bars == ["100.00%", "0%", "50.00%", "25.00%"]


def test_the_histogram_has_a_bar_for_every_bin_with_rows():
    found = _found(ledger={"tokens_by_row": {"train": _bins([40, 0, 80, 1, 0, 20], limit=350)}}, max_seq_tokens=350)
    written = lint_page(found)
    bars = [bar for bar in Page(written).cells if (bar.get("class") or "").startswith("column")]
    assert [bar["class"] for bar in bars] == ["column", "column", "column", "column over"]
    heights = [int(bar["height"]) for bar in bars]
    assert heights[0] * 2 == heights[1] == heights[3] * 4
    assert 0 < heights[2] < heights[3]
    (line,) = re.findall(r'class="limit" x1="([\d.]+)%"', written)
    assert float(line) == pytest.approx(100 * 350 / 600, abs=0.01)
    assert "limit 350" in written
    assert "501 to 600 tokens: 20 rows, over the limit" in Page(written).all_text()
    assert ["501 to 600, over the limit", "20"] in Page(written).rows


def test_a_limit_that_no_row_reaches_is_said_and_an_unknown_one_is_not():
    assert "no row is over the limit of 4,096 tokens" in lint_page(_found(max_seq_tokens=4096))
    unknown = lint_page(_found(ledger={"tokens_by_row": {"train": _bins([4, 4], limit=100)}}))
    assert 'class="limit" x1="50.000%"' in unknown
    assert "no row is over the limit" not in unknown
    assert 'class="limit" x1=' not in lint_page(_found())


def test_a_set_without_rows_has_an_empty_histogram():
    Page(lint_page(_found(ledger={"tokens_by_row": {"train": []}, "roles": {}}, max_seq_tokens=8)))


def test_the_thirty_commonest_labels_are_shown_and_the_others_counted():
    labels = {f"label {n}": 1000 - n for n in range(50)}
    read = Page(lint_page(_found(labels=labels)))
    assert [name for name in read.texts["bdi"] if name.startswith("label")] == [f"label {n}" for n in range(30)]
    assert "50 labels" in read.texts["h2"]
    assert f"20 more labels, with {sum(1000 - n for n in range(30, 50)):,} rows together." in read.texts["p"]


@pytest.mark.parametrize(("warnings", "changed", "verdict", "clean"), [
    ((), {}, "Ready to train: nothing is left out; no warnings.", True),
    (("w",), {}, "Ready to train: nothing is left out; 1 warning.", False),
    ((), {"rows_dropped": 12, "trained_tokens_lost": 12_500},
     "Ready to train: 12 rows dropped, 50% of the trained tokens lost; no warnings.", False),
])  # fmt: skip
def test_the_verdict_says_what_is_left_out(warnings, changed, verdict, clean):
    written = lint_page(_found(warnings=warnings, ledger={"counts": {"train": {**CLEAN, **changed}}}))
    assert verdict in Page(written).texts["span"]
    assert ('class="verdict"' in written) == clean


def test_sources_are_shown_when_there_are_several_or_their_tokens_are_new():
    assert "Where the rows come from" not in lint_page(_found())
    read = Page(
        lint_page(_found(ledger={"tokenized": {"rows.jsonl": "tokenizer changed", "held.jsonl": "first time"}}))
    )
    assert ["rows.jsonl", "1,200", "1,200", "100%", "tokenizer changed"] in read.rows
    assert ["held.jsonl", "", "", "", "first time"] in read.rows


def test_of_a_very_long_row_the_middle_is_counted():
    row = _row(*(f"{n} " if n % 2 else (f"{n} ",) for n in range(10_000)))
    read = Page(preview_page({"rows": [row], "counts": {"train": CLEAN}, "train_on": "all"}))
    assert read.spans == 3000
    assert "… 7,000 tokens, 3,500 of them trained, are not shown …" in read.tokens[0]
    assert read.tokens[0].startswith("0 1 2 ")
    assert read.tokens[0].endswith("9998 9999 ")
    assert "10,000 tokens, 5,000 trained" in read.texts["small"]


def test_the_first_rows_are_unfolded():
    written = lint_page(_found(samples=[_row("a", ("b",))] * 5))
    assert written.count('<details class="row" open>') == 3
    assert written.count('<details class="row">') == 2


def test_a_page_says_how_it_is_read():
    read = Page(preview_page({"rows": [_row(("a",))], "counts": {"train": CLEAN}, "train_on": "last_assistant"}))
    assert "1 row, token by token" in read.texts["h1"]
    assert "(train_on: last_assistant)" in read.all_text()
    assert "trained" in read.texts["mark"]
    assert "token 0, id 0" in read.values


def test_equal_findings_make_equal_pages():
    assert _everywhere("x") == _everywhere("x")


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    path = tmp_path / "lint.html"
    write_page(path, lint_page(_found()))
    write_page(path, preview_page({"rows": [], "counts": {"train": CLEAN}, "train_on": "all"}))
    assert "lora-tune preview" in path.read_text(encoding="utf-8")
    for other in (tmp_path / "recipe.yaml", tmp_path / "other.html", tmp_path / "empty"):
        other.write_text("" if other.name == "empty" else "<!doctype html>mine")
        before = other.read_bytes()
        with pytest.raises(CannotCreateError, match="not overwritten"):
            write_page(other, "x")
        assert other.read_bytes() == before
    with pytest.raises(CannotCreateError, match="not overwritten"):
        write_page(tmp_path, "x")
    with pytest.raises(CannotCreateError, match="folder is not there"):
        write_page(tmp_path / "no" / "lint.html", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "lint.html", "other.html", "recipe.yaml"]


def _luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    """Return the contrast of two colours. Source: WCAG 2.2, relative luminance."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_letters_can_be_read_in_light_and_dark():
    template = files("lora_tune.cli").joinpath("page.html.jinja").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    )
    for colours in (light, dark):
        for ink, ground in (
            ("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("good", "good-wash"), ("warn", "warn-wash"),
            ("warn", "card"), ("ink", "warn-wash"),
        ):  # fmt: skip
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for mark, ground in (("bar", "card"), ("over", "card")):
            assert _contrast(colours[mark], colours[ground]) >= 3, (mark, ground)


def test_the_page_counts_what_the_ledger_counts():
    assert {name for name, *_ in page._COUNTS} == {field.name for field in fields(SetCounts)}
