"""The page of a run in a real browser: it fits a telephone and a desk, in light and dark, and says what is pointed at."""

import shutil

import pytest

from lora_tune.cli.app import run
from tests.run_folders import step_line, write_metrics, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / f"run-{'wide' * 15}")
    measured = [{"event": "held_out", "step": step, "held_out_loss": 3.0} for step in (200, 400)]
    lines = [step_line(step, steps=500) for step in range(1, 501)]
    write_metrics(folder, sorted([*lines, *measured], key=lambda line: line["step"]))
    assert run(["runs", "report", str(folder)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_fits_and_asks_for_nothing(browser, page_file, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert asked == [page_file.as_uri()]
    assert said == []
    red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 64) == (scheme == "dark")
    page.close()


def test_lines_are_as_wide_as_their_axis_and_every_dot_lies_on_its_step(browser, page_file):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(page_file.as_uri())
    box = "(({ left, width }) => [left, width])(document.querySelector(%r).getBoundingClientRect())"
    axis_left, axis_width = page.evaluate(box % "svg.plot .base")
    line_left, line_width = page.evaluate(box % "svg.plot path.raw")
    assert abs(line_left - axis_left) < 3
    assert abs(line_width - axis_width) < 6
    dot_left, dot_width = page.evaluate(box % "svg.plot .dot")
    # 500 steps are drawn in groups of three: the axis runs from the first group's last step to the last one's.
    share = (dot_left + dot_width / 2 - axis_left) / axis_width
    assert share == pytest.approx((200 - 3) / (500 - 3), abs=0.002)
    page.close()
