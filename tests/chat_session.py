"""The chat in mlx_lora/serve/README.md: `python -m tests.chat_session` types it under tmux and writes what it shows.

Every command of the chat is typed, on a terminal of 100 columns, with the adapters that `quickstart` makes. Numbers
differ from run to run; the words don't, and a test compares those.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.session import NUMBER, ROOT

README = ROOT / "mlx_lora" / "serve" / "README.md"
START, END = "<!-- chat session -->\n```text\n", "```\n<!-- /chat session -->"
COMMAND = "mlx-lora chat --model quickstart-base --adapter quickstart-sql"
QUESTION = "Where does Jigotz Gosvouck have orders?"
# What is typed, each line with Enter behind it.
LINES = (
    "/reset", "/help", "/adapters", QUESTION, "/good", "/rate rated.jsonl", "/good", "/compare base quickstart-sql",
    "/stats", "/base", QUESTION, "/use quickstart-notes", "@note.txt", "/use quickstart-sql", '"""',
    "How many orders", "are in Riga?", '"""', "/set max_tokens 200", "/set temperature 0.4", "/set seed 1", "/set",
    "/retry", "/bad", "/set temperature 0", "/history on", "/think on", "/system Answer in SQL.", "/system", "/edit",
    "", "/save talk.jsonl", "/reset", "/load talk.jsonl", "/clear", "/markdown off", "/?", "exit",
)  # fmt: skip
# Before it, a question whose answer Ctrl-C stops once this is on the screen.
STOPPED, UNTIL = "hello", "VVV"
NOTE = "10 February: pick up Nora Kowalski in Shanghai at 17:50, then go through the parking.\n"
# The line of the cursor when it is time to type: empty, or a line of a block, of which one comes back with /edit.
PROMPT = re.compile(r"(base|quickstart-\w+)> ?|\.\.\. ?(are in Riga\?)?")
SECONDS = 120.0


def written() -> str:
    """The session as the document has it."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)]


class Terminal:
    """A terminal under tmux, with a server of its own."""

    def __init__(self, name: str):
        self._tmux = ["tmux", "-L", name, "-f", "/dev/null"]

    def __call__(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def screen(self) -> str:
        """All lines, those that have scrolled away too; what the terminal folded is one line again."""
        return self("capture-pane", "-p", "-J", "-S", "-").rstrip("\n")

    def wait(self, wanted: re.Pattern[str]) -> None:
        """Wait until the line of the cursor matches, and the screen has come to rest."""
        end, before = time.monotonic() + SECONDS, ""
        while time.monotonic() < end:
            now = self.screen()
            if now == before and wanted.fullmatch(now.rpartition("\n")[2]):
                return
            before = now
            time.sleep(0.3)
        raise TimeoutError(f"the screen never showed {wanted.pattern!r}:\n{before}")

    def type(self, line: str) -> None:
        for part in line:
            self("send-keys", "-l", part if part != ";" else "\\;")
        self("send-keys", "Enter")


@contextmanager
def terminal(folder: Path, home: Path) -> Iterator[Terminal]:
    """A shell in `folder` where `mlx-lora` is this package."""
    shown = Terminal(f"mlx-lora-{os.getpid()}")
    environment = {"MLX_LORA_HOME": str(home), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    settings = [f"{name}={value}" for name, value in environment.items()]
    program = f'mlx-lora() {{ {shlex.quote(sys.executable)} -m mlx_lora "$@"; }}'
    (folder / "start").write_text(f"{program}\nPS1='$ '\nclear\n")
    try:
        shell = ["env", *settings, "bash", "--noprofile", "--rcfile", str(folder / "start"), "-i"]
        shown("new-session", "-d", "-x", "100", "-y", "40", "-c", str(folder), shlex.join(shell))
        shown("set-option", "-g", "history-limit", "5000")
        yield shown
    finally:
        shown("kill-server")


def run(home: Path) -> str:
    """Type the session in a home that `quickstart` has filled; return what the terminal showed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "note.txt").write_text(NOTE)
        with terminal(folder, home) as shown:
            shown.wait(re.compile(r"\$ ?"))
            shown.type(COMMAND)
            shown.wait(PROMPT)
            shown.type(STOPPED)
            _wait_for(shown, UNTIL)
            shown("send-keys", "C-c")
            for line in LINES:
                shown.wait(PROMPT)
                shown.type(line)
            shown.wait(re.compile(r"\$ ?"))
            lines = shown.screen().splitlines()[:-1]
    return "\n".join(line.rstrip() for line in lines).replace(str(home), "~/.mlx-lora").strip() + "\n"


def _wait_for(shown: Terminal, text: str) -> None:
    end = time.monotonic() + SECONDS
    while text not in shown.screen():
        if time.monotonic() > end:
            raise TimeoutError(f"the screen never showed {text!r}:\n{shown.screen()}")
        time.sleep(0.02)


def words(session: str) -> str:
    """A session without its numbers and their units, and without how far an answer came that was stopped."""
    return re.sub(r"\s+", " ", NUMBER.sub("N", re.sub(r"(\w)(?:\s*\1){3,}", r"\1", session)))


def main() -> None:
    """Write what the terminal shows now. The argument is a home, where `quickstart` runs unless it has."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder)
        if not (home / "adapters" / "quickstart-sql").is_dir():
            environment = os.environ | {"MLX_LORA_HOME": str(home)}
            subprocess.run([sys.executable, "-m", "mlx_lora", "quickstart"], check=True, env=environment, cwd=ROOT)
        now = run(home)
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    README.write_text(before + now + after, encoding="utf-8")


if __name__ == "__main__":
    main()
