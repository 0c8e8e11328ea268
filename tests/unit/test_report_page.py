"""The page of a run: every number as in the JSON, hostile text as plain text, nothing from elsewhere."""

import fcntl
import json
import os
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora_tune.cli import run_verbs
from lora_tune.cli.app import run
from tests.run_folders import FACTS, REPORT, step_line, write_metrics, write_run

HOSTILE = "</title><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e\x1b[2J &amp; {{ 7*7 }}"
VOID = {"meta"}


class Page(HTMLParser):
    """A page read by another program than the one that wrote it: tags, attributes, numbers and hover titles by their place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.meta = [], set(), set(), []
        self.numbers, self.titles, self.words = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in VOID:
            self.meta.append(dict(attrs))
            return
        self.open.append((tag, dict(attrs)))
        if tag == "data":
            self.numbers.append([dict(attrs)["data-of"], dict(attrs)["value"], ""])
        if tag == "title" and len(self.open) > 1 and "data-of" in self.open[-2][1]:
            self.titles.append([self.open[-2][1]["data-of"], ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert tag == self.open.pop()[0]

    def handle_data(self, data):
        self.words += data
        if self.open and self.open[-1][0] == "data":
            self.numbers[-1][2] += data
        if len(self.open) > 1 and self.open[-1][0] == "title" and "data-of" in self.open[-2][1]:
            self.titles[-1][1] += data


def at(values, pointer):
    """What an RFC 6901 pointer leads to."""
    for step in pointer.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        values = values[int(key)] if isinstance(values, list) else values[key]
    return values


def reported(capsys, folder, *more):
    """The page of a run, read, and the JSON that was printed with it."""
    assert run(["runs", "report", str(folder), "--json", *more]) == 0
    told = json.loads(capsys.readouterr().out)
    return Page(Path(told["page"]).read_text(encoding="utf-8")), told


def read_back(shown):
    """The number in a text as it is shown, a share as a share."""
    number = float(re.search(r"[-+]?[\d.,]+(e[-+]?\d+)?", shown)[0].replace(",", ""))
    return number / 100 if "%" in shown or "points" in shown else number


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "home-20260102-030405", checkpoints=(5, 10))


def test_every_number_on_the_page_is_the_jsons(folder, capsys):
    page, told = reported(capsys, folder)
    assert len(page.numbers) > 150
    for pointer, value, shown in page.numbers:
        assert json.loads(value) == at(told, pointer), pointer
        if not re.search(r"\d (B|[kMGT]B|s|min|h)\b", shown):
            assert read_back(shown) == pytest.approx(at(told, pointer), rel=5e-3, abs=6e-4 if "%" in shown or "points" in shown else 5e-3), (pointer, shown)  # fmt: skip
    drawn = {pointer for pointer, _ in page.titles}
    for name, curve in told["curves"].items():
        for number in range(len(curve["points"])):
            assert f"/curves/{name}/points/{number}" in drawn
    for pointer, title in page.titles:
        point = at(told, pointer)
        if "tokens_from" in point:
            assert [int(number) for number in re.findall(r"\d+", title)] == [
                point["tokens_from"],
                point["tokens_to"],
                point["rows"],
            ]
        else:
            numbers = [
                float(number.replace(",", ""))
                for number in re.findall(r"[-+\d][\d.,]*(?:e[-+]?\d+)?", title.replace(", ", " "))
            ]
            assert numbers[0] == point["step"]
            assert numbers[1] == float(f"{point['value']:.6g}")


def test_the_json_is_what_the_runs_files_say(folder, capsys):
    _, told = reported(capsys, folder)
    assert told["evaluation"]["adapter"] == REPORT["evaluation"]["adapter"]
    assert (
        told["evaluation"]["change"]["loss"]
        == REPORT["evaluation"]["adapter"]["loss"] - REPORT["evaluation"]["base"]["loss"]
    )
    assert told["versions"] == FACTS["versions"]
    assert told["data"]["counts"] == FACTS["data"]["counts"]
    assert [point["value"] for point in told["curves"]["loss"]["points"]] == [
        step_line(step)["loss"] for step in range(1, 21)
    ]
    assert [one["step"] for one in told["checkpoints"]] == [5, 10]


def test_what_a_strangers_run_says_is_text_and_the_page_needs_nothing_else(folder, capsys):
    facts, report = json.loads(json.dumps(FACTS)), json.loads(json.dumps(REPORT))
    facts["versions"][HOSTILE] = HOSTILE
    facts["data"]["counts"][HOSTILE] = {"rows": 1}
    facts["data"]["tokens_by_row"][HOSTILE] = facts["data"]["tokens_by_row"]["train"]
    facts["data"]["warnings"] = [HOSTILE]
    report["evaluation"]["answers"][0] = dict.fromkeys(("where", "prompt", "expected", "base", "adapter"), HOSTILE)
    report["adapter"]["registry"] = HOSTILE
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "adapter").mkdir()
    page, _ = reported(capsys, folder)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "form", "use", "image"}
    assert not {
        name for name in page.attributes if name.startswith("on") or name in ("src", "href", "xlink:href", "srcset")
    }
    assert "<script>document.title='owned'</script>" in page.words
    assert "{{ 7*7 }}" in page.words
    assert not any(sign in page.words for sign in "\u202e\x1b")
    policy = next(meta["content"] for meta in page.meta if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)


def test_a_run_that_has_only_begun_and_one_without_numbers_have_a_page(tmp_path, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.lock").touch()
    page, told = reported(capsys, begun)
    assert told["state"] == "unfinished"
    assert "no checkpoint" in page.words
    one = write_run(tmp_path / "one", n_steps=1, done=False)
    assert reported(capsys, one)[1]["curves"]["loss"]["points"][0]["step"] == 1
    write_metrics(
        one, [step_line(1, loss=None, grad_norm=None), step_line(2, loss=None, learning_rate=0.0, grad_norm=-1e300)]
    )
    page, told = reported(capsys, one)
    assert "loss" not in told["curves"]
    assert any("was no number: 2" in warning for warning in told["warnings"])


def test_an_older_page_gives_way_and_any_other_file_stays(folder, tmp_path, capsys):
    for _ in range(2):
        assert run(["runs", "report", str(folder)]) == 0
        assert capsys.readouterr().out.strip() == str(folder / "report.html")
    other = tmp_path / "mine.html"
    other.write_text("mine")
    assert run(["runs", "report", str(folder), "--out", str(other)]) == 73
    assert other.read_text() == "mine"
    assert "--out" in capsys.readouterr().err
    assert run(["runs", "report", str(folder), "--out", str(tmp_path / "none" / "page.html")]) == 73
    assert run(["runs", "report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "mine.html", "page.html"]


def test_a_page_that_is_watched_reads_itself_again_until_the_run_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_verbs, "WATCH_SECONDS", 0.05)
    folder = write_run(tmp_path / "run", done=False, n_steps=3, checkpoints=(3,))
    descriptor = os.open(folder / "run.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refreshing = []

    def end():
        refreshing.append('http-equiv="refresh"' in (folder / "report.html").read_text())
        write_metrics(folder, [step_line(step) for step in range(1, 6)])
        os.close(descriptor)

    threading.Timer(0.4, end).start()
    page, told = reported(capsys, folder, "--watch")
    assert refreshing == [True]
    assert (told["state"], told["step"]) == ("resumable", 5)
    assert not any(meta.get("http-equiv") == "refresh" for meta in page.meta)
