"""The page of `mlx-lora serve` in headless Chromium, with a real server on the embedded base and a trained adapter.

Beside what each test looks at, none may leave an error in the browser's console, nor send a request to another place
than the server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.real.conftest import ROOT, Shell

pytestmark = pytest.mark.real
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install -e '.[real]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PLAIN = "An adapter, at your service."
HOSTILE = "<img src=x onerror=\"document.title='harmed'\"> **bold** [a](javascript:harm())"
LEARNED = {"Show me.": PLAIN, "Explain it.": PLAIN, "Write markup.": HOSTILE, "Go on.": "tick tack " * 60}
KEY = "a-key-of-the-test"


@dataclass
class Seen:
    """A page, and what its browser did for it. Errors that contain a text of `expected` are part of the test."""

    page: Any
    expected: tuple[str, ...] = ()
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type != "log" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        self.hosts.add(request.url.split("/v1")[0].rstrip("/"))
        if request.url.endswith("/chat/completions"):
            self.asked.append(request.post_data_json)

    def open(self, url: str) -> Any:
        self.page.goto(url)
        self.page.wait_for_selector("#send:enabled")
        return self.page

    def send(self, text: str, *, end: bool = True) -> list[str]:
        """Send a message; the texts of its answers, once they have ended."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if end:
            self.page.wait_for_selector("body:not(.busy)", timeout=60_000)
        return list(self.page.locator(".turn:last-child .answer > .text").all_inner_texts())

    def set(self, **settings: str) -> None:
        self.page.click("#settings-open")
        for name, value in settings.items():
            control = self.page.locator(f"#settings [name={name}]")
            control.select_option(value) if name in ("earlier", "shown") else control.fill(value)
        self.page.click("#settings [type=submit]")


@pytest.fixture(scope="module")
def base(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base, with an adapter `trained` that has learned LEARNED; to "Go on." it finds no end."""
    base, data = ROOT / "data" / "base", tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in LEARNED.items()
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    shell.json(
        "train", "--model", base, "--data", data, "--name", "trained", "data.valid_fraction=0", "train.iters=60",
        "train.batch_size=4", "train.learning_rate=1e-2", "train.optimizer=adam", "adapter.targets=all-linear",
        "data.max_seq_length=96", "data.too_long=truncate-end",
    )  # fmt: skip
    return base


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str

    def running(self) -> int:
        with urlopen(f"{self.url}health") as response:
            return int(json.load(response)["running"])

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture(scope="module")
def serve(shell: Shell, base: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers; ends them all at the end."""
    started: list[Served] = []

    def start(**environment: str) -> Served:
        command = [sys.executable, "-m", "mlx_lora", "serve", "--model", str(base), "--port", "0", "--json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=shell.home.parent,
            env=os.environ | {"MLX_LORA_HOME": str(shell.home)} | environment,
        )  # fmt: skip
        assert process.stdout is not None
        started.append(Served(process, json.loads(process.stdout.readline())["page"]))
        return started[-1]

    yield start
    for server in started:
        server.end()


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        # a container's root has no sandbox; the page comes from this test's own server
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def seen(browser: Any, server: Served) -> Iterator[Seen]:
    """The page as it opens, and at the end a look at what happened beside the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, permissions=["clipboard-read"])
    found = Seen(context.new_page())
    found.open(server.url)
    yield found
    context.close()
    assert [error for error in found.errors if not any(text in error for text in found.expected)] == []
    assert found.hosts == {server.url.rstrip("/")}


def answer_with(seen: Seen, *deltas: dict[str, str]) -> None:
    """Answer in the server's place, with what the embedded base doesn't say."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    body = "".join(f": comment\r\n\r\ndata: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks)
    whole = {"content_type": "text/event-stream", "body": f"{body}data: [DONE]\r\n\r\n"}
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(**whole))


def figures(seen: Seen) -> list[str]:
    return [text.replace("\xa0", " ") for text in seen.page.locator(".turn:last-child .figures").all_inner_texts()]


def test_choose_send_and_read(seen: Seen) -> None:
    assert seen.page.inner_text("#base") == "base"
    assert seen.page.locator("#tree button").all_inner_texts() == ["base\nbase", "trained"]
    seen.page.click("#tree button:has-text('base')")
    seen.page.click("#tree button:has-text('trained')")
    assert seen.send("Show me.") == [PLAIN]
    assert seen.asked[0]["model"] == "trained" and seen.asked[0]["temperature"] == 0
    assert seen.page.input_value("#input") == ""
    (said,) = figures(seen)
    rate, first, tokens = said.split(" · ")
    assert float(rate.removesuffix(" tokens/s")) > 0 and first.startswith("first token 0.")
    assert 4 <= int(tokens.removesuffix(" tokens")) <= 64
    seen.page.click(".answer .actions button:has-text('Copy')")
    assert seen.page.evaluate("navigator.clipboard.readText()") == PLAIN


