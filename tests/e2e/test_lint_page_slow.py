"""The pages in a real browser: they fit a telephone and a desk, in light and dark, and no row of theirs acts."""

import shutil
import subprocess

import pytest

from lora_tune.cli.app import run
from tests.tiny import home_rows, write_jsonl, write_recipe

pytestmark = pytest.mark.slow
SECONDS = 60


@pytest.fixture(scope="module")
def browser():
    """Return a function that opens a file in a headless browser and returns what it printed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium on this machine")

    def opened(page, *options):
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
                   f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout

    return opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_bases):
    """A folder with the pages of a recipe, one of whose rows is hostile."""
    folder = tmp_path_factory.mktemp("page")
    recipe = write_recipe(folder, tiny_bases(), rows=24, held_out=4)
    rows = home_rows(24)
    rows[0]["messages"][1]["content"] = (
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">" + "wide" * 300
    )
    write_jsonl(folder / "rows.jsonl", rows)
    wanted = ["--set", "data.max_seq_tokens=2048"]
    assert run(["check", str(recipe), *wanted, "--html", str(folder / "lint.html")]) == 0
    assert run(["preview", str(recipe), *wanted, "-n", "2", "--html", str(folder / "preview.html")]) == 0
    return folder


def _framed(folder, name, width):
    """Return a page that shows another in a frame of the width and says how wide that one became."""
    frame = folder / f"frame-{name}-{width}.html"
    frame.write_text(
        f"<!doctype html><title>waiting</title><body style='margin:0'><iframe src='{name}' style='border:0;width:{width}px;height:900px' "
        'onload="const page = this.contentDocument; document.title = `${page.documentElement.scrollWidth} ${page.title} '
        "${page.querySelectorAll('script, img').length}`\"></iframe>",
        encoding="utf-8",
    )
    return frame


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize(("name", "title"), [
    ("lint.html", "{folder}/recipe.yaml – lora-tune check"), ("preview.html", "2 rows, token by token – lora-tune preview"),
])  # fmt: skip
def test_the_page_fits_and_no_row_acts(browser, folder, name, title, width):
    shown = browser(_framed(folder, name, width), "--dump-dom")
    assert f"<title>{width} {title.format(folder=folder)} 0</title>" in shown


@pytest.mark.parametrize(("scheme", "is_dark"), [("0", True), ("1", False)])
def test_the_page_is_drawn_in_light_and_dark(browser, folder, scheme, is_dark):
    picture = folder / f"{scheme}.png"
    frame = folder / f"colour-{scheme}.html"
    frame.write_text(
        "<!doctype html><title>waiting</title><iframe src='lint.html' onload=\"document.title = "
        'getComputedStyle(this.contentDocument.body).backgroundColor"></iframe>',
        encoding="utf-8",
    )
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    shown = browser(frame, setting, "--dump-dom")
    red = int(shown.split("<title>rgb(")[1].split(",")[0])
    assert (red < 64) == is_dark
    browser(folder / "lint.html", setting, "--window-size=1400,1600", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_the_marked_tokens_are_what_the_browser_shows_as_trained(browser, folder):
    shown = browser(folder / "preview.html", "--dump-dom")
    marked = shown.split('<details class="row"')[2].split("<mark>")[1].split("</mark>")[0]
    answer = home_rows(24)[1]["messages"][2]["content"]
    assert "".join(part.split(">", 1)[1] for part in marked.split("</span>")[:-1]) == answer + "&lt;|im_end|&gt;"
