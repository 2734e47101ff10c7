"""Chat templates run elsewhere: the same tokens as transformers gives, and an end to those that have none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.errors import ModelError
from mlx_lora.models import template
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.open import load_tokenizer
from mlx_lora.models.template import Job
from tests.conftest import write_tokenizer
from tests.data.conftest import ANSWER, TALK, TEMPLATES, TOOLS

Make = Callable[[str], Any]


def render(tokenizer: Any, messages: Any, tools: Any = (), *, prompt: bool = False) -> list[int]:
    """The tokens of one view of one conversation."""
    chat = ChatFormat(tokenizer)
    there = [{key: value for key, value in each.items() if value is not None} for each in messages]  # as transformers
    view = chat.view(len(messages), prompt=prompt, thinking=None)
    (texts,) = template.render(tokenizer, [Job(there, [view], tools or ())])
    if isinstance(texts, ValueError):
        raise texts
    return chat.encode(texts)[0]


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SEES_ALL = (
    "{{ bos_token is defined }} {{ eos_token }} {{ pad_token }} {{ enable_thinking }} {{ tools is none }} {{ tools }}"
    "{{ documents is none }}{% for m in messages %}{{ m.items() | list }}{% break %}{% endfor %}"
    "{% generation %}é\u2028{% endgeneration %}{{ messages | tojson(indent=2) }}{{ dict(a=1) }}{{ namespace(a=1).a }}"
)


@pytest.fixture
def tokenizer_with(tmp_path: Path) -> Make:
    """`tokenizer_with("{{ … }}")`: the byte tokenizer with a chat template."""

    def make(text: str) -> Any:
        write_tokenizer(tmp_path, template=text)
        (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 256}')
        return load_tokenizer(tmp_path)

    return make


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", ["plain", "thinking", "rewriting", "bare", "tools", "sees all"])
def test_tokens_are_those_that_transformers_gives(tokenizer_with: Make, name: str, prompt: bool) -> None:
    tokenizer = tokenizer_with(SEES_ALL if name == "sees all" else TEMPLATES[name])
    for messages, tools in ((MESSAGES, None), (TALK + ANSWER, TOOLS)):
        expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)
        assert render(tokenizer, messages, tools or (), prompt=prompt) == list(expected)


def test_one_of_several_templates_is_chosen_as_transformers_does(tokenizer_with: Make) -> None:
    tokenizer = tokenizer_with("{{ 1 }}")
    tokenizer._tokenizer.chat_template = {"default": "default", "tool_use": "tools"}
    assert tokenizer.decode(render(tokenizer, MESSAGES, (), prompt=False)) == "default"
    assert tokenizer.decode(render(tokenizer, MESSAGES, TOOLS, prompt=False)) == "tools"


def test_code_that_renders_chats_is_no_template(tokenizer_with: Make) -> None:
    """mlx_lm has its own code for some models, which a template's limits don't concern."""
    tokenizer = tokenizer_with("{% for x in y %}")
    tokenizer._chat_template = lambda messages, **settings: "by code"
    assert tokenizer.decode(render(tokenizer, MESSAGES, (), prompt=False)) == "by code"


ENDLESS = {
    "loop": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{% for i in range(9) %}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
    "generator": "{{ range(90000) | map('string') | map('center', 90000) | list | length }}",
    "power": "{{ 9 ** 99999999 > 1 }}",
    "search": "{{ ('a' * 90000 + 'b') * 9000 in ('a' * 99999) * 9000 }}",
    "text": "{{ 'a' * 20000000 }}",
    "memory": "{{ ('a' * 8000000000) | length }}",
    "padding": "{{ 'a'.ljust(20000000) }}",
    "width": "{{ '%020000000d' % 1 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_templates_without_end_are_stopped(tokenizer_with: Make, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ever, in memory or in text, while jinja compiles or renders: stopped, and the next template renders."""
    monkeypatch.setattr(template, "MOST_SECONDS", 0.4)
    monkeypatch.setattr(template, "MOST_MEMORY", 200 << 20)
    tokenizer = tokenizer_with(ENDLESS[case])
    render(tokenizer_with("warm"), MESSAGES, (), prompt=False)
    start = time.monotonic()
    with pytest.raises((ModelError, ValueError), match="takes more than|wrote 20000000 characters|recursion"):
        render(tokenizer, MESSAGES, (), prompt=False)
    assert time.monotonic() - start < 5
    assert render(tokenizer_with("x"), MESSAGES, (), prompt=False) == tokenizer.encode("x")


