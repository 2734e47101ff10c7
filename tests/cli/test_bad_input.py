"""What users get wrong: exit code 1 (2 for usage), one error that says what and where, a hint, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


def left_behind(home: Path) -> list[str]:
    """Adapters, runs and hidden directories in the home."""
    return sorted(path.name for kind in ("adapters", "runs") for path in (home / kind).glob("*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["train.jsonl", "is empty"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a",', ["train.jsonl:2", "not valid JSON"]),
        (
            '{"prompt": "a", "completion": "b"}\n{"text": "plain"}\n',
            ["train.jsonl:2", "not a row of format completions"],
        ),
        ('{"prompt": "a", "completion": ""}\n', ["train.jsonl:1", "'completion' is empty"]),
        ('{"question": "a"}\n', ["train.jsonl:1", "no format has the keys", "'question'"]),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', ["train.jsonl:1", "role 'robot'"]),
        ('{"prompt": "' + "x" * 3000 + '", "completion": "b"}\n', ["train.jsonl:1", "max_seq_length"]),
        ("[1, 2]\n", ["train.jsonl:1", "a row is a JSON object"]),
    ],
    ids=["empty", "json", "mixed", "empty-answer", "keys", "role", "too-long", "list"],
)
def test_bad_rows(run: Run, home: Path, tmp_path: Path, tiny_path: Path, content: str, said: list[str]) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    ran = run("train", "--model", tiny_path, "--data", file, "--name", "bad", "train.iters=1")
    assert ran.code == 1
    for part in said:
        assert part in ran.err
    assert left_behind(home) == []


def test_a_role_the_template_refuses(run: Run, tmp_path: Path, tiny_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y"}]})
    )
    ran = run("train", "--model", tiny_path, "--data", file, "--name", "bad")
    assert ran.code == 1 and "train.jsonl:1" in ran.err and "chat template" in ran.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "nothing.yaml"], 1, ["no such recipe"]),
        (["train", "adapter.rnak=3", "--name", "x"], 1, ["adapter.rnak", "adapter.rank"]),
        (
            ["train", "data.packing=some", "train.batch_size=many", "--name", "x"],
            1,
            ["data.packing", "train.batch_size"],
        ),
        (["train", "--name", "x"], 1, ["model", "data.path"]),
        (["train", "--model", "nowhere", "--data", "x", "--name", "../x"], 1, ["nowhere"]),
        (["train", "--resume"], 1, ["model", "data.path"]),
        (["train", "--resume", "--name", "nowhere"], 1, ["no run 'nowhere'"]),
        (["plan"], 1, ["which model"]),
        (["study", "adapters"], 2, ["adapters"]),
        (["generate", "--model", "nowhere", "--prompt", "x"], 1, ["nowhere", "pull"]),
        (["generate", "--model", "some/repo", "--prompt", "x"], 1, ["some/repo", "mlx-lora pull some/repo"]),
        (["eval", "--model", "nowhere"], 2, ["--data"]),
        (["adapters", "show", "../../no-such-place"], 1, ["no adapter", "../../no-such-place"]),
        (["adapters", "remove", "..", "--yes"], 1, ["'..'"]),
        (["adapters", "rename", "a", "b/../c"], 1, ["a"]),
        (["data", "check", "nowhere"], 1, ["nowhere", "no such file"]),
        (["import-gguf", "nowhere.gguf", "out"], 1, ["nowhere.gguf"]),
        (["quantize", "nowhere", "out"], 1, ["nowhere"]),
        (["quantize", "nowhere", "out", "--bits", "7"], 1, ["bits 7", "2, 3, 4, 5, 6, 8"]),
        (["quantize", "nowhere", "out", "--mode", "nf3"], 2, ["nf3"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_words(run: Run, home: Path, words: list[str], code: int, said: list[str]) -> None:
    ran = run(*words)
    assert ran.code == code
    assert sum(line.startswith("error: ") for line in ran.err.splitlines()) == 1
    for part in said:
        assert part in ran.err
    assert left_behind(home) == [] and not Path("out").exists()


def without(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).unlink()
    return path


@pytest.mark.parametrize(
    ("removed", "added", "said"),
    [
        (["model.safetensors"], {}, "weights"),
        (["tokenizer.json"], {}, "a tokenizer"),
        (["config.json"], {}, "config.json is missing"),
        (["model.safetensors"], {"pytorch_model.bin": "x"}, "never read"),
        ([], {"config.json": "{"}, "not readable as JSON"),
        ([], {"config.json": '{"model_type": "llama", "model_file": "evil.py"}'}, "model_file"),
        ([], {"config.json": '{"model_type": "no-such-architecture"}'}, "can't be loaded"),
        ([], {"model.safetensors": "no tensors here"}, "can't be loaded"),
    ],
    ids=["weights", "tokenizer", "config", "pickle", "json", "model_file", "architecture", "safetensors"],
)
def test_bad_model_directories(run: Run, tmp_path: Path, removed: list[str], added: dict[str, str], said: str) -> None:
    path = without(write_model(tmp_path / "model"), *removed)
    for name, text in added.items():
        (path / name).write_text(text)
    ran = run("generate", "--model", path, "--prompt", "x")
    assert ran.code == 1 and said in ran.err


def test_an_adapter_for_another_base(run: Run, trained: Ran, tmp_path: Path, data: Path) -> None:
    other = write_model(tmp_path / "other", seed=5)
    for words in (["generate", "--prompt", "x"], ["eval", "--data", data], ["fuse", "--out", tmp_path / "out"]):
        ran = run(words[0], "--model", other, "--adapter", "mine", *words[1:])
        assert ran.code == 1 and "another base" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter(run: Run, trained: Ran, home: Path) -> None:
    weights = home / "adapters" / "mine" / "adapters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ran = run("adapters", "verify", "mine")
    assert ran.code == 1 and "manifest" in ran.err
    shutil.copyfile(__file__, weights)
    assert "not a readable safetensors" in run("adapters", "verify", "mine").err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_lora.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "no\x1bwhere", "--prompt", "x", "--debug"])
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback (most recent call last)" in printed and "ModelError" in printed
    assert "\x1b" not in printed and r"no\x1bwhere" in printed


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a directory that nobody can write to, not even root")
def test_a_home_that_can_t_be_written_to_says_which_path_and_not_unexpected(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_LORA_HOME", "/proc/self")
    assert run("adapters", "list").code == 0
    ran = run("adapters", "rename", "a", "b")
    assert ran.code == 1 and "/proc/self/.locks" in ran.err and "MLX_LORA_HOME" in ran.err
    assert "unexpected" not in ran.err


def test_a_home_that_is_a_file_is_said_to_be_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_LORA_HOME", str(tmp_path / "file"))
    for words in (["adapters", "list"], ["generate", "--model", "x", "--prompt", "x"], ["doctor"]):
        ran = run(*words)
        assert ran.code == 1 and f"{tmp_path / 'file'} is not a directory" in ran.err and "unexpected" not in ran.err
