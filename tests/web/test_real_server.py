"""The page at the real server, with the demo model behind it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from driven import Page
from fake_server import Script
from llmx.serve import ServeConfig
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

sys.path.append(str(Path(__file__).parent.parent / "serve"))  # for `harness`
from harness import Running, running

KEY = "open sesame"


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[Running]:
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=4, api_key=[KEY])) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Running) -> Iterator[Page]:
    page = Page(chromium, server.url, Script())
    page.open()
    page.wait(lambda: page["#key-dialog"].is_displayed())
    page["#key"].send_keys(KEY, Keys.ENTER)
    page.wait(lambda: page["#model"].get_attribute("value") == "demo")
    yield page
    assert page.problems() == []


def setting(page: Page, **values: object) -> None:
    page["#open-settings"].click()
    for name, value in values.items():
        page[f"#set-{name}"].send_keys(str(value))
    page["#close-settings"].click()


def test_a_conversation(page: Page, server: Running) -> None:
    setting(page, temperature=0, max_tokens=40)
    page.say("What news?")
    page.say("And of the king?")
    messages: list[dict[str, str]] = []
    usage = {}
    for question in ("What news?", "And of the king?"):
        messages.append({"role": "user", "content": question})
        answer = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 40}).json()
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        usage = answer["usage"]
    shown = page.messages()
    assert [role for role, _ in shown] == ["user", "assistant", "user", "assistant"]
    for (_, text), message in zip(shown, messages, strict=True):
        assert text.split() == message["content"].split()
    assert page.stats().startswith(f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens")
    assert "tokens/s" in page.stats()


def test_stopping_frees_the_slot(page: Page, server: Running) -> None:
    setting(page, max_tokens=900, temperature=1)
    page.run(  # an answer that does not end by itself
        """const send = window.fetch;
        window.fetch = (path, options) =>
            send(path, options?.body ? { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) } : options);"""
    )
    page.say("Speak on, and never end.", wait=False)
    page.wait(lambda: len(page.messages()) == 2 and len(page.messages()[1][1]) > 20)
    page["#composer-text"].send_keys(Keys.ESCAPE)
    page.idle()
    assert "stopped" in page.stats()
    server.wait_idle(5)


def test_the_board_shows_requests_that_run(page: Page, server: Running) -> None:
    page["#tab-server"].click()
    page.wait(lambda: page.texts("#figures dd"))
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            while not stop.is_set():
                client.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 300, "ignore_eos": True, "n": 2})

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        page.wait(lambda: page.texts("#figures dd")[0] == "4", 20)  # running, of four slots
        page.wait(lambda: float(page.texts("#figures dd")[2].replace(",", "").split()[0]) > 0, 20)  # tokens per second
        page.wait(lambda: page.texts("#latency tbody tr:first-child > *")[1] != "–", 30)
        assert "%" in page.texts("#figures dd")[4] and page.texts("#figures dd")[4] != "0 %"
    finally:
        stop.set()
        for client in clients:
            client.join()
    server.wait_idle()


def test_swagger_ui_works_without_a_network(page: Page, server: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": headers})
    page.requested()
    try:
        page.browser.get(f"{server.url}/docs")
        page.wait(lambda: page.all(".opblock-summary-path"))
        shown = {path.replace("\u200b", "") for path in page.texts(".opblock-summary-path")}
        assert shown == set(server.http.get("/openapi.json").json()["paths"])
    finally:
        page.browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})
    asked = page.requested()
    assert len(asked) >= 4 and all(url.startswith((server.url, "data:", "about:")) for url in asked), asked


def test_a_refusal_of_the_server_is_shown(page: Page) -> None:
    setting(page, temperature=0, max_tokens=10)
    page.run("const { newChat } = await import('/static/js/chat.js'); newChat()")
    page.run("document.getElementById('composer-text').value = 'word '.repeat(3000)")
    page.say("end")
    assert "context holds" in page["#notice"].text
