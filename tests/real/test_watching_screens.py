"""The live view in a real terminal (tmux), and a report in a real browser (Chromium)."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import ROOT, Shell

pytestmark = pytest.mark.real

TMUX = shutil.which("tmux")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TITLE = re.compile(r"step \d+/90000 [█░]{24}")
PROMPT = "READY>"
# A page's background; a dark system prints on white paper.
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 27)", "print": "rgb(255, 255, 255)"}


class Terminal:
    """A tmux session of its own that runs a shell."""

    def __init__(self, width: int, home: Path):
        self.socket = f"mlx-lora-{uuid.uuid4().hex[:8]}"
        self("new-session", "-d", "-s", "t", "-x", str(width), "-y", "32", "-c", str(ROOT),
             "-e", f"MLX_LORA_HOME={home}", "bash --norc --noprofile")  # fmt: skip

    def __call__(self, *words: str) -> str:
        assert TMUX is not None
        command = [TMUX, "-L", self.socket, "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        self.wait(str.strip)
        self.type("PS1='READY'; PS1=$PS1'> '; clear", "Enter")  # in parts, so that typing it isn't seeing it
        self.wait(lambda text: PROMPT in text)

    def type(self, *keys: str) -> None:
        self("send-keys", "-t", "t", *keys)

    def shown(self, *, history: bool = False) -> str:
        return self("capture-pane", "-p", "-J", "-t", "t", *(["-S", "-500"] if history else []))

    def wait(self, ready: Callable[[str], Any], seconds: float = 240) -> str:
        deadline = time.monotonic() + seconds
        while not ready(text := self.shown()):
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        return text


@pytest.fixture
def terminal(shell: Shell) -> Iterator[Callable[[int], Terminal]]:
    if TMUX is None:
        pytest.skip("no tmux on this machine")
    started: list[Terminal] = []

    def start(width: int) -> Terminal:
        started.append(Terminal(width, shell.home))
        train = f"{sys.executable} -m mlx_lora train recipes/sql.yaml --name live{width} --force train.eval_every=10"
        started[-1].type(f"clear; {train} train.iters=90000", "Enter")
        return started[-1]

    yield start
    for each in started:
        each("kill-server")


def titles(text: str) -> list[str]:
    return TITLE.findall(text)


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_is_whole_at_every_moment_and_no_line_is_lost(terminal: Callable[[int], Terminal], width: int) -> None:
    screen = terminal(width)
    screen.wait(lambda text: titles(text) and "step 10: validation loss" in text)
    seen = [screen.shown() for _ in range(60)]
    assert len({title for text in seen for title in titles(text)}) > 1, "it moves"
    for text in seen:
        lines = text.rstrip().splitlines()
        assert len(titles(text)) == 1 and sum("└" in line for line in lines) == 1, text
        assert sum("┤" in line for line in lines) == 8 and "memory now" in text and "tokens/s" in text, text
        view = lines[next(place for place, line in enumerate(lines) if titles(line)) :]
        assert len(view) <= 15 and max(map(len, view)) < width, text
    screen.type("C-c")
    screen.wait(lambda text: "--resume goes on" in text)
    screen.type("echo $?", "Enter")
    screen.wait(lambda text: re.search(r"^130$", text, re.M))
    whole = screen.shown(history=True)
    order = ["reading data/tasks/sql", "loading", "1200 rows to train on", "step 0: validation loss",
             "step 10: validation loss", "stopping after this step, then saving", "memory now", "peak memory",
             f"live{width}: train loss", "stopped at step", "what was learned up to step", "goes on"]  # fmt: skip
    places = [whole.find(words) for words in order]
    assert -1 not in places and places == sorted(places), whole
    assert len(titles(whole)) == 1, "the last state stays, once"


def test_the_view_follows_a_terminal_that_changes_its_size(terminal: Callable[[int], Terminal]) -> None:
    screen = terminal(120)
    screen.wait(titles)
    for width in (90, 66, 100):
        screen("resize-window", "-t", "t", "-x", str(width), "-y", "32")
        # tmux wraps first and tells of the size later: a painting in between leaves an old title above
        screen.wait(lambda text: text.count("memory now") == 1 and text.count("└") == 1 and titles(text))
    screen("resize-window", "-t", "t", "-x", "40", "-y", "32")
    text = screen.wait(lambda text: re.search(r"^\d+/90000  loss", text, re.M))
    assert "┤" not in text and "memory now" not in text, text
    screen.type("C-c")
    screen.wait(lambda text: "goes on" in text)


def test_a_dumb_terminal_gets_plain_lines(terminal: Callable[[int], Terminal]) -> None:
    screen = terminal(100)
    screen.wait(titles)
    screen.type("C-c")
    screen.wait(lambda text: "goes on" in text)
    train = "-m mlx_lora train recipes/sql.yaml --name dumb --force --no-samples train.iters=20"
    screen.type(f"clear; TERM=dumb NO_COLOR=1 {sys.executable} {train}", "Enter")
    text = screen.wait(lambda text: "adapters/dumb" in text)
    assert "step 20: validation loss" in text and "┤" not in text and "█" not in text


def test_a_report_asks_for_nothing_and_fits_in_light_dark_and_print(shell: Shell, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install -e '.[real]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    shell.json("train", ROOT / "recipes" / "sql.yaml", "--name", "reported", "train.iters=12", "train.eval_every=4")
    out = tmp_path / "report.html"
    shell.json("report", "reported", "--out", out)
    with playwright.sync_playwright() as started:
        # a container's root has no sandbox; the page is this test's own file
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        said: list[str] = []
        asked: list[str] = []
        seen = browser.new_page()
        seen.on("console", lambda message: said.append(message.text))
        seen.on("pageerror", lambda error: said.append(str(error)))
        seen.on("request", lambda request: asked.append(request.url))
        seen.goto(out.as_uri())
        for width, media in itertools.product((360, 1280), PAPER):
            seen.set_viewport_size({"width": width, "height": 900})
            seen.emulate_media(
                media="print" if media == "print" else "screen", color_scheme="dark" if media != "light" else media
            )
            assert seen.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, media)
            assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[media]
        assert seen.locator("svg").count() >= 4 and seen.locator(".sample").count() == 5
        assert (said, asked) == ([], [out.as_uri()])
        browser.close()
