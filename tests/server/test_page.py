"""The page, used by a headless Chromium, Debian's for instance."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from support import tiny
from support.serving import CONFIG, METHOD, TIMEOUT, cancelling, decodes, running, tiny_options, until

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api.expect.set_options(timeout=1000 * TIMEOUT)
    with api.sync_playwright() as playwright:
        options = {"args": ["--no-sandbox", "--disable-gpu"], "timeout": 1000 * TIMEOUT}
        browser = playwright.chromium.launch(executable_path=CHROMIUM, **options)
        yield browser
        browser.close()


@pytest.fixture
def address(tiny_model) -> Iterator[str]:
    with running(tiny_options(tiny_model(CONFIG), n_parallel=1, method=METHOD, chat_template="chatml")) as address:
        yield address


@pytest.fixture
def page(browser, address) -> Iterator[Any]:
    """The page, open; what goes wrong in it, or comes from elsewhere, is the test's failure."""
    problems: list[str] = []
    page = new_page(browser)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(address) else None)
    page.goto(address)
    yield page
    page.close()
    assert problems == []


def new_page(browser: Any) -> Any:
    page = browser.new_page()
    page.set_default_timeout(1000 * TIMEOUT)
    return page


def slots(address: str) -> list[Any]:
    return list(httpx2.get(f"{address}/slots", timeout=TIMEOUT).json())


def texts(page: Any, selector: str) -> list[str]:
    return [element.text_content() for element in page.locator(selector).all()]


def test_the_page_shows_the_model_and_that_nothing_is_compressed(page):
    api.expect(page.locator("#model")).to_have_text("tiny, 2048 tokens")
    api.expect(page.locator("#summary")).to_have_text("Nothing is compressed. Prompts of at least 256 tokens will be.")
    assert page.locator("#stop").is_disabled()


def test_a_chat_is_answered_and_its_cache_is_shown(page, address):
    page.fill("#max-tokens", "12")
    page.locator("#ratio").fill("0.5")
    api.expect(page.locator("#ratio-text")).to_have_text("50 %")
    document = "The quick brown fox jumps over the lazy dog. " * 8
    page.fill("#text", document)
    page.click("#send")
    api.expect(page.locator(".figures")).to_have_count(1)
    assert texts(page, ".user") == [document.strip()]
    assert len(texts(page, ".assistant")[0]) > 0
    assert re.fullmatch(
        r"\d+ prompt tokens read in \d+\.\d s, 0 from the cache; \d+\.\d tokens/s", texts(page, ".figures")[0]
    )
    # beside it: what the server says of the slot
    (slot,) = slots(address)
    kv = slot["kv"]
    api.expect(page.locator("#summary")).to_contain_text(
        f"Slot 0: {kv['n_tokens']} tokens, 50 % of their cache removed."
    )
    bars = [bar.get_attribute("title") for bar in page.locator("#layers > div").all()]
    assert bars == [f"layer {n}: {kept} of {kv['n_tokens']} tokens" for n, kept in enumerate(kv["n_kept"])]
    heights = [bar.evaluate("bar => bar.style.height") for bar in page.locator("#layers > div > div").all()]
    assert [float(height[:-1]) for height in heights] == pytest.approx(
        [100 * n / kv["n_tokens"] for n in kv["n_kept"]], rel=1e-3
    )
    spans = page.locator("#kept span")
    api.expect(spans).to_have_count(kv["n_tokens"])
    assert "quick" in page.locator("#kept").text_content().replace("▁", " ")
    shades = {span.evaluate("span => span.style.backgroundColor") for span in spans.all()}
    assert len(shades) > 2


def test_a_conversation_goes_on_and_begins_anew(page):
    page.fill("#max-tokens", "4")
    for n in (1, 2):
        page.fill("#text", f"Question {n}?")
        page.press("#text", "Control+Enter")
        api.expect(page.locator(".figures")).to_have_count(n)
    assert texts(page, ".user") == ["Question 1?", "Question 2?"]
    # the second continues what the cache has of the first
    assert ", 0 from the cache" not in texts(page, ".figures")[1]
    page.click("#clear")
    assert texts(page, "#messages > div") == []


