"""A base without a chat template, given one by the recipe: it travels with the adapter and into a fused model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]
QUICK = ("train.iters=60", "train.batch_size=8", "train.learning_rate=0.02", "adapter.rank=8", "--json",
         "adapter.targets=all-linear", "data.valid_fraction=0")  # fmt: skip
# One answer to learn by heart: whether it is said, and ended, depends on the template alone.
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in "abcdefgh"
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without a chat template."""
    path = write_model(tmp_path_factory.mktemp("bare"))
    (path / "chat_template.jinja").unlink()
    return path


def test_without_a_template_rows_are_refused_with_the_way_out(run: Run, bare: Path, write_rows: Any) -> None:
    ran = run("train", "--model", bare, "--data", write_rows(ROWS), "--name", "mine", *QUICK)
    assert ran.code == 1 and "no chat template; data.template=chatml gives it one" in ran.err


def test_an_unknown_template_is_an_error_that_names_the_nearest(run: Run, bare: Path, write_rows: Any) -> None:
    ran = run("train", "--model", bare, "--data", write_rows(ROWS), "--name", "mine", "data.template=chatlm")
    assert ran.code == 1 and "'chatml'" in ran.err
    ran = run("train", "--model", bare, "--data", write_rows(ROWS), "--name", "mine", "data.template=none.jinja")
    assert ran.code == 1 and "there is no file none.jinja" in ran.err


@pytest.mark.parametrize(
    "template",
    [
        "chatml",
        *(pytest.param(name, marks=pytest.mark.real) for name in ("own.jinja", "llama3", "gemma", "mistral", "alpaca")),
    ],
)
def test_it_answers_through_chat_eval_fuse_and_unmodified_mlx_lm(
    run: Run, bare: Path, write_rows: Any, home: Path, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(ROWS)
    if template == "own.jinja":
        monkeypatch.chdir(tmp_path)
        Path(template).write_text(
            "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}(assistant) {% endif %}"
        )
    ran = run("train", "--model", bare, "--data", rows, "--name", "mine", f"data.template={template}", *QUICK)
    assert ran.code == 0, ran.err
    if template == "chatml":
        assert "the vocabulary has no token <|im_start|>, <|im_end|>" in ran.err
    Path(template).unlink(missing_ok=True)  # the adapter has its own copy
    assert (home / "adapters" / "mine" / "chat_template.jinja").exists()

    answer = run("generate", "--adapter", "mine", "--prompt", "c", "--json", "--max-tokens", "12")
    assert (answer.json["text"].strip(), answer.json["finish_reason"]) == ("yes", "stop"), answer.err
    evaluated = run("eval", "--adapter", "mine", "--data", rows, "--exact", "--max-tokens", "12", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["results"][1]["exact_match"] == 1

    fused = tmp_path / "fused"
    ran = run("fuse", "--adapter", "mine", "--out", fused, "--bits", "16", "--force")
    assert ran.code == 0, ran.err
    model, tokenizer = mlx_lm.load(str(fused))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "c"}], add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=12).strip() == "yes"
    manifest = json.loads((home / "adapters" / "mine" / "manifest.json").read_text())
    assert manifest["template"] == "chat" and manifest["chat_template"]


def test_a_template_file_is_found_again_by_resume_and_fuse_from_elsewhere(
    run: Run, bare: Path, write_rows: Any, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, elsewhere = write_rows(ROWS), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text("{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}(assistant) ")
    words = ("data.template=own.jinja", "train.iters=2", "train.schedule=constant", "train.warmup=0")
    assert run("train", "--model", bare, "--data", rows, "--name", "mine", *words).code == 0
    monkeypatch.chdir(elsewhere)
    resumed = run("train", "--name", "mine", "--resume", "train.iters=4", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["iters"] == 4
    manifest = (home / "adapters" / "mine" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest, "no path of this machine in an adapter that may be given away"
    (tmp_path / "own.jinja").unlink()
    fused = run("fuse", "--adapter", "mine", "--out", tmp_path / "fused", "--data", rows, "--bits", "16", "--force")
    assert fused.code == 0, fused.err
