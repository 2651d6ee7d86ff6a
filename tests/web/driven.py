"""The page as a test drives it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fake_server import Script
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


@dataclass
class Page:
    """The open page, and the server behind it."""

    browser: webdriver.Chrome
    url: str
    script: Script

    def open(self, path: str = "/", forget: bool = True) -> None:
        if forget:
            self.browser.get(self.url + "/static/icon.svg")  # of the same origin, and without the page's scripts
            self.browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.browser.get("about:blank")
        self.browser.get(self.url + path)

    def __getitem__(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """What the elements hold, whether they are visible or not."""
        return "\n".join(self.texts(css))

    def texts(self, css: str) -> list[str]:
        """The text of each element, all at one moment (the page may replace them at the next)."""
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return list(self.browser.execute_script(script, css))

    def wait(self, condition: Any, seconds: float = 30) -> Any:
        return WebDriverWait(self.browser, seconds, 0.03).until(lambda _: condition())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of an async function's body in the page."""
        wrapped = f"""
            const done = arguments[arguments.length - 1];
            (async function () {{ {script} }}).apply(null, arguments).then((value) => done({{ value }}), (error) => done({{ error: String(error) }}));
        """
        result = self.browser.execute_async_script(wrapped, *arguments)
        assert "error" not in result, result["error"]
        return result["value"]

    def say(self, text: str, wait: bool = True) -> None:
        """Type and send, and wait for the end of the answer."""
        self["#composer-text"].send_keys(text, Keys.ENTER)
        if wait:
            self.idle()

    def idle(self) -> None:
        self.wait(lambda: self["#send"].is_displayed())

    def messages(self) -> list[tuple[str, str]]:
        """(role, text) of each message shown."""
        script = """return [...document.querySelectorAll(".message")].map((node) =>
            [node.classList[1], node.querySelector(".body")?.innerText.trim() ?? ""])"""
        return [(role, text) for role, text in self.browser.execute_script(script)]

    def stats(self) -> str:
        """What the last message says of its tokens."""
        return self.texts(".message:last-child .stats")[0]

    def requested(self) -> set[str]:
        """URLs that the browser has asked for since this was last called."""
        entries = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return {e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"}

    def problems(self) -> list[str]:
        """What the browser's console has complained about, but for refused requests."""
        entries = [
            entry["message"] for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]
        # The sanitiser parses what it is given, and the browser reports that its policy would not have run it.
        expected = ("Failed to load resource", "purify.js")
        return [entry for entry in entries if not any(words in entry for words in expected)]