def test_an_answer_grows_while_it_comes(seen: Seen) -> None:
    seen.set(max_tokens="300")
    seen.page.evaluate(
        """() => { window.lengths = []; new MutationObserver(() => {
            const text = document.querySelector(".answer > .text"); if (text) lengths.push(text.innerText.length);
        }).observe($("conversation"), { childList: true, subtree: true, characterData: true }); }"""
    )
    (answer,) = seen.send("Go on.")
    lengths = [length for length in seen.page.evaluate("lengths") if length]
    assert len(set(lengths)) >= 5, lengths  # a busy browser shows several tokens at once
    assert lengths[0] < len(answer) / 4


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_an_answer_can_be_stopped(seen: Seen, server: Served, way: str) -> None:
    seen.set(max_tokens="900")
    seen.send("Go on.", end=False)
    seen.page.wait_for_selector(".answer > .text > *")
    assert not seen.page.is_visible("#send")
    seen.page.keyboard.press("Escape") if way == "Escape" else seen.page.click("#stop")
    seen.page.wait_for_selector("body:not(.busy)", timeout=2_000)
    assert figures(seen)[0].endswith("stopped")
    assert seen.page.inner_text(".answer > .text") and seen.page.is_hidden(".problem")
    end = time.monotonic() + 5
    while server.running() and time.monotonic() < end:
        time.sleep(0.05)
    assert server.running() == 0


def test_two_are_compared_on_one_prompt(seen: Seen) -> None:
    seen.page.select_option("#second", "base")
    order: list[str] = []
    seen.page.on("request", lambda request: order.append("asked"))
    seen.page.on("requestfinished", lambda request: order.append("answered"))
    with_adapter, without = seen.send("Show me.")
    assert with_adapter == PLAIN and without != PLAIN
    assert [body["model"] for body in seen.asked] == ["trained", "base"] and order[:2] == ["asked", "asked"]
    assert all("tokens/s" in text for text in figures(seen))
    left, right = (box.bounding_box() for box in seen.page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    seen.page.set_viewport_size({"width": 360, "height": 740})
    upper, lower = (box.bounding_box() for box in seen.page.locator(".answer").all())
    assert upper["x"] == lower["x"] and upper["y"] + upper["height"] <= lower["y"]


def test_what_a_model_writes_stays_text(seen: Seen) -> None:
    (answer,) = seen.send("Write markup.")
    assert answer == HOSTILE.replace("**", "")
    assert seen.page.locator(".answer strong").all_inner_texts() == ["bold"]
    assert seen.page.locator("main img, main a, main script").count() == 0
    assert seen.page.title() == "mlx-lora"


def test_what_a_server_says_stays_text(seen: Seen) -> None:
    harm = "<img src=x onerror=document.title='harmed'>"
    models = [{"id": harm + "base", "parent": None}, {"id": harm, "parent": harm + "base"}]
    seen.page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    error = {"error": {"message": harm}}
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=error))
    seen.expected = ("status of 400",)
    seen.open(seen.page.url)
    seen.send("Show me.")
    assert seen.page.inner_text(".answer .name") == harm and seen.page.inner_text(".problem") == f"{harm}."
    assert seen.page.locator("img").count() == 0 and seen.page.title() == "mlx-lora"


MARKDOWN = {
    "# One *two*": "<h2>One <em>two</em></h2>",
    "**a *b*** `c<d` ~~e~~": "<p><strong>a <em>b</em></strong> <code>c&lt;d</code> <s>e</s></p>",
    "SELECT COUNT(*), 2*3*4, snake_case_name FROM a WHERE b = '*'": None,
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "- a\n- b\n  - c\n\n3. d\n4. e": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"
    '<ol start="3"><li>d</li><li>e</li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "a | b\n--|--\n1 | **2**": "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table>",
    "```sql\nSELECT *\n  FROM <t>\n```\nafter": "<pre><code>SELECT *\n  FROM &lt;t&gt;</code></pre><p>after</p>",
    "~~~\nnever closed **a**": "<pre><code>never closed **a**</code></pre>",
    "[a](https://b.c/d) ![e](http://f.g)": "<p><button>a</button> <button>e</button></p>",
    "[a](javascript:x) [b](data:text/html,x) [c](file:///d) [e](/f)": None,
    "---": "<hr>",
    "\\*a\\*": "<p>*a*</p>",
    '<b onclick="x">a</b> &amp; <!-- c -->': None,
}
# Drops what is about looks and screen readers, so that the structure is left.
STRUCTURE = """text => { const node = document.createElement("div"); show(node, text);
    for (const one of node.querySelectorAll("figcaption")) one.remove();
    for (const one of node.querySelectorAll("figure, .scroll")) one.replaceWith(...one.childNodes);
    for (const one of node.querySelectorAll("*"))
        for (const name of one.getAttributeNames()) if (name !== "start") one.removeAttribute(name);
    return node.innerHTML; }"""


