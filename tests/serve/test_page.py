"""The chat at `/`: one file, and in a browser what a person sees of it."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from chromium import CHROMIUM, Browser

from softgrpo.report.build import asset
from softgrpo_engine import SoftParams

CHAT = "/v1/chat/completions"


def test_it_is_one_file_and_its_token_view_is_the_reports(served):
    status, headers, page = served.request("GET", "/")
    page = page.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert asset("token_view.js") in page
    assert not re.search(r"(src|href)=(?!\"data:)|@import|url\(|https?:", page)
    assert "default-src 'none'" in page
    assert "{{" not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, served):
    browser.log.clear()
    browser.open(f"http://127.0.0.1:{served.port}/")
    yield browser
    assert browser.log == []


def ask(page, text, **fields):
    for name, value in fields.items():
        page.value(f"{{{name}.value = {value}; {name}.dispatchEvent(new Event('input'))}}")
    page.value("document.getElementById('prompt').focus()")
    page.write(text)
    page.press("Enter", 13, "\r")


IDLE = "!document.getElementById('send').disabled"


def test_soft_beside_discrete_with_the_candidates_of_every_token(page, served):
    ask(page, "aaabacad", maxTokens=8, seed=3)
    page.wait(f"{IDLE} && document.querySelectorAll('.answer').length == 2")
    body = {"messages": [{"role": "user", "content": "aaabacad"}], "max_tokens": 8, "seed": 3}
    body |= {"top_k": 5, "top_p": 0.95}
    for i, soft in enumerate((1, 0)):
        (choice,) = served.post(CHAT, {**body, "soft": soft})["choices"]
        shown = page.value(f"document.querySelectorAll('.whole')[{i}].textContent")
        assert shown == choice["message"]["content"]
    assert page.value("document.querySelectorAll('.tok.soft').length") >= 8
    # The details are those of the chosen token, by keyboard too.
    page.value("document.querySelector('.tokens').focus()")
    page.press("Home", 36)
    page.press("ArrowRight", 39)
    said = page.value("document.querySelector('.answer .details').textContent")
    assert said.startswith("Position 2 of 8")
    weights = [float(weight) for weight in re.findall(r"([\d.]+)%", said)]
    assert sum(weights) == pytest.approx(100, abs=0.5)
    # The next question goes on from each one's own answer.
    ask(page, "ae")
    page.wait(f"{IDLE} && document.querySelectorAll('.answer').length == 4")
    assert page.value("document.querySelectorAll('.wrong').length") == 0
    page.value("document.getElementById('clear').click()")
    assert page.value("document.querySelectorAll('.answer').length") == 0


def test_escape_stops_and_what_the_server_says_is_shown(page, served):
    step = served.llm.step
    served.llm.step = lambda: time.sleep(0.02) or step()
    try:
        ask(page, "aaab", maxTokens=200)
        page.wait("document.querySelectorAll('.tok.soft').length > 5")
        page.press("Escape", 27)
        page.wait(IDLE)
    finally:
        served.llm.step = step
    assert "stopped" in page.value("document.querySelector('.answer .named').textContent")
    served.wait_until_idle()
    ask(page, "aa", maxTokens=1000)
    page.wait("document.querySelectorAll('.wrong').length == 2")
    assert "256" in page.value("document.querySelector('.wrong').textContent")
    # The browser notes every answer that is an error.
    assert all(entry["entry"]["source"] == "network" for entry in page.log)
    page.log.clear()


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    page.resize(width, 800)
    ask(page, "aaabacad", maxTokens=40)
    page.wait(f"{IDLE} && document.querySelectorAll('.answer').length == 2")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    # The place to write is at the bottom of the window, wherever the conversation is.
    for place in (0, 1e6):
        page.value(f"scrollTo(0, {place})")
        below = page.value(
            "innerHeight - document.getElementById('ask').getBoundingClientRect().bottom"
        )
        assert below == pytest.approx(0, abs=1)


def test_a_cleared_conversation_does_not_come_back(page, served):
    """Also not the answer that was on its way."""
    step = served.llm.step
    served.llm.step = lambda: time.sleep(0.02) or step()
    try:
        ask(page, "aaab", maxTokens=200)
        page.wait("document.querySelectorAll('.tok.soft').length > 5")
        page.value("document.getElementById('clear').click()")
        page.wait(IDLE)
    finally:
        served.llm.step = step
    assert page.value("JSON.stringify(history)") == '{"soft":[],"discrete":[]}'


def test_sliders_that_nobody_moved_give_what_the_server_draws_with(browser, make_llm, serve):
    """Also beyond their ends, and between their steps."""
    soft = SoftParams(tau=4.0, top_k=50, top_p=0.97, temperature=0.65, weight_floor=0.003)
    with serve(make_llm(), soft=soft) as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        sent = json.loads(browser.value("JSON.stringify(body('soft', []))"))
        for name in ("tau", "top_k", "top_p", "temperature", "weight_floor"):
            assert sent[f"soft_{name}"] == getattr(soft, name)
        browser.value("ask('aaab'); 0")
        browser.wait(IDLE)
