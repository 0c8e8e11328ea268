"""The page in a real browser, over the real app and fleet: what answered is named, and everything works from the keyboard."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_tune.serving.guard import ApiSettings
from tests.live_api import ADMIN, live, until

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PROMPT = "Set the bedroom to 19.5 degrees."
KEYS = {"api": "lora-tune-api-key", "admin": "lora-tune-admin-key"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def serve(tmp_path):
    """Return a block in which the server runs."""

    @contextmanager
    def served(settings=None, **engine):
        with live(tmp_path, settings, **engine) as running:
            yield running

    return served


@pytest.fixture
def visit(browser):
    """Return a function that opens a server's page; what its console complains of fails the test, told refusals aside."""
    contexts, complaints = [], []

    def opened(server, *, admin=False, view="", allow="", **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1400, "height": 900}} | context))
        if admin:
            stored = json.dumps([KEYS["admin"], ADMIN])
            contexts[-1].add_init_script(f"sessionStorage.setItem(...{stored})")
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)

        def listen(message):
            if message.type in ("error", "warning") and not (allow and f"status of {allow}" in message.text):
                complaints.append(message.text)

        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{server.url}/{view}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page, prompt=PROMPT, *, n_tokens=8, wait=True):
    page.wait_for_selector("#columns select")
    page.locator("#max-tokens").evaluate(f"field => {{ field.value = {n_tokens}; }}")
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    if wait:
        page.wait_for_selector("#send:not([hidden])")


def answers(page, turn=-1):
    """Return (version, text, fingerprint) of every column of a turn."""
    found = []
    for cell in page.locator("li.turn").all()[turn].locator("article.answer").all():
        version = cell.locator(".version")
        found.append((version.text_content(), cell.locator(".text").text_content(), version.get_attribute("title")))
    return found


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_column_shows_its_own_models_answer_and_names_the_version(serve, visit):
    with serve(load=("home@1", "home@2", "office"), token_seconds=0.02) as server:
        page = visit(server)
        page.wait_for_selector("#columns .column-head:nth-child(2)")
        page.click("#add-column")
        page.click("#add-column")
        assert page.locator("#add-column").is_disabled()
        shown = [select.input_value() for select in page.locator("#columns select").all()]
        assert len(set(shown)) == 4
        assert shown[0] == "tiny-base"
        ask(page)
        versions = [{"home": "home@2", "office": "office@1"}.get(model, model) for model in shown]
        digests = {version.id: version.digest for version in server.fleet.versions()}
        for (version, text, fingerprint), expected in zip(answers(page), versions, strict=True):
            assert version == expected
            assert text == server.text(expected, [user(PROMPT)], 8)
            assert fingerprint.endswith(
                f"+{digests[expected][:12]}" if expected in digests else server.base.weights_digest[:12]
            )
        assert "tokens/s" in page.locator(".figures").first.text_content()
        assert "8 tokens · cut at the most tokens" in page.locator(".figures").first.text_content()


def test_a_conversation_goes_on_with_each_columns_own_answers_until_it_is_cleared(serve, visit):
    with serve() as server:
        page = visit(server)
        page.wait_for_selector("#columns .column-head:nth-child(2)")
        page.locator("#system").evaluate("field => { field.value = 'Be brief.'; }")
        ask(page, "one")
        before = [{"role": "system", "content": "Be brief."}, user("one")]
        first = [text for _, text, _ in answers(page)]
        assert first == [server.text(model, before, 8) for model in ("tiny-base", "home@3")]
        ask(page, "two")
        for model, said, (_, text, _) in zip(("tiny-base", "home@3"), first, answers(page), strict=True):
            assert text == server.text(model, [*before, assistant(said), user("two")], 8)
        page.click("#clear")
        assert page.locator("li.turn").count() == 0
        ask(page, "two")
        assert answers(page)[0][1] == server.text("tiny-base", [before[0], user("two")], 8)


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stopping_ends_the_answers_on_the_server_too(serve, visit, way):
    with serve(token_seconds=0.02) as server:
        page = visit(server)
        ask(page, n_tokens=400, wait=False)
        assert until(lambda: len(page.locator(".text").nth(1).text_content()) > 3)
        if way == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click("#stop")
        page.wait_for_selector("#send:not([hidden])")
        assert until(server.idle)
        assert all(figures.endswith("stopped") for figures in page.locator(".figures").all_text_contents())
        assert server.engine.facts().n_tokens_generated < 400
        assert page.evaluate("document.activeElement.id") == "prompt"
        said = [text for _, text, _ in answers(page)]
        ask(page, "go on")
        assert answers(page)[1][1] == server.text("home@3", [user(PROMPT), assistant(said[1]), user("go on")], 8)