def test_stop_ends_the_work(page, address):
    page.fill("#max-tokens", "2000")
    page.fill("#text", "Go on for ever")
    with decodes() as held, cancelling() as cancelled:
        held.let(12)
        page.click("#send")
        held.wait_held()
        api.expect(page.locator("#stop")).to_be_enabled()
        until(lambda: texts(page, ".assistant")[0] != "" and not texts(page, ".assistant")[0].startswith("reading"))
        assert slots(address)[0]["is_processing"]
        page.click("#stop")
        api.expect(page.locator("#send")).to_be_enabled()
        assert cancelled.wait(TIMEOUT)
        held.open()
        until(lambda: not slots(address)[0]["is_processing"])
    assert held.n_passed == 13  # the one that was held, and none after it
    assert texts(page, ".error") == []
    assert len(texts(page, ".assistant")[0]) > 0


def test_errors_are_told_and_the_next_question_is_answered(page):
    page.fill("#max-tokens", "4")
    page.fill("#text", "word " * 3000)
    page.click("#send")
    api.expect(page.locator(".error")).to_contain_text("exceeds the available context size (2048 tokens)")
    page.fill("#text", "Short.")
    page.click("#send")
    api.expect(page.locator(".figures")).to_have_count(1)


def test_a_text_can_be_attached(page, tmp_path):
    (tmp_path / "report.txt").write_text("A report.", "utf-8")
    page.fill("#text", "Who wrote it?")
    page.set_input_files("#file", tmp_path / "report.txt")
    api.expect(page.locator("#text")).to_have_value("A report.\n\nWho wrote it?")


def test_a_document_is_read_once_and_chats_begin_with_it(page, tmp_path):
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8, "utf-8")
    page.fill("#max-tokens", "4")
    page.locator("#ratio").fill("0.5")
    page.set_input_files("#document", tmp_path / "fox.txt")
    item = page.locator("#documents li")
    api.expect(item).to_contain_text("fox.txt: ")
    api.expect(page.locator("#reading")).to_be_hidden()
    item.locator("input").check()
    for n in (1, 2):
        page.fill("#text", f"Question {n}?")
        page.click("#send")
        api.expect(page.locator(".figures")).to_have_count(1)
        n_read, n_cached = map(
            int, re.findall(r"(\d+) prompt tokens read .*, (\d+) from", texts(page, ".figures")[0])[0]
        )
        assert n_read < 60
        assert n_cached > 360
        page.click("#clear")
        api.expect(page.locator(".figures")).to_have_count(0)
    page.get_by_role("button", name="Delete fox.txt").click()
    api.expect(item).to_have_count(0)


def test_a_document_that_does_not_fit_is_told_where_it_was_asked_for(page, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 3000, "utf-8")
    page.set_input_files("#document", tmp_path / "long.txt")
    api.expect(page.locator("#document-error")).to_contain_text("exceeds the available context size")
    api.expect(page.locator("#documents li")).to_have_count(0)


def test_a_key_is_asked_for(browser, tiny_model):
    with running(tiny_options(tiny_model(CONFIG), api_keys=("secret",), n_parallel=1, method=METHOD)) as address:
        page = new_page(browser)
        page.goto(address)
        api.expect(page.locator("#model")).to_have_text("Invalid API Key")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        api.expect(page.locator("#model")).to_have_text("tiny, 2048 tokens")
        page.close()


def test_a_document_of_other_scripts_is_shown_as_text(page):
    """What a model says or a document has in it is text, never a part of the page."""
    page.fill("#max-tokens", "2")
    page.fill(
        "#text", "<img src=x onerror=alert(1)> & <b>bold</b> " * 20 + "\n" + "".join(map(chr, tiny.tokens(CONFIG, 5)))
    )
    page.click("#send")
    api.expect(page.locator(".figures")).to_have_count(1)
    assert page.locator("#messages img, #messages b, #kept img, #kept b").count() == 0
