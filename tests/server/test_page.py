"""The page, used by a headless Chromium, Debian's for instance."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from support import tiny
from support.chat_templates import THINKING
from support.pdfs import pdf
from support.serving import CONFIG, METHOD, TIMEOUT, cancelling, decodes, running, saying, tiny_options, until

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


def test_a_new_chat_has_nothing_of_an_answer_that_was_being_written(page, address):
    page.fill("#max-tokens", "2000")
    page.fill("#text", "Go on for ever")
    with decodes() as held:
        held.let(12)
        page.click("#send")
        held.wait_held()
        until(lambda: texts(page, ".assistant")[0] != "")
        page.click("#clear")
        held.open()
        api.expect(page.locator("#send")).to_be_enabled()
    assert texts(page, "#messages > *") == []
    assert page.input_value("#text") == ""


def test_errors_are_told_and_the_question_can_be_changed(page):
    page.fill("#max-tokens", "4")
    question = "word " * 3000
    page.fill("#text", question)
    page.click("#send")
    api.expect(page.locator(".error")).to_contain_text("exceeds the available context size (2048 tokens)")
    api.expect(page.locator("#text")).to_have_value(question.strip())
    assert texts(page, ".user") == texts(page, ".assistant") == []
    page.fill("#text", "Short.")
    page.click("#send")
    api.expect(page.locator(".figures")).to_have_count(1)


def test_texts_are_attached_from_files_by_dropping_and_by_pasting_and_are_folded(page, tmp_path):
    (tmp_path / "report.txt").write_text("A report.", "utf-8")
    page.set_input_files("#file", tmp_path / "report.txt")
    dropped = page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['A note.'], 'note.md')); return data; }"
    )
    page.dispatch_event("main", "drop", {"dataTransfer": dropped})
    pasted = "A long paste. " * 30
    paste(page, pasted)
    paste(page, "x" * 3000)
    names = page.locator("#attached summary")
    api.expect(names).to_have_text(
        ["report.txt, 9 characters", "note.md, 7 characters", "Pasted text, 3,000 characters"]
    )
    api.expect(page.locator("#text")).to_have_value(pasted)  # short pastes are written where they belong
    page.get_by_role("button", name="Remove Pasted text").click()
    page.fill("#text", "Who wrote it?" + "?" * 1500)
    page.fill("#max-tokens", "2")
    page.click("#send")
    api.expect(page.locator(".figures")).to_have_count(1)
    asked = page.locator("details.user")
    assert asked.get_attribute("open") is None
    assert "A report.\n\nA note.\n\nWho wrote it???" in asked.text_content()
    assert texts(page, "#attached li") == []


def paste(page: Any, text: str) -> None:
    page.locator("#text").evaluate(
        """(area, text) => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text", text);
            const event = new ClipboardEvent("paste", {clipboardData, cancelable: true});
            if (area.dispatchEvent(event)) area.setRangeText(text); // what a browser does
        }""",
        text,
    )


def test_an_answer_is_shown_as_markdown_while_and_after_it_is_written(page):
    page.fill("#text", "Tell me")
    said = "# A\n\n**bold** `code` <b>no</b>\n\n* [link](https://a.b)\n\n```\nx = 1\n```\n"
    answer = page.locator(".markdown")
    with saying(said), decodes() as held:
        held.let(16)
        page.click("#send")
        held.wait_held()
        api.expect(answer.locator("h1")).to_have_text("A")  # nothing comes any more, and its form follows
        held.open()
        api.expect(page.locator(".figures")).to_have_count(1)
    assert [answer.locator(tag).text_content() for tag in ("h1", "strong", "p code", "li a", "pre")] == [
        "A", "bold", "code", "link", "x = 1\n"
    ]  # fmt: skip
    assert "<b>no</b>" in answer.text_content()
    assert answer.locator("a").get_attribute("target") == "_blank"  # a link does not leave the chat


def test_thoughts_are_folded_when_the_answer_is_there(browser, tiny_model):
    options = tiny_options(tiny_model(CONFIG), n_parallel=1, chat_template=THINKING)
    with running(options) as address:
        page = new_page(browser)
        page.goto(address)
        page.fill("#text", "Tell me")
        with saying("<think>A thought.</think>An answer."):
            page.click("#send")
            api.expect(page.locator(".figures")).to_have_count(1)
        api.expect(page.locator(".markdown")).to_have_text("An answer.")
        thoughts = page.locator(".assistant details")
        assert thoughts.get_attribute("open") is None
        assert thoughts.locator("div").text_content() == "A thought."
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hinders_who_uses_a_keyboard_or_a_screen_reader(page, tmp_path, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert problems_of(page) == {}
    page.fill("#max-tokens", "12")
    page.locator("#ratio").fill("0.5")
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4, "utf-8")
    page.set_input_files("#document", tmp_path / "fox.txt")
    page.locator("#documents input").check()
    for text in ("word " * 3000, "?" * 1500):  # an error, and a text that is folded
        page.fill("#text", text)
        page.click("#send")
        api.expect(page.locator("#send")).to_be_enabled()
    assert len(texts(page, ".figures")) == 1, texts(page, ".error")
    page.set_input_files("#file", tmp_path / "fox.txt")
    assert problems_of(page) == {}
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def problems_of(page: Any) -> dict[str, str]:
    """Returns what axe-core finds that is serious or worse: each rule and the elements that break it."""
    found = Axe().run(page).response["violations"]
    return {
        each["id"]: ", ".join(node["html"] for node in each["nodes"])
        for each in found
        if each["impact"] in ("serious", "critical")
    }


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


def test_documents_can_be_dropped_and_a_pdf_is_read(page, tmp_path):
    page.locator("#ratio").fill("0.5")
    data = Path(pdf(tmp_path / "fox.pdf", "The quick brown fox jumps over the lazy dog. " * 8)).read_bytes()
    dropped = page.evaluate_handle(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(data)], "fox.pdf"));
            transfer.items.add(new File(["Another text. ".repeat(30)], "b.md"));
            return transfer;
        }""",
        list(data),
    )
    page.dispatch_event("aside", "drop", {"dataTransfer": dropped})
    api.expect(page.locator("#documents li")).to_have_count(2)
    assert sorted(text.split(": ")[0].strip() for text in texts(page, "#documents label")) == ["b.md", "fox.pdf"]


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