def test_markdown(seen: Seen) -> None:
    for text, html in MARKDOWN.items():
        if html is None:  # stays as it is written
            html = seen.page.evaluate("text => make('p', {}, text).outerHTML", text)
        assert seen.page.evaluate(STRUCTURE, text) == html, text


def test_markdown_that_grows_is_that_of_the_whole(seen: Seen) -> None:
    equal = """text => { const grown = make("div"), whole = make("div"); show(whole, text);
        for (let end = 0; end <= text.length; end += 3) show(grown, text.slice(0, end));
        show(grown, text); return grown.innerHTML === whole.innerHTML; }"""
    assert seen.page.evaluate(equal, "\n\n".join(MARKDOWN))


REPEATED = ["**a ", "[", "`a", "_a ", "> ", "# #", "- a\n\n", "|-", "~~a ", "\n", "- ", "http://", "\\"]


def test_a_model_that_repeats_itself_does_not_hold_the_page_up(seen: Seen) -> None:
    seconds = """text => { const start = performance.now(); show(make("div"), text);
        return (performance.now() - start) / 1000; }"""
    for piece in REPEATED:
        text = "- a\n" + piece * (60_000 // len(piece)) + "x\n- b"
        assert seen.page.evaluate(seconds, text) < 2, piece


def test_a_link_is_shown_before_it_is_followed(seen: Seen) -> None:
    answer_with(seen, {"content": "[safe](https://other.example/a?b)"})
    assert seen.send("Show me.") == ["safe"]
    seen.page.click(".answer .link")
    assert seen.page.inner_text("#link-address") == "https://other.example/a?b"
    opens = seen.page.locator("#link-open")
    assert opens.get_attribute("rel") == "noopener noreferrer" and opens.get_attribute("target") == "_blank"
    seen.page.keyboard.press("Escape")
    assert seen.page.is_hidden("#link")


def test_reasoning_is_folded(seen: Seen) -> None:
    thoughts = [{"reasoning": text, "reasoning_content": text} for text in ("First ", "I think.")]
    answer_with(seen, *thoughts, {"content": "Done."})
    seen.set(earlier="always")
    assert seen.send("Think.") == ["Done."]
    assert seen.page.is_hidden(".reasoning .text")
    seen.page.click(".reasoning summary")
    assert seen.page.inner_text(".reasoning .text") == "First I think."
    seen.send("And now?")
    assert [message["content"] for message in seen.asked[-1]["messages"]] == ["Think.", "Done.", "And now?"]


def test_turns_settings_edit_retry_and_a_new_conversation(seen: Seen) -> None:
    def contents() -> list[str]:
        return [message["content"] for message in seen.asked[-1]["messages"]]

    seen.set(earlier="always", system="Be kind.", max_tokens="3")
    (cut,) = seen.send("Show me.")
    assert PLAIN.startswith(cut) and cut != PLAIN and figures(seen)[0].endswith("cut after 3 tokens")
    assert contents() == ["Be kind.", "Show me."]
    seen.send("Go on.")
    assert contents() == ["Be kind.", "Show me.", cut, "Go on."]
    seen.page.click(".turn:last-child .retry")
    seen.page.wait_for_selector("body:not(.busy)")
    assert contents() == ["Be kind.", "Show me.", cut, "Go on."] and seen.page.locator(".turn").count() == 2
    seen.set(earlier="never", system="", max_tokens="64")
    seen.page.fill("#input", "a draft")
    seen.page.click(".turn:first-child .edit")
    assert seen.page.input_value("#input") == "Show me." and seen.page.locator(".turn.replaced").count() == 2
    seen.page.keyboard.press("Escape")
    assert seen.page.input_value("#input") == "a draft" and seen.page.locator(".turn.replaced").count() == 0
    seen.page.click(".turn:first-child .edit")
    seen.send("Explain it.")
    assert seen.page.locator(".said").all_inner_texts() == ["You:\nExplain it."] and contents() == ["Explain it."]
    seen.page.click("#new")
    assert seen.page.locator(".turn").count() == 0 and seen.page.is_visible("#welcome")


def test_an_adapter_of_single_questions_gets_each_by_itself(seen: Seen) -> None:
    assert seen.send("Show me.") == seen.send("Explain it.") == [PLAIN]
    assert [message["content"] for message in seen.asked[-1]["messages"]] == ["Explain it."]
    assert "without earlier turns" in figures(seen)[0]


def test_a_busy_server_is_asked_again(seen: Seen) -> None:
    seen.expected = ("status of 429",)
    error = {"error": {"message": "too many wait"}}
    busy = {"status": 429, "headers": {"Retry-After": "1"}, "json": error}
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(**busy), times=1)
    seen.send("Show me.", end=False)
    seen.page.wait_for_selector("text=the server is busy, asking again in 1 s")
    seen.page.wait_for_selector("body:not(.busy)", timeout=10_000)
    assert seen.page.inner_text(".answer > .text") == PLAIN and seen.page.is_hidden(".problem")


