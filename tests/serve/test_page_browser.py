"""The page as a person uses it: real clicks in a browser, light and dark, wide and narrow."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serve.fake_engine import REPLY, wait_until
from tests.serve.scheduled_engine import ScheduledFakeEngine
from tests.serve.test_server import Live, live_server

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[page]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a Chromium", allow_module_level=True)

expect = sync_api.expect
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Its sandbox is not to be had for root, and nothing but this repository's page is opened.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def visit(
    browser: Any, live: Live, *, size: tuple[int, int] = (1280, 800), scheme: str = "light", faults: int = 0
) -> Iterator[Any]:
    """The page in a window; it may ask no other host for anything, nor complain of more than `faults`."""
    with browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    ) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        addresses: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(live.url)
        yield page
        assert all(address.startswith(live.url) for address in addresses)
        assert len(complaints) == faults, complaints


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(ScheduledFakeEngine()) as live:
        yield live


@pytest.fixture(autouse=True)
def calm(live: Live) -> Iterator[None]:
    live.fake.reply = lambda request: REPLY
    live.fake.step_time = 0.0
    yield


def say(page: Any, text: str) -> Any:
    """Send a message, and wait for the answer's end; the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    answer = page.locator(".model-message").last
    expect(answer.locator(".meta")).not_to_be_empty()
    return answer


def test_a_chat(browser: Any, live: Live) -> None:
    with visit(browser, live) as page:
        expect(page.get_by_text("demo", exact=True)).to_be_visible()
        expect(page.locator(".link")).to_have_text("live")
        expect(page.get_by_role("heading", name="Ask something")).to_be_visible()
        answer = say(page, "What is blue?")
        expect(answer.locator(".content")).to_have_text(REPLY)
        expect(answer.locator(".meta")).to_contain_text("tokens")
        expect(page.get_by_role("heading", name="Ask something")).to_be_hidden()
        # By the keyboard; and the conversation goes on from what was said.
        prompt = page.get_by_label("Message", exact=True)
        prompt.fill("And what")
        prompt.press("Shift+Enter")
        prompt.press_sequentially("is green?")
        prompt.press("Enter")
        expect(page.locator(".model-message")).to_have_count(2)
        expect(page.locator(".user").last).to_have_text("And what\nis green?")
        expect(page.locator(".model-message").last.locator(".meta")).not_to_be_empty()
        asked = live.fake.tokenizer.decode(live.fake.submitted[-1].prompt_token_ids)
        assert "What is blue?" in asked and REPLY in asked and "And what\nis green?" in asked
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        expect(page.get_by_role("heading", name="Ask something")).to_be_visible()


def test_what_streams_can_be_stopped(browser: Any, live: Live) -> None:
    live.fake.reply = lambda request: "word " * 200
    live.fake.step_time = 0.03
    with visit(browser, live) as page:
        page.get_by_label("Message", exact=True).fill("Go on")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".model-message .content")).to_contain_text("word word")
        expect(page.get_by_role("button", name="Send")).to_be_hidden()
        before = len(live.fake.aborted)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".model-message .meta")).to_contain_text("stopped by you")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        wait_until(lambda: len(live.fake.aborted) > before)
        text = page.locator(".model-message .content").inner_text()
        page.wait_for_timeout(200)
        assert page.locator(".model-message .content").inner_text() == text


def test_settings_are_what_is_asked_for(browser: Any, live: Live) -> None:
    with visit(browser, live) as page:
        page.get_by_text("Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        values = {"Temperature": "0.7", "Top p": "0.9", "Top k": "12", "Max tokens": "6", "Seed": "42"}
        for label, value in values.items():
            page.get_by_label(label).fill(value)
        page.get_by_label("Stop, one a line").fill("END\n###")
        expect(page.locator("#settings-summary")).to_contain_text("temperature 0.7")
        answer = say(page, "Hello")
        expect(answer.locator(".meta")).to_contain_text("cut off at the limit")
        request = live.fake.submitted[-1]
        params = request.sampling_params
        assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 12)
        assert (params.max_tokens, params.seed, params.stop) == (6, 42, ["END", "###"])
        assert "Be brief." in live.fake.tokenizer.decode(request.prompt_token_ids)
        # What no request may hold is not sent, and what the server refuses is said, with the text kept.
        count = len(live.fake.submitted)
        page.get_by_label("Top p").fill("7")
        page.get_by_label("Message", exact=True).fill("Again")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_label("Top p")).to_be_focused()
        assert len(live.fake.submitted) == count


