"""A scorer of the user's own: what it gives is taken, what it does wrong is told, and it always ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.scorer import Scorer

Make = Callable[..., Scorer]

GOOD = """
import sys
from ratio import ratio
print("loading")
def score(wanted, answer):
    print("scoring", answer, file=sys.stdout)
    sys.stdin.read()
    return ratio(wanted, answer)
"""


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Make]:
    made: list[Scorer] = []

    def make(code: str, seconds: float = 20.0) -> Scorer:
        (tmp_path / "own.py").write_text(code)
        made.append(Scorer(tmp_path / "own.py", seconds=seconds))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_its_numbers_are_the_scores_whatever_it_prints_and_imports(scorer: Make, tmp_path: Path) -> None:
    (tmp_path / "ratio.py").write_text("def ratio(a, b): return len(b) / len(a)")
    own = scorer(GOOD)
    assert [own.of("äöü\n ", "x" * count) for count in (0, 1, 5)] == [0, 0.2, 1]
    details = own.details(["a"], ["b"])["scorer"]
    assert details["file"] == "own.py" and len(details["sha256"]) == 64
    process = psutil.Process(own._process.process.pid)
    own.close()
    assert not process.is_running()


BABBLER = """
import os
def score(wanted, answer):
    for descriptor in range(3, 30):
        try: os.write(descriptor, b'[1]\\n')
        except OSError: pass
    return 1
"""
WRONG = {
    "def score(wanted, answer): return 1.5": "1.5",
    "def score(wanted, answer): return float('nan')": "nan",
    "def score(wanted, answer): return 'x'": "'x'",
    "def score(wanted, answer):\n    return {}['key']": r"KeyError: 'key' \(line 2 of own.py\)",
    "def score(wanted, answer): raise SystemExit": "SystemExit",
    "import nowhere": "ModuleNotFoundError",
    "score = 3": "no function score",
    "def score(wanted answer): pass": "SyntaxError",
    "import os\ndef score(wanted, answer): os._exit(0)": "its process ended",
    BABBLER: "isn't a score",
    "import socket\ndef score(wanted, answer): socket.create_connection(('192.0.2.1', 80))": "NetworkBlocked",
}  # fmt: skip


@pytest.mark.parametrize("code", WRONG)
def test_what_it_does_wrong_is_told(scorer: Make, code: str) -> None:
    with pytest.raises(MlxLoraError, match=WRONG[code]) as raised:
        scorer(code).of("wanted text", "answer")
    assert "own.py" in raised.value.message


def test_one_without_end_is_killed_with_what_it_started(scorer: Make) -> None:
    code = (
        "import subprocess, time\ndef score(wanted, answer):\n  subprocess.Popen(['sleep', '60'])\n  while True: pass"
    )
    own = scorer(code, seconds=0.5)
    start = time.monotonic()
    with pytest.raises(MlxLoraError, match="more than"):
        own.of("a", "b")
    assert time.monotonic() - start < 10
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(MlxLoraError, match="absent.py: no such file"):
        Scorer(tmp_path / "absent.py")
