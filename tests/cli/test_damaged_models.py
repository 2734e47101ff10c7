"""Tokens without a row in the embedding, and logits that aren't finite: every command says so and exits with 1."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.cli.conftest import Ran
from tests.conftest import VOCABULARY, questions, write_model

Run = Callable[..., Ran]
ADDED = f"token '<|new|>' has id {VOCABULARY}, the model's embedding has {VOCABULARY} rows"
ROW = {"prompt": "say <|new|>", "completion": "x"}


@pytest.fixture
def with_added_token(tmp_path: Path) -> Path:
    """A model whose tokenizer has one token more than its embedding has rows."""
    path = write_model(tmp_path / "added")
    change_tokenizer(path, lambda content: content["added_tokens"].append(added(VOCABULARY)))
    return path


def added(token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": "<|new|>", "special": True, **flags}


def change_tokenizer(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "MODEL", "--data", "FILE", "--name", "mine"],
        ["plan", "--model", "MODEL", "data.path=FILE"],
        ["data", "check", "FILE", "--model", "MODEL"],
        ["eval", "--model", "MODEL", "--data", "FILE"],
        ["eval", "--model", "MODEL", "--data", "FILE", "--exact"],
        ["quantize", "MODEL", "OUT", "--group-size", "32", "--verify", "FILE"],
    ],
    ids=" ".join,
)
def test_a_token_beyond_the_embedding_is_named_with_file_and_line(
    run: Run, command: list[str], with_added_token: Path, write_rows: Callable[..., Path], tmp_path: Path, home: Path
) -> None:
    file = write_rows([*questions(3), ROW])
    paths = {"MODEL": with_added_token, "FILE": file, "OUT": tmp_path / "out", "data.path=FILE": f"data.path={file}"}
    ran = run(*(paths.get(word, word) for word in command))
    assert ran.code == 1 and f"{file}:4: {ADDED}: use the model's own tokenizer" in ran.out + ran.err
    assert not (tmp_path / "out").exists() and not [*home.glob("adapters/*"), *home.glob("runs/*")]


def test_a_token_beyond_the_embedding_is_refused_in_a_prompt(run: Run, with_added_token: Path) -> None:
    ran = run("generate", "--model", with_added_token, "--prompt", "say <|new|>")
    assert ran.code == 1 and ran.out == "" and ADDED in ran.err
    ran = run("generate", "--model", with_added_token, "--prompt", "say", "--max-tokens", "2")
    assert ran.code == 0


def test_a_chat_goes_on_after_a_token_beyond_the_embedding(
    run: Run, with_added_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", iter_of(["<|new|>\n", "/set max_tokens 2\n", "hello\n"]))
    ran = run("chat", "--model", with_added_token)
    assert ran.code == 0 and ADDED in ran.err and ran.out.strip()


class iter_of:
    """Lines as a script's stdin."""

    def __init__(self, lines: list[str]):
        self.lines = lines

    def __iter__(self) -> Any:
        return iter(self.lines)

    def isatty(self) -> bool:
        return False


def test_fuse_is_measured_on_no_token_beyond_the_embedding(
    run: Run, trained: Ran, tiny_path: Path, with_added_token: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (with_added_token / "model.safetensors").write_bytes((tiny_path / "model.safetensors").read_bytes())
    file = write_rows([ROW], name="rows.jsonl")
    out = tmp_path / "fused"
    ran = run("fuse", "--model", with_added_token, "--adapter", "mine", "--data", file, "--out", out)
    assert ran.code == 1 and f"{file}:1: {ADDED}" in ran.err and not out.exists()


@pytest.mark.real
def test_a_tokenizer_of_another_model_ends_no_process(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "other")
    far = 500_000_000  # rows beyond the embedding, where nothing can be read
    change_tokenizer(path, lambda content: content["model"]["vocab"].update(x=far))
    file = write_rows([*questions(3), {"prompt": "say x", "completion": "x"}])
    command = ["train", "--model", str(path), "--data", str(file), "--name", "mine", "data.valid_fraction=0"]
    done = subprocess.run([sys.executable, "-m", "mlx_lora", *command], capture_output=True, text=True)
    assert done.returncode == 1, done.returncode  # a segmentation fault is -11
    assert f"{file}:4: token 'x' has id {far}" in done.stderr


def of_a_broken_base(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 0.0}))


def of_broken_weights(path: Path) -> None:
    file = str(path / "model.safetensors")
    arrays: Any = mx.load(file)
    arrays["model.layers.1.self_attn.q_proj.weight"][3, 4] = float("nan")
    mx.eval(arrays)
    mx.save_safetensors(file, arrays, {"format": "mlx"})


CAUSES = {
    "rope_theta": (of_a_broken_base, ["layer 0 (TransformerBlock) is the first", "rope_theta"]),
    "weights": (of_broken_weights, ["model.layers.1.self_attn.q_proj", "holds NaN or infinity", "damaged"]),
}


@pytest.fixture(params=CAUSES)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A model without a finite logit, and what an error has to say of it."""
    damage, said = CAUSES[request.param]
    path = write_model(tmp_path / "damaged")
    damage(path)
    return path, ["the model's logits aren't finite", *said]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--model", "MODEL", "--prompt", "hello"],
        ["eval", "--model", "MODEL", "--data", "DATA"],
        ["train", "--model", "MODEL", "--data", "DATA", "--name", "mine", "train.iters=2"],
        ["train", "--model", "MODEL", "--data", "DATA", "--name", "mine", "train.iters=2", "adapter.init=eva"],
    ],
    ids=" ".join,
)
def test_logits_that_are_not_finite_end_a_command(
    run: Run, command: list[str], damaged: tuple[Path, list[str]], data: Path, home: Path
) -> None:
    path, said = damaged
    ran = run(*({"MODEL": path, "DATA": data}.get(word, word) for word in command))
    assert ran.code == 1 and "<unk>" not in ran.out
    for part in said:
        assert part in ran.err
    assert not re.search(r"\bstep \d", ran.err) and not list(home.glob("adapters/*")) and not list(home.glob("runs/*"))


def test_logits_that_are_not_finite_end_a_chat(
    run: Run, damaged: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = damaged
    monkeypatch.setattr("sys.stdin", iter_of(["hello\n", "again\n"]))
    ran = run("chat", "--model", path)
    assert ran.code == 1 and ran.err.count(said[0]) == 1