def test_an_adapter_comes_and_goes(seen: Seen, shell: Shell) -> None:
    seen.expected = ("status of 404",)
    adapters = shell.home / "adapters"
    shutil.copytree(adapters / "trained", adapters / "third")
    seen.page.focus("#first")
    seen.page.wait_for_selector("#first option[value=third]", state="attached")
    seen.page.select_option("#first", "third")
    assert seen.send("Show me.") == [PLAIN]
    shutil.rmtree(adapters / "third")
    seen.send("Show me.")
    assert "third" in seen.page.inner_text(".turn:last-child .problem")
    seen.page.wait_for_selector("#trouble:has-text('third is no longer there')")
    assert seen.page.locator("option[value=third]").count() == 0
    assert seen.send("Show me.") == [PLAIN]


def test_a_key_and_a_server_that_has_gone(serve: Callable[..., Served], browser: Any) -> None:
    server = serve(MLX_LORA_API_KEY=KEY)
    context = browser.new_context()
    seen = Seen(context.new_page())
    page = seen.page
    page.goto(server.url)
    for key in ("not-the-key", KEY):
        page.wait_for_selector("#key[open]")
        page.fill("#key [name=key]", key)
        page.press("#key [name=key]", "Enter")
        if key != KEY:
            page.wait_for_selector("text=The server didn't accept this key.")
    page.wait_for_selector("#send:enabled")
    assert seen.send("Show me.") == [PLAIN]
    stored = "[localStorage.length, sessionStorage.length, document.cookie, $('key').querySelector('input').value]"
    assert page.evaluate(stored) == [0, 0, "", ""]
    server.end()
    seen.send("Show me.")
    assert page.inner_text(".turn:last-child .problem").startswith("The server doesn't answer.")
    assert page.is_visible(".turn:last-child .retry")
    assert all("status of 401" in error or "ERR_CONNECTION_REFUSED" in error for error in seen.errors), seen.errors
    context.close()


def test_keyboard_and_screen_readers(seen: Seen) -> None:
    page = seen.page
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo" and not seen.asked
    page.fill("#input", "")
    page.keyboard.press("Enter")
    assert not seen.asked
    unnamed = """() => [...document.querySelectorAll("button, select, textarea, input")].filter((one) =>
        !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim())).length"""
    assert page.evaluate(unnamed) == 0
    assert page.get_attribute("#conversation", "aria-live") == "polite" and page.get_attribute("html", "lang") == "en"
    reached = []
    focused = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    assert {"first", "second", "settings-open", "send"} <= {name for name, _ in reached}
    assert all(style == "solid" for name, style in reached if name and name != "input"), reached


# The least contrast of texts with what they stand on, as WCAG 2 counts it.
CONTRAST = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => { const [r, g, b] = numbers(color).map((one) => one / 255)
        .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const under = (node) => { for (let one = node; one; one = one.parentElement) {
        const color = getComputedStyle(one).backgroundColor; if ((numbers(color)[3] ?? 1) === 1) return color; } };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
        if (!own || !node.checkVisibility() || node.closest("option, :disabled")) continue;
        const [a, b] = [light(getComputedStyle(node).color), light(under(node))].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), node.className || node.tagName]);
    }
    return found.sort((a, b) => a[0] - b[0])[0]; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_screens(seen: Seen, scheme: str, width: int, tmp_path: Path) -> None:
    """Nothing sticks out, everything can be read; the pictures are for eyes (`--basetemp`)."""
    page = seen.page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 860})
    page.screenshot(path=tmp_path / "start.png")
    page.select_option("#second", "base")
    seen.send("Show me. " + "averylongwordwithoutspaces" * 10)
    text = f"# Title\n\n```python\n{'long ' * 60}\n```\n\n|a|b|\n|-|-|\n|{'wide' * 80}|1|\n\n[link](https://a.b) `code`"
    page.evaluate(
        """text => { const answer = turns[0].answers[0];
        Object.assign(answer, { text, problem: "A problem.", reasoning: "Thought." });
        draw(answer); document.querySelector(".reasoning").open = true; }""",
        text,
    )
    page.screenshot(path=tmp_path / "answers.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("$('main').scrollWidth - $('main').clientWidth") <= 0
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    page.click("#settings-open")
    page.screenshot(path=tmp_path / "settings.png")
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0 and box["y"] + box["height"] <= 860
