"""What a confined process reaches: scripts that try each thing, started as the template process is."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.machine import confined

Try = Callable[[str], Any]
# Root may start processes beyond the limit.
AS_NOBODY = "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"


@pytest.fixture
def attempt(tmp_path: Path) -> Try:
    """`attempt(code)`: runs code confined and closed; its `answer`, or the error it ended in, as `Name: message`."""

    def run(code: str, *, before: str = "") -> Any:
        script = tmp_path / "script.py"
        script.write_text(
            "import json, os, shutil, socket, subprocess, sys, ctypes, resource\n"
            "from mlx_lora.machine import confined\n"
            f"{before}\n"
            "confined.close()\n"
            "try:\n"
            f"{textwrap.indent(code, '    ')}\n"
            "except BaseException as error:\n"
            "    answer = f'{type(error).__name__}: {error}'\n"
            "sys.stdout.write(json.dumps(answer))\n"
        )
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        process = confined.start(script, directory=str(empty))
        out, _ = process.communicate(timeout=60)
        assert list(empty.iterdir()) == []
        return json.loads(out) if out else process.returncode

    return run


PRIVATE = {
    "read a file": "answer = open(FILE).read()",
    "read by number": "answer = os.read(os.open(FILE, os.O_RDONLY), 10).decode()",
    "write a file": "answer = open(FILE, 'w').write('x')",
    "append to a file": "answer = open(FILE, 'a').write('x')",
    "write where it stands": "answer = open('here', 'w').write('x')",
    "remove a file": "os.remove(FILE); answer = 'removed'",
    "rename a file": "os.rename(FILE, FILE + 'x'); answer = 'renamed'",
    "empty a file": "os.truncate(FILE, 0); answer = 'emptied'",
    "make a folder": "os.mkdir('folder'); answer = 'made'",
    "remove a folder": "shutil.rmtree(os.path.dirname(FILE)); answer = 'removed'",
    "list a folder": "answer = os.listdir('/')",
    "connect away": "answer = str(socket.create_connection(('192.0.2.1', 443), timeout=1))",
    "connect here": "answer = str(socket.create_connection(('127.0.0.1', 9), timeout=1))",
    "look a name up": "answer = str(socket.getaddrinfo('example.com', 443))",
    "make a socket": "answer = str(socket.socket())",
    "fork": "answer = os.fork() or os._exit(0)",
    "run a program": "answer = subprocess.run(['/bin/echo', 'x']).returncode",
    "run a shell": "answer = os.system('true')",
    "become a program": "os.execv('/bin/echo', ['echo', '1'])",
    "spawn": "answer = os.posix_spawn('/bin/echo', ['echo', '1'], {})",
    "end another process": "answer = os.kill(os.getppid(), 0)",
    "call native code": "answer = ctypes.CDLL(None).getpid()",
}


@pytest.mark.parametrize("way", PRIVATE)
def test_the_template_process_reaches_nothing_through_python(attempt: Any, tmp_path: Path, way: str) -> None:
    file = tmp_path / "outside" / "letters.txt"
    file.parent.mkdir()
    file.write_text("private")
    answer = attempt(PRIVATE[way].replace("FILE", repr(str(file))))
    assert "is refused in this process" in str(answer), answer
    assert file.read_text() == "private"


@pytest.mark.parametrize("call", ["open(b'/etc/passwd', 0)", "socket(2, 1, 0)", "dup(0)", "fork()"])
def test_the_template_process_reaches_nothing_past_python(attempt: Any, call: str) -> None:
    """Native functions looked up before: they work until `close`, then the system refuses."""
    name, _, arguments = call.partition("(")
    before = (
        f"function = ctypes.CDLL(None).{name}\n"
        f"def called():\n    result = function({arguments}\n"
        f"    return result or (os._exit(0) if {name == 'fork'} else 0)\n"
        f"{AS_NOBODY}worked = called() > 0"
    )
    assert attempt("answer = [worked, called()]", before=before) == [True, -1]


def test_the_template_process_writes_to_no_open_file(attempt: Any, tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("private")
    answer = attempt("answer = os.write(opened, b'x')", before=f"opened = os.open({str(file)!r}, os.O_WRONLY)")
    assert "File too large" in answer and file.read_text() == "private"


def test_the_template_process_has_an_empty_environment(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    environment = attempt("answer = dict(os.environ)")
    assert environment.pop("HF_HUB_OFFLINE") == "1" and environment.pop("TZ") == "Asia/Kathmandu"
    assert set(environment) <= {*confined.KEPT, *confined.offline.QUIET_VARIABLES, "TRANSFORMERS_OFFLINE", "LC_CTYPE"}
    assert attempt("answer = [sys.flags.isolated, sys.flags.no_site, sys.flags.ignore_environment]") == [1, 1, 1]


def test_the_template_process_inherits_no_descriptor(attempt: Any, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        answer = attempt("answer = opened", before="opened = sorted(int(each) for each in os.listdir('/dev/fd'))")
    finally:
        os.close(reading)
        os.close(writing)
    assert answer[:3] == [0, 1, 2] and len(answer) == 4, "the fourth is the listing's own"


def test_the_template_process_is_guarded_from_its_start(attempt: Any) -> None:
    before = (
        "try: socket.create_connection(('192.0.2.1', 443), timeout=1)\nexcept Exception as error: early = str(error)"
    )
    assert "blocked a " in attempt("answer = early", before=before)


def test_the_template_process_ends_when_it_computes_for_too_long(attempt: Any) -> None:
    """Also one whose parent was killed and can't stop it; each conversation has the time anew."""
    code = "import time\nfor _ in range(3):\n    confined.limit_processor_time(0.6)\nanswer = 'in time'"
    assert attempt(code) == "in time"
    start = time.process_time()
    assert attempt("confined.limit_processor_time(0.1)\nwhile True: pass") == -signal.SIGXCPU
    assert time.process_time() - start < 1