def test_settings_are_what_is_asked_for_and_wrong_ones_are_not_sent(serve, visit):
    with serve() as server:
        page = visit(server)
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
        ask(page)
        assert {key: bodies[0][key] for key in ("temperature", "max_tokens", "stream")} == {
            "temperature": 0,
            "max_tokens": 8,
            "stream": True,
        }
        assert "seed" not in bodies[0]
        page.click("#settings summary")
        page.fill("#temperature", "0.7")
        page.fill("#seed", "11")
        ask(page)
        assert (bodies[-1]["temperature"], bodies[-1]["seed"]) == (0.7, 11)
        n_sent = len(bodies)
        page.fill("#temperature", "3")
        page.fill("#prompt", "never sent")
        page.keyboard.press("Control+Enter")
        assert page.evaluate("document.activeElement.id") == "temperature"
        assert len(bodies) == n_sent


def test_a_model_that_is_gone_is_said_in_words_and_the_others_answer(serve, visit):
    with serve(load=("home@3", "office")) as server:
        page = visit(server, allow=404)
        page.wait_for_selector("#columns .column-head:nth-child(2)")
        page.locator("#columns select").nth(1).select_option("office@1")
        server.fleet.unload("office")
        ask(page)
        cells = page.locator("article.answer")
        assert cells.nth(0).locator(".text").text_content() == server.text("tiny-base", [user(PROMPT)], 8)
        assert "office@1" in cells.nth(1).locator(".error strong").text_content()
        assert cells.nth(1).locator(".error span").text_content()
        server.fleet.load("office")
        cells.nth(1).get_by_role("button", name="Try again").click()
        page.wait_for_selector("#send:not([hidden])")
        assert answers(page)[1][:2] == ("office@1", server.text("office@1", [user(PROMPT)], 8))


def test_model_text_never_becomes_markup_and_a_broken_stream_is_said(serve, visit):
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e &amp;"
    chunk = {
        "model": "<b>home</b>@1",
        "system_fingerprint": "<i>f</i>",
        "choices": [{"index": 0, "delta": {"content": hostile}, "finish_reason": None}],
    }
    error = {"error": {"message": "<b>gone</b>", "hint": "<i>hint</i>", "code": "x"}}
    with serve() as server:
        page = visit(server)
        streams = [
            f"data: {json.dumps(chunk)}\r\n\r\ndata: {json.dumps(error)}\r\n\r\n",
            f": a comment\n\ndata: {json.dumps(chunk)}\n\n",
            "data: not json\n\n",
        ]

        def reply(route):
            route.fulfill(
                status=200, content_type="text/event-stream", body=streams.pop(0) if streams else "data: [DONE]\n\n"
            )

        page.route("**/v1/chat/completions", reply)
        for _ in range(2):
            ask(page, f"{hostile} said")
        assert page.locator("#turns img, #turns script, #turns b, #turns i").count() == 0
        assert "owned" not in page.title()
        shown = page.locator("#turns").text_content()
        for words in (
            hostile,
            "<b>home</b>@1",
            "<b>gone</b>",
            "<i>hint</i>",
            "The connection ended before",
            "what is no answer",
        ):
            assert words in shown


def test_a_new_version_is_loaded_and_the_next_answer_is_its_own(serve, visit):
    with serve(load=("home@1",)) as server:
        page = visit(server, admin=True)
        ask(page)
        assert answers(page)[1][0] == "home@1"
        page.click("#to-adapters")
        page.fill("#load-source", "home@2")
        page.keyboard.press("Enter")
        page.get_by_text("home@2 is loaded; its probes: unverified.").wait_for()
        assert (
            page.locator("#aliases li", has=page.get_by_text("home", exact=True)).locator("code").text_content()
            == "home@2"
        )
        page.click("#to-compare")
        page.click("#clear")
        ask(page)
        assert answers(page)[1][:2] == ("home@2", server.text("home@2", [user(PROMPT)], 8))
        page.click("#to-adapters")
        page.click("[data-key='back home']")
        page.get_by_text("home answers with home@1 again.").wait_for()
        page.click("#to-compare")
        ask(page, "and now?")
        assert answers(page)[1][0] == "home@1"


