"""The page in a real browser, against a scripted server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from driven import Page
from llmx.serve.web import PATHS, STATIC
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys


def button(page: Page, label: str, index: int = -1) -> Any:
    return page.all(f'.message [aria-label="{label}"]')[index]


def press(page: Page, label: str, index: int = -1) -> None:
    page.browser.execute_script("arguments[0].click()", button(page, label, index))


def test_an_answer_streams(page: Page) -> None:
    page.script.deltas = [
        {"role": "assistant", "content": ""},
        *({"content": word} for word in ("One ", "two ", "three.")),
    ]
    page.script.pause = 0.8
    page.say("Count.", wait=False)
    page.wait(lambda: page.messages()[-1:] == [("assistant", "One two")])  # in part, while it runs
    assert page["#stop"].is_displayed() and page["#messages"].get_attribute("aria-busy") == "true"
    page.idle()
    assert page.messages() == [("user", "Count."), ("assistant", "One two three.")]
    assert page["#composer-text"].get_attribute("value") == ""
    stats = page.stats()
    assert stats.startswith("7 + 4 tokens · 4 cached · first after ") and stats.endswith(" tokens/s")
    assert float(stats.split(" · ")[-1].split()[0]) > 0
    assert "11 tokens of context" in page["#usage"].text
    assert "complete: 4 tokens" in page["#announce"].get_property("textContent")
    body = page.script.requests[-1]
    assert body["messages"] == [{"role": "user", "content": "Count."}]
    assert body["model"] == "demo" and body["stream"] is True and body["stream_options"]["include_usage"] is True
    assert set(body) == {"model", "messages", "stream", "stream_options"}  # the rest is the model's default


def test_stopping_keeps_what_was_said_and_frees_the_server(page: Page) -> None:
    page.script.deltas, page.script.pause = [{"content": f"{i} "} for i in range(100)], 0.1
    page.say("Go on.", wait=False)
    page.wait(lambda: "3" in page.messages()[-1][1])
    page["#stop"].click()
    page.idle()
    assert page.script.disconnected.wait(5)
    assert page.messages()[-1][1].startswith("0 1 2 3") and "stopped" in page.stats()
    page.script.disconnected.clear()
    page.say("Again.", wait=False)
    page.wait(lambda: len(page.all(".message")) == 4 and "1" in page.messages()[-1][1])
    page["#composer-text"].send_keys(Keys.ESCAPE)
    page.idle()
    assert page.script.disconnected.wait(5)


def test_regenerate_edit_and_delete(page: Page) -> None:
    page.say("First")
    page.script.deltas = [{"content": "Another."}]
    press(page, "Regenerate")
    page.wait(lambda: page.messages() == [("user", "First"), ("assistant", "Another.")])
    page.idle()
    assert page.script.requests[-1]["messages"] == [{"role": "user", "content": "First"}]
    page.say("Second")
    assert [m["role"] for m in page.script.requests[-1]["messages"]] == ["user", "assistant", "user"]

    press(page, "Edit", 0)  # of the first message: what follows it goes
    editor = page[".editor textarea"]
    assert editor.get_attribute("value") == "First" and page.browser.switch_to.active_element == editor
    editor.send_keys(" of all", Keys.ENTER)
    page.wait(lambda: page.messages() == [("user", "First of all"), ("assistant", "Another.")])
    page.idle()
    assert page.script.requests[-1]["messages"] == [{"role": "user", "content": "First of all"}]

    count = len(page.script.requests)
    press(page, "Edit")  # of an answer: it is only replaced
    page[".editor textarea"].send_keys(" Indeed.")
    page[".editor .primary"].click()
    assert page.messages()[-1] == ("assistant", "Another. Indeed.")
    page["#composer-text"].send_keys(Keys.ARROW_UP)  # the last message of the user's
    page[".editor textarea"].send_keys("x", Keys.ESCAPE)
    assert page.messages() == [("user", "First of all"), ("assistant", "Another. Indeed.")]
    assert len(page.script.requests) == count
    press(page, "Delete from here on", 0)
    assert page.messages() == [] and page["#empty"].is_displayed()


MARKDOWN = """# Title