def test_a_refusal_is_shown(browser: Any, live: Live) -> None:
    with visit(browser, live, faults=1) as page:
        page.get_by_label("Message", exact=True).fill("far too long " * 400)
        page.get_by_role("button", name="Send").click()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("256")
        expect(page.get_by_label("Message", exact=True)).to_have_value(("far too long " * 400).strip())


def test_tokens_by_probability(browser: Any, live: Live) -> None:
    with visit(browser, live) as page:
        page.get_by_label("Token probabilities").check()
        answer = say(page, "Hello")
        tokens = answer.locator(".token")
        assert "".join(tokens.all_inner_texts()).startswith(REPLY.split(",")[0])
        # exp(-1.5) is 22 %: the second shade of six.
        assert set(tokens.evaluate_all("all => all.map((t) => t.className)")) == {"token p1"}
        tip = page.get_by_role("tooltip")
        expect(tip).to_be_hidden()
        tokens.nth(1).hover()
        expect(tip).to_be_visible()
        rows = tip.locator("div")
        expect(rows).to_have_count(5)
        expect(tip.locator(".own")).to_contain_text("22.3 %")
        expect(rows.first).to_contain_text("77.9 %")
        page.get_by_label("Message", exact=True).hover()
        expect(tip).to_be_hidden()
        expect(answer).to_contain_text("unsure")


MARKUP = (
    "# Title\n\nSome **bold** text with `code`, [a link](https://example.com/), [bad](javascript:alert(1)).\n"
    "- one\n- two\n\n```\nlet x = '<b>';\n```\n<img src=x onerror=alert(1)><script>alert(2)</script>"
)


def test_what_a_model_writes_is_no_markup_of_the_page(browser: Any, live: Live) -> None:
    live.fake.reply = lambda request: MARKUP
    with visit(browser, live) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
        content = say(page, "<i>Hello</i>").locator(".content")
        expect(content.locator("h3")).to_have_text("Title")
        expect(content.locator("strong")).to_have_text("bold")
        expect(content.locator("li")).to_have_text(["one", "two"])
        expect(content.locator("pre")).to_have_text("let x = '<b>';")
        expect(content.locator("a")).to_have_count(1)
        assert content.locator("a").get_attribute("href") == "https://example.com/"
        expect(content).to_contain_text("<img src=x onerror=alert(1)><script>alert(2)</script>")
        assert page.locator("#messages img, #messages script, #messages i").count() == 0
        expect(page.locator(".user")).to_have_text("<i>Hello</i>")


def test_the_engine_at_work(browser: Any, live: Live) -> None:
    scheduler = live.fake.scheduler
    with visit(browser, live, size=(1280, 1600)) as page:
        expect(page.locator(".link")).to_have_text("live")
        boxes = page.locator(".card, .tiles, .note").evaluate_all(BOXES)
        live.fake.step_time = 0.02
        answer = say(page, "What is blue?")
        expect(answer.locator(".content")).to_have_text(REPLY)
        say(page, "What is blue? And green?")
        expect(page.locator("#tile-running")).to_have_text("0 of 8")
        states = scheduler.pool.states()[1:]
        for name, state in (("free", 0), ("cached", 1), ("owned", 2), ("shared", 3)):
            expect(page.locator(f"#pages-{name}")).to_have_text(str(states.count(state)))
        assert states.count(1) > 0
        expect(page.locator("#batch-note")).to_contain_text(f"step {scheduler._next_step_id - 1}:")
        drawn = {
            "chart-tokens": ["prefill", "padding"],
            "chart-sequences": ["decode"],
            "chart-throughput": ["decode", "prefill"],
            "chart-latency": ["shared"],
            "map": ["cached", "free"],
            "timeline": ["decode"],
        }
        for canvas, names in drawn.items():
            for name in names:
                wait_until(lambda canvas=canvas, name=name: page.locator(f"#{canvas}").evaluate(SHOWS, name))
                assert not page.locator(f"#{canvas}").evaluate(SHOWS, "preempted"), canvas
        # What came and went has moved nothing.
        assert page.locator(".card, .tiles, .note").evaluate_all(BOXES) == boxes
        page.locator("#map").hover(position={"x": 4, "y": 4})
        expect(page.locator("#pages-note")).to_contain_text("page 1: ")
        page.locator("#chart-tokens").hover(
            position={"x": page.locator("#chart-tokens").bounding_box()["width"] - 7, "y": 40}
        )
        expect(page.locator("#batch-note")).to_contain_text("shape 8 × 8")
    wait_until(lambda: not live.fake.recorders)