def test_an_alias_is_made_split_and_removed_and_a_version_unloaded(serve, visit):
    with serve(load=("home@1", "home@2")) as server:
        page = visit(server, admin=True, view="#adapters", allow=409)
        page.click("#new-alias")
        page.fill("#alias-name", "prod")
        page.click("#add-share")
        assert page.locator("#alias-sum").text_content() == "The shares sum to 100 %."
        shares = page.locator("#alias-rows input")
        shares.nth(0).fill("90")
        assert "must sum" in page.locator("#alias-sum").text_content()
        page.keyboard.press("Enter")
        assert page.locator("#alias").is_visible()
        shares.nth(1).fill("10")
        page.select_option("#alias-shadow", "home@1")
        page.click("#alias [type=submit]")
        page.get_by_text("prod answers with").wait_for()
        assert dict(server.fleet.pointers()["prod"].target) == {"home@1": 0.9, "home@2": 0.1}
        assert server.fleet.pointers()["prod"].shadow == "home@1"
        page.click("[data-key='unload home@1']")
        page.click("#unload [type=submit]")
        page.locator("#action-error strong").wait_for()
        assert "prod" in page.locator("#action-error").text_content()
        page.click("[data-key='change prod']")
        page.click("#forget-alias")
        page.get_by_text("prod is no name any more").wait_for()
        assert "prod" not in server.fleet.pointers()
        page.click("[data-key='unload home@1']")
        page.click("#unload [type=submit]")
        page.get_by_text("home@1 is unloaded.").wait_for()
        assert [version.id for version in server.fleet.versions()] == ["home@2"]
        page.click("[data-key='load home@1']")
        page.get_by_text("home@1 is loaded").wait_for()
        assert dict(server.fleet.pointers()["home"].target) == {"home@2": 1.0}


def test_keys_are_asked_for_and_kept_in_this_tab_only(serve, visit):
    with serve(ApiSettings(api_keys=("api-key",), admin_keys=(ADMIN,))) as server:
        page = visit(server, allow=401)
        page.click("#enter-key")
        page.fill("#api-key", "  api-key ")
        page.keyboard.press("Enter")
        ask(page)
        assert answers(page)[1][1] == server.text("home@3", [user(PROMPT)], 8)
        page.click("#to-adapters")
        assert page.locator("#admin").is_hidden()
        page.click("#want-admin-key")
        page.fill("#admin-key", "wrong")
        page.keyboard.press("Enter")
        page.locator("#admin-error strong").wait_for()
        page.click("#open-keys")
        page.fill("#admin-key", ADMIN)
        page.keyboard.press("Enter")
        page.locator("#loaded li").wait_for()
        kept = page.evaluate(
            "[Object.entries(sessionStorage), Object.entries(localStorage), document.cookie, location.href]"
        )
        assert dict(kept[0]) == {KEYS["api"]: "api-key", KEYS["admin"]: ADMIN}
        assert kept[1:] == [[], "", f"{server.url}/#adapters"]
        page.click("#open-keys")
        page.click("#forget-keys")
        assert page.evaluate("sessionStorage.length") == 0
        page.locator("#admin-wanted").wait_for()


def test_the_keyboard_is_enough(serve, visit):
    with serve(load=("home@1",)) as server:
        page = visit(server, admin=True)
        page.wait_for_selector("#columns .column-head:nth-child(2)")
        focused = "(({ id, ariaLabel, dataset }) => id || ariaLabel || dataset.key)(document.activeElement)"
        assert page.evaluate(focused) == "prompt"
        page.keyboard.type(PROMPT)
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "send"
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.parentElement.id") == "settings"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "max-tokens"
        page.keyboard.press("Control+A")
        page.keyboard.type("8")
        page.locator("#prompt").focus()
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#send:not([hidden])")
        assert answers(page)[1][:2] == ("home@1", server.text("home@1", [user(PROMPT)], 8))
        page.locator(".version").nth(1).focus()
        page.keyboard.press("Enter")
        assert page.locator(".fingerprint").nth(1).is_visible()
        page.locator("#to-adapters").focus()
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
        page.keyboard.press("Enter")
        page.locator("[data-key='load home@2']").focus()
        page.keyboard.press("Enter")
        page.get_by_text("home@2 is loaded").wait_for()
        page.locator("[data-key='change home']").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator("#alias [type=submit]").focus()
        page.keyboard.press("Enter")
        page.get_by_text("home answers with home@2 from now on.").wait_for()
        page.locator("[data-key='change home']").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        assert page.locator("#alias").is_hidden()
        assert page.evaluate(focused) == "Change what home answers with"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_in_light_and_dark(serve, visit, scheme):
    with serve(load=("home@1", "home@2", "office")) as server:
        page = visit(server, admin=True, color_scheme=scheme, reduced_motion="reduce")
        page.wait_for_selector("#columns .column-head:nth-child(2)")
        page.click("#add-column")
        page.click("#add-column")
        ask(page, f"{'wide' * 60} {PROMPT}")
        page.click("#settings summary")
        for view in ("compare", "adapters"):
            page.click(f"#to-{view}")
            assert view == "compare" or until(lambda: page.locator("#loaded li").count() == 3)
            for width in (380, 600, 800, 1000, 1400, 1600):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") == width, (view, width)
        red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (red < 64) == (scheme == "dark")