Some *emphasis*, **strong**, `code` and [a link](https://example.org/x?a=1&b=2).

| a | b |
|---|---|
| 1 | 2 |

- one
- [x] two

```python
def f(a: int) -> str:
    return f"<{a}>"  # done
```

```
plain <b>
```
"""


def test_markdown_and_code(page: Page) -> None:
    page.script.deltas = [{"content": piece} for piece in MARKDOWN.splitlines(keepends=True)]
    page.say("Show.")
    text = ".message:last-child .markdown"
    assert page[f"{text} h1"].text == "Title" and page[f"{text} em"].text == "emphasis" and page[f"{text} strong"]
    link = page[f"{text} a"]
    assert link.get_attribute("href") == "https://example.org/x?a=1&b=2"
    assert link.get_attribute("target") == "_blank" and "noopener" in link.get_attribute("rel")
    assert [cell.text for cell in page.all(f"{text} td")] == ["1", "2"]
    assert page[f"{text} li input"].get_attribute("disabled")
    python, plain = page.all(f"{text} .code")
    assert python.find_element(By.CSS_SELECTOR, ".caption span").text == "python"
    assert python.find_element(By.CSS_SELECTOR, ".hljs-keyword").text == "def"
    assert python.find_element(By.CSS_SELECTOR, "code").text == 'def f(a: int) -> str:\n    return f"<{a}>"  # done'
    assert plain.find_element(By.CSS_SELECTOR, "code").text == "plain <b>"


def test_copying(page: Page) -> None:
    page.script.deltas = [{"content": MARKDOWN}]
    page.say("Show.")
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page[".code button"].click()
    copied = page.wait(lambda: page.run("return await navigator.clipboard.readText()"))
    assert copied == 'def f(a: int) -> str:\n    return f"<{a}>"  # done'
    press(page, "Copy")
    page.wait(lambda: page.run("return await navigator.clipboard.readText()") == MARKDOWN)


ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "![x](javascript:window.hacked=1)",
    "[x](javascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "<a href='vbscript:x' onclick='window.hacked = 1'>y</a>",
    "<svg><script>window.hacked = 1</script></svg>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>",
    "<style>* { display: none }</style>",
    "<form action='/v1/models'><input type=password name=p><button>Key</button></form>",
    "<div id='composer' class='primary' style='position:fixed'>over</div>",
    "```html\n<img src=x onerror='window.hacked = 1'>\n```",
    '```x" onmouseover="window.hacked=1\ncode\n```',
    "<input autofocus onfocus='window.hacked = 1'>",
]


@pytest.mark.parametrize("growing", [False, True])
def test_nothing_of_an_answer_runs(page: Page, growing: bool) -> None:
    html = page.run(
        """const { render } = await import("/static/js/markdown.js");
        return arguments[0].map((text) => {
            const node = document.createElement("div");
            document.body.append(node);
            render(node, text, arguments[1]);
            for (const each of node.querySelectorAll("*")) each.dispatchEvent(new Event("mouseover", { bubbles: true }));
            const html = node.innerHTML;
            node.remove();
            return html;
        });""",
        ATTACKS,
        growing,
    )
    time.sleep(0.2)
    assert page.run("return window.hacked ?? null") is None
    for attack, shown in zip(ATTACKS, html, strict=True):
        marks = shown.replace("&lt;", "").lower()
        for forbidden in (
            "<script",
            "<iframe",
            "<style",
            "<form",
            "<img",
            "<svg>",
            "<math",
            "javascript:",
            "vbscript:",
            "data:text",
            "id=",
            "style=",
            "srcdoc",
        ):
            assert forbidden not in (marks if "html" not in attack[:8] else ""), (attack, shown)
        # `render` itself makes only these
        assert "onerror=" not in marks or "onerror" in page.run(
            "const d = new DOMParser().parseFromString(arguments[0], 'text/html'); return d.body.textContent", shown
        )


def test_an_attack_in_an_answer_and_in_a_question(page: Page) -> None:
    page.script.deltas = [
        {"content": "\n\n".join(ATTACKS)},
        {"reasoning_content": ATTACKS[1]},
        {"tool_calls": [{"index": 0, "id": "c", "function": {"name": ATTACKS[1], "arguments": ATTACKS[1]}}]},
    ]
    page.say(ATTACKS[1])
    time.sleep(0.2)
    assert page.run("return window.hacked ?? null") is None
    assert page.messages()[0] == ("user", ATTACKS[1])
    assert page["#composer"].is_displayed() and not page.all(".message img, .message script, .message form")


def test_reasoning_and_tool_calls(page: Page) -> None:
    page.script.deltas = [
        {"reasoning_content": "Let me "}, {"reasoning_content": "see."}, {"content": "I look."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
    ]  # fmt: skip
    page.say("Warm?")
    assert page.text(".reasoning .text") == "Let me see."
    assert page[".reasoning"].get_attribute("open") is None  # closed once the answer began
    assert page[".call .name"].text == "calls get_weather"
    assert json.loads(page[".call pre"].text) == {"city": "Rome"}
    page.say("And?")
    said = page.script.requests[-1]["messages"][1]
    assert said["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert said["reasoning_content"] == "Let me see."


def test_settings(page: Page) -> None:
    page["#open-settings"].click()
    assert page.browser.switch_to.active_element == page["#system"]
    page["#system"].send_keys("Be brief.")
    for name, value in {
        "temperature": "0.7",
        "top_k": "40",
        "max_tokens": "99",
        "seed": "5",
        "presence_penalty": "-1.5",
    }.items():
        page[f"#set-{name}"].send_keys(value)
    page["#set-stop"].send_keys("END", Keys.ENTER, "a\\nb")
    page["#set-top_p"].send_keys("7")  # out of range: marked, and not sent
    assert page["#set-top_p"].get_attribute("aria-invalid") == "true"
    page.say("Hi")
    body = page.script.requests[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {k: body.get(k) for k in ("temperature", "top_k", "max_tokens", "seed", "presence_penalty", "stop", "top_p", "min_p")} == {
        "temperature": 0.7, "top_k": 40, "max_tokens": 99, "seed": 5, "presence_penalty": -1.5, "stop": ["END", "a\nb"],
        "top_p": None, "min_p": None,
    }  # fmt: skip
    page.open(forget=False)  # kept, and the conversation too
    page["#open-settings"].click()
    assert page["#set-temperature"].get_attribute("value") == "0.7" and len(page.messages()) == 2
    page["#reset-settings"].click()
    page["#close-settings"].click()
    page["#new-chat"].click()
    assert page.messages() == []
    page.say("Hi")
    assert set(page.script.requests[-1]) == {"model", "messages", "stream", "stream_options"}


def test_model_picker(page: Page) -> None:
    page.script.models = ["small", "org/large"]
    page.open()
    page.wait(lambda: len(page.all("#model option")) == 2)
    page["#model"].send_keys("org")
    page.say("Hi")
    assert page.script.requests[-1]["model"] == "org/large"
    page.open(forget=False)
    page.wait(lambda: page["#model"].get_attribute("value") == "org/large")


def test_the_key_is_asked_for_and_sent(page: Page) -> None:
    page.script.key = "sesame"
    page.open()
    page.wait(lambda: page["#key-dialog"].is_displayed())
    assert page.browser.switch_to.active_element == page["#key"]
    page["#key"].send_keys("wrong", Keys.ENTER)
    page.wait(lambda: "refused" in page["#key-text"].text)
    page["#key"].send_keys("sesame", Keys.ENTER)
    page.wait(lambda: page["#model"].get_attribute("value") == "demo")
    assert not page["#key-dialog"].is_displayed()
    page.say("Hi")
    assert page.messages()[-1] == ("assistant", "Hello there.")
    assert page.script.keys_seen[-1] == "Bearer sesame"
    assert page.run("return localStorage.getItem('llmx.key')") is None
    page.open(forget=False)  # kept for the tab
    page.wait(lambda: page["#model"].get_attribute("value") == "demo")
    assert "sesame" not in page.browser.current_url


def test_failures_are_told_and_can_be_tried_again(page: Page) -> None:
    page.script.refusal = (400, "temperature must be a number from 0 to 100, and is 101.")
    page.say("Hi")
    assert "temperature must be" in page["#notice"].text and page["#notice"].get_attribute("role") == "alert"
    assert page.messages() == [("user", "Hi")]
    page.script.refusal = None
    page["#notice button"].click()
    page.wait(lambda: page.messages()[-1] == ("assistant", "Hello there."))
    page.idle()
    assert not page["#notice"].is_displayed()
    page.script.error = "The engine failed."
    page.say("More")
    assert page.messages()[-1] == ("assistant", "Hello there.") and "The engine failed." in page["#notice"].text
    page.script.error, page.script.finish = None, "length"
    page["#notice button"].click()
    page.wait(lambda: "cut at the token limit" in page.stats())


def test_events_in_any_pieces(page: Page) -> None:
    text = 'data: {"a": "é"}\n\ndata:x\r\n\r\n: comment\nevent: error\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n'
    assert page.run(
        """const { events } = await import("/static/js/api.js");
        const bytes = new TextEncoder().encode(arguments[0]);
        const results = [];
        for (const size of [1, 2, 3, 7, 1000]) {
            const stream = new ReadableStream({
                start(controller) {
                    for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                    controller.close();
                },
            });
            results.push(JSON.stringify(await Array.fromAsync(events(stream))));
        }
        return [...new Set(results)];""",
        text,
    ) == [json.dumps(['{"a": "é"}', "x", "1\n2", "[DONE]"], ensure_ascii=False, separators=(",", ":"))]


def test_keyboard_and_accessibility(page: Page) -> None:
    page.browser.execute_script("document.activeElement.blur()")
    ActionChains(page.browser).send_keys("/").perform()
    assert page.browser.switch_to.active_element == page["#composer-text"]
    page["#composer-text"].send_keys("one", Keys.SHIFT + Keys.ENTER)
    page["#composer-text"].send_keys("two")
    assert page["#composer-text"].get_attribute("value") == "one\ntwo" and page.messages() == []
    page["#composer-text"].send_keys(Keys.ENTER)
    page.idle()
    count = len(page.script.requests)
    ActionChains(page.browser).key_down(Keys.ALT).send_keys("r").key_up(Keys.ALT).perform()
    page.wait(lambda: len(page.script.requests) == count + 1)
    page.idle()
    page["#tab-chat"].send_keys(Keys.ARROW_RIGHT)
    assert page.browser.switch_to.active_element == page["#tab-server"] and page["#view-server"].is_displayed()
    assert page["#tab-server"].get_attribute("aria-selected") == "true" and not page["#view-chat"].is_displayed()
    page["#tab-server"].send_keys(Keys.ARROW_LEFT)
    page.browser.execute_script("document.activeElement.blur()")
    ActionChains(page.browser).send_keys("?").perform()
    assert page["#help"].is_displayed()
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: not page["#help"].is_displayed())
    nameless = page.run(
        """return [...document.querySelectorAll("button, input, select, textarea, a, [role=img], [role=tab]")]
            .filter((node) => !(node.getAttribute("aria-label") || node.title || node.textContent.trim() || node.labels?.length
                || document.getElementById(node.getAttribute("aria-labelledby"))))
            .map((node) => node.outerHTML);"""
    )
    assert nameless == []
    ids = page.run("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    assert page.run("return document.documentElement.lang") == "en"


def luminance(colour: str) -> float:
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_have_contrast(page: Page, theme: str) -> None:
    """WCAG 2 AA: 4.5 to 1 for text, in both themes."""
    page.script.deltas = [{"content": MARKDOWN}, {"reasoning_content": "Hm."}]
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    try:
        page.open()
        assert page.run("return document.documentElement.dataset.theme") == theme  # follows the system
        page.say("Hi")
        page["#open-settings"].click()
        colours = page.run(
            """const background = (node) => {
                for (; node; node = node.parentElement) {
                    const colour = getComputedStyle(node).backgroundColor;
                    if (!/, 0\\)$/.test(colour)) return colour;
                }
            };
            return [...document.querySelectorAll("body *")]
                .filter((node) => node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
                .filter((node) => !node.closest(".hidden, .skip"))
                .map((node) => [node.outerHTML.slice(0, 90), getComputedStyle(node).color, background(node)]);"""
        )
        assert len(colours) > 30
        for html, front, back in colours:
            light, dark = sorted((luminance(front), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (html, front, back)
        page["#theme"].click()
        assert page.run("return document.documentElement.dataset.theme") == "light"
        page["#theme"].click()
        assert page.run("return document.documentElement.dataset.theme") == "dark"
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_narrow_screen(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.script.deltas = [{"content": MARKDOWN + "\n" + "long" * 200 + "\n```\n" + "x" * 500 + "\n```"}]
        page.open()
        page.say("Hi " + "word " * 30)
        for view in ("chat", "server"):
            page[f"#tab-{view}"].click()
            assert page.run("return document.documentElement.scrollWidth") <= 360
            assert (
                page.run(
                    "return Math.max(...[...document.querySelectorAll('header *, #composer *, .message, .card')].filter((n) => n.checkVisibility()).map((n) => n.getBoundingClientRect().right))"
                )
                <= 360.5
            )
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_comes_from_the_server(page: Page) -> None:
    page.requested()
    page.open()
    page.say("Hi")
    page["#tab-server"].click()
    page.wait(lambda: page.all("#figures dd"))
    asked = page.requested()
    outside = {url for url in asked if not url.startswith(page.url) and not url.startswith(("about:", "data:"))}
    assert outside == set() and len(asked) > 10
    for url in asked:
        path = url.removeprefix(page.url).split("#")[0]
        assert (
            path in PATHS or path in ("/v1/models", "/v1/chat/completions", "/metrics") or not url.startswith(page.url)
        )


def test_the_files_are_whole() -> None:
    """Each file is reachable, none is empty, and the page's own are short."""
    files = {f"/static/{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*") if path.is_file()}
    assert files | {"/"} == PATHS
    for path in Path(STATIC).rglob("*"):
        if path.is_file() and "vendor" not in path.parts:
            assert 0 < len(path.read_text().splitlines()) < 400, path
