"""One Chromium for the page's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from driven import Page
from fake_server import Script, make_app, serving
from selenium import webdriver


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless Chromium. Its absence is a failure, not a skip: .ci/run installs it."""
    driver = shutil.which("chromedriver")
    assert driver, "the page's tests need Chromium: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,800",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def fake() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(make_app(script)) as url:
        yield script, url


@pytest.fixture
def page(chromium: webdriver.Chrome, fake: tuple[Script, str]) -> Iterator[Page]:
    """The page at the scripted server, with nothing kept from before. It must leave the console clean."""
    script, url = fake
    script.__init__()  # type: ignore[misc]
    chromium.get_log("browser")
    page = Page(chromium, url, script)
    page.open()
    page.wait(lambda: page["#model"].get_attribute("value"))
    yield page
    assert page.problems() == []