@pytest.mark.real
def test_a_template_at_fault_ends_the_reading_of_rows(tokenizer_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit is the template's fault: with a row's, every row would wait for it again."""
    monkeypatch.setattr(template, "MOST_SECONDS", 0.3)
    encoder = Encoder(tokenizer_with(ENDLESS["loop"]), Data())
    with pytest.raises(ModelError, match="chat template takes more than"):
        encoder.rows(Example(messages=tuple(MESSAGES), prompt_messages=1))
    refusing = Encoder(tokenizer_with("{{ raise_exception('no') }}"), Data())
    with pytest.raises(ValueError, match="refuses this conversation: 'no'"):
        refusing.rows(Example(messages=tuple(MESSAGES), prompt_messages=1))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch outside') }}",
        "{% include 'config.json' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    ],
)
def test_templates_reach_nothing(tokenizer_with: Make, text: str) -> None:
    with pytest.raises(ValueError):
        render(tokenizer_with(text), MESSAGES, (), prompt=False)


def test_dates_are_those_of_this_machines_time_zone(tokenizer_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker can't read the zone's file any more when a template asks for the date."""
    template.stop_workers()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")  # not a whole number of hours from any other
    tokenizer = tokenizer_with("{{ strftime_now('%H:%M') }}")
    hours = [datetime.now(ZoneInfo("Asia/Kathmandu")).strftime("%H:%M")]
    tokens = render(tokenizer, MESSAGES, (), prompt=False)
    hours.append(datetime.now(ZoneInfo("Asia/Kathmandu")).strftime("%H:%M"))
    template.stop_workers()
    assert tokenizer.decode(tokens) in hours


def test_a_worker_that_was_killed_is_started_again(tokenizer_with: Make) -> None:
    tokenizer = tokenizer_with("x")
    for _ in range(2):
        render(tokenizer, MESSAGES, (), prompt=False)
        process = template._workers[0].process
        assert process is not None and os.getpgid(process.pid) != os.getpgid(0), "an interrupt would end it too"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert render(tokenizer, MESSAGES, (), prompt=False) == tokenizer.encode("x")


def test_an_interrupted_answer_is_not_taken_for_the_next_ones(
    tokenizer_with: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the worker starts, and while it renders."""
    receive = template._received

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for process_runs in (False, True):
        if not process_runs:
            template.stop_workers()
        monkeypatch.setattr(template, "_received", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(tokenizer_with("first"), MESSAGES, (), prompt=False)
        monkeypatch.setattr(template, "_received", receive)
        tokenizer = tokenizer_with("second")
        assert tokenizer.decode(render(tokenizer, MESSAGES, (), prompt=False)) == "second"


def test_the_worker_ends_with_its_input() -> None:
    worker = template._Worker()
    process = worker.started()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    worker.stop()


@pytest.mark.real
def test_an_interrupt_ends_the_process_however_long_the_template_takes(tmp_path: Path) -> None:
    """The pool's thread waits for a worker then, and Python waits for the thread."""
    write_tokenizer(tmp_path, template=ENDLESS["loop"])
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 256}')
    code = (
        "import sys; from mlx_lora.models.open import load_tokenizer; from mlx_lora.data.encode import Encoder\n"
        "from mlx_lora.config import Data; from mlx_lora.data.example import conversation; from pathlib import Path\n"
        "turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]\n"
        "encoder = Encoder(load_tokenizer(Path(sys.argv[1])), Data()); print('begins', flush=True)\n"
        "list(encoder.encoded(conversation(turns) for _ in range(500)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.wait(timeout=30)
    assert time.monotonic() - start < 5