BOXES = (
    "all => all.map((e) => { const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
)
# Whether a canvas has a colour of the style sheet, or one nearly like it, above the axis at its foot.
SHOWS = """(canvas, name) => {
    const value = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
    const wanted = [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
    const height = Math.floor(canvas.height * (1 - 24 / canvas.clientHeight));
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, height).data;
    for (let i = 0; i < data.length; i += 4) {
        if (data[i + 3] > 200 && wanted.every((w, k) => Math.abs(data[i + k] - w) < 24)) return true;
    }
    return false;
}"""


def test_requests_that_wait_and_run_are_seen(browser: Any, live: Live) -> None:
    live.fake.reply = lambda request: "word " * 200
    live.fake.step_time = 0.02
    with visit(browser, live) as page:
        expect(page.locator(".link")).to_have_text("live")
        start = """() => { fetch("v1/completions", {method: "POST",
            headers: {"content-type": "application/json"},
            body: JSON.stringify({prompt: "Hello", n: 12, max_tokens: 100, ignore_eos: true})}); }"""
        page.evaluate(start)
        expect(page.locator("#tile-running")).to_have_text("8 of 8")
        expect(page.locator("#tile-waiting")).to_have_text("4")
        expect(page.locator("#tile-generated")).not_to_have_text("0 tok/s")
        expect(page.locator("#tile-running")).to_have_text("0 of 8")
        expect(page.locator("#tile-waiting")).to_have_text("0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits(browser: Any, live: Live, width: int, scheme: str) -> None:
    live.fake.reply = lambda request: "A " + "very" * 60 + " long word\n```\n" + "long line " * 40 + "\n```"
    with visit(browser, live, size=(width, 844), scheme=scheme) as page:
        say(page, "Hello " + "x" * 200)
        views = ["Chat", "Engine"] if width == 390 else []
        for view in views or [None]:
            if view is not None:
                page.get_by_role("tab", name=view).click()
                assert page.get_by_role("tab", name=view).get_attribute("aria-selected") == "true"
                expect(page.get_by_role("region", name=view)).to_be_visible()
            sizes = page.evaluate(
                "() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            )
            assert sizes == [width, 844], "nothing reaches past the window"
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60
        assert page.locator(".card").evaluate_all("all => all.every((c) => c.scrollWidth <= c.clientWidth)")


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any) -> None:
    # A 401 before the key, and one for the wrong key, are in the browser's console.
    with (
        live_server(ScheduledFakeEngine(), api_key=("secret",)) as live,
        visit(browser, live, faults=2) as page,
    ):
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("needs an API key")
        page.keyboard.press("Escape")
        expect(dialog).to_be_visible()
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog).to_contain_text("does not take this key")
        dialog.get_by_label("API key").fill("secret")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator(".link")).to_have_text("live")
        expect(say(page, "Hello").locator(".content")).to_have_text(REPLY)
        kept = page.evaluate(
            "() => JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"
        )
        assert json.loads(kept) == [{"jaxllm-api-key": "secret"}, {}, ""]
        page.reload()
        expect(page.locator(".link")).to_have_text("live")
        expect(dialog).to_be_hidden()


def test_a_server_that_goes_away_is_noticed(browser: Any) -> None:
    with live_server(ScheduledFakeEngine()) as live, browser.new_context() as context:
        page = context.new_page()
        page.goto(live.url)
        expect(page.locator(".link")).to_have_text("live")
        live.stop()
        expect(page.locator(".link")).to_have_text("not connected")
