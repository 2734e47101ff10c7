"""Every command once on a tiny model: exit codes, the JSON keys that programs rely on, and what lies on disk after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]

TRAIN_KEYS = {
    "adapter", "name", "iters", "epochs", "train_loss", "valid_loss", "best_valid_loss", "trained_tokens",
    "computed_tokens", "padding_fraction", "seconds", "tokens_per_second", "peak_memory_bytes",
    "trainable_parameters", "skipped_steps", "stopped_by",
}  # fmt: skip


def test_train_writes_an_adapter_and_a_run(trained: Ran, home: Path, data: Path) -> None:
    assert trained.code == 0 and trained.json.keys() >= TRAIN_KEYS
    assert trained.json["adapter"] == str(home / "adapters" / "mine")
    assert {file.name for file in (home / "adapters" / "mine").iterdir()} == {
        "adapters.safetensors", "adapter_config.json", "manifest.json",
    }  # fmt: skip
    events = [json.loads(line)["event"] for line in (home / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert events == ["started", "evaluated", "step", "step", "step", "step", "evaluated", "finished"]
    manifest = json.loads((home / "adapters" / "mine" / "manifest.json").read_text())
    assert manifest["data"][0]["rows"] == 24 and manifest["template"] == "chat"
    assert home.stat().st_mode & 0o777 == 0o700


def test_training_text_is_not_in_the_home(trained: Ran, home: Path) -> None:
    """Nothing but the adapter, the recipe and numbers: training data is never copied into the run directory."""
    for file in home.rglob("*"):
        assert not file.is_file() or b"twice" not in file.read_bytes(), file


def test_a_stopped_run_goes_on_by_its_name_alone(
    run: Callable[..., Ran], data: Path, tiny_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    words = ["--model", tiny_path, "--data", data.name, "--json", "train.iters=4", "adapter.rank=4"]
    assert run("train", *words, "--name", "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("mlx_lora.cli.train.StopSignal.__call__", lambda stop: stops(stop, home))
        assert run("train", *words, "--name", "mine").code == 130
    assert "unfinished run" in (refused := run("train", *words, "--name", "mine")).err and refused.code == 1
    monkeypatch.chdir(home)
    ran = run("train", "--name", "mine", "--resume", "--json")
    assert ran.code == 0 and ran.json["iters"] == 4 and ran.json["stopped_by"] == "iters"
    weights = [(home / "adapters" / name / "adapters.safetensors").read_bytes() for name in ("mine", "whole")]
    assert weights[0] == weights[1]
    assert run("train", "--name", "mine", "--resume").code == 1, "there is nothing left to do"


def stops(stop: Any, home: Path) -> bool:
    """Ask to stop once two steps are written, as SIGINT would; on a GPU two can be written at once."""
    metrics = home / "runs" / "mine" / "metrics.jsonl"
    if metrics.is_file() and metrics.read_text().count('"event": "step"') >= 2:
        stop.code = 130
    return stop.code != 0


def test_train_again_is_refused_and_force_replaces_with_the_same_bytes(
    trained: Ran, run: Run, home: Path, data: Path, tiny_path: Path
) -> None:
    words = ["train", "--model", tiny_path, "--data", data, "--name", "mine", "train.iters=4", "train.batch_size=4",
             "train.learning_rate=0.01", "adapter.rank=4"]  # fmt: skip
    weights = home / "adapters" / "mine" / "adapters.safetensors"
    before = weights.read_bytes()
    refused = run(*words)
    assert refused.code == 1 and "exists" in refused.err and "--force" in refused.err
    assert run(*words, "--force").code == 0
    assert weights.read_bytes() == before


def test_adapters_show_is_a_summary(trained: Ran, run: Run) -> None:
    """A few short lines; the whole manifest is what `--json` prints."""
    shown = dict(line.split(maxsplit=1) for line in run("adapters", "show", "mine").out.splitlines())
    assert shown["targets"] == "k_proj, o_proj, q_proj, v_proj × 3 layers"
    assert (shown["name"], shown["method"], shown["rank"], shown["scale"]) == ("mine", "lora", "4", "4")
    assert shown["base"].startswith("tiny (") and "train.jsonl: 24 rows, " in shown["data"]
    assert "best validation " in shown["loss"] and shown["steps"] == "4" and shown["size"].endswith("kB")
    assert all(len(text) < 120 for text in shown.values())
    assert len(run("adapters", "show", "mine", "--json").json["modules"]) == 12


def test_eval_base_first_then_each_adapter(trained: Ran, run: Run, data: Path, tiny_path: Path) -> None:
    ran = run("eval", "--model", tiny_path, "--adapter", "mine", "--data", data, "--exact", "--max-tokens", 4, "--json")
    results = ran.json["results"]
    assert [result["adapter"] for result in results] == [None, "mine"]
    assert all(
        result.keys() >= {"adapter", "loss", "perplexity", "tokens", "rows", "exact_match"} for result in results
    )
    assert results[1]["loss"] < results[0]["loss"] and results[0]["rows"] == 5
    without = run("eval", "--model", tiny_path, "--data", data, "--json").json["results"]
    assert [(r["adapter"], r["exact_match"]) for r in without] == [(None, None)]
    assert without[0]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


def test_generate(trained: Ran, run: Run, tiny_path: Path) -> None:
    words = ["generate", "--model", tiny_path, "--adapter", "mine", "--prompt", "say 3 twice", "--max-tokens", 5]
    ran = run(*words, "--json")
    assert ran.json.keys() == {"text", "prompt_tokens", "generated_tokens", "tokens_per_second", "finish_reason"}
    assert ran.json["prompt_tokens"] == len("say 3 twice") + 4  # <|user|> … <|end|> newline <|assistant|>
    assert run(*words).out.rstrip("\n") == ran.json["text"].rstrip("\n")
    assert run(*words, "--raw", "--json").json["prompt_tokens"] == len("say 3 twice")


def test_quantize_reports_what_it_cost(run: Run, tiny_path: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    ran = run("quantize", tiny_path, out, "--bits", 4, "--group-size", 32, "--verify", data, "--json")
    assert ran.json.keys() >= {
        "bits_per_weight", "bytes", "mode", "bits", "group_size", "relative_error", "kl", "top1_agreement",
        "perplexity_before", "perplexity_after",
    }  # fmt: skip
    assert 0 < ran.json["relative_error"] < 0.2 and ran.json["kl"] > 0
    again = run("quantize", out, tmp_path / "again", "--bits", 3, "--group-size", 32)
    assert again.code == 0 and "half precision" in again.err
    assert run("quantize", tiny_path, out).code == 1


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_every_mode_trains_and_answers(run: Run, tiny_path: Path, data: Path, mode: str) -> None:
    words = ["train", "--model", tiny_path, "--data", data, "--name", mode, "train.iters=2", f"quantize.mode={mode}"]
    assert run(*words).code == 0
    ran = run("eval", "--model", tiny_path, "--adapter", mode, "--data", data, "--json")
    assert ran.code == 0 and len(ran.json["results"]) == 2


def test_fuse_measures_and_writes_a_model(trained: Ran, run: Run, tiny_path: Path, data: Path, tmp_path: Path) -> None:
    words = ["fuse", "--model", tiny_path, "--adapter", "mine", "--out", tmp_path / "fused"]
    ran = run(*words, "--data", data, "--json")
    assert ran.json.keys() == {
        "out", "bits", "kl", "top1_agreement", "delta_survival", "bytes", "carried", "zero_points_bytes",
    }  # fmt: skip
    assert ran.json["delta_survival"] > 0.99 and ran.json["kl"] < 1e-3
    assert run(*words).code == 1
    assert run(*words, "--force").code == 0  # measured on generated text this time
    assert run("generate", "--model", tmp_path / "fused", "--prompt", "say 1 twice", "--max-tokens", 2).code == 0


def test_adapters_commands(trained: Ran, run: Run, home: Path, tiny_path: Path) -> None:
    (entry,) = run("adapters", "list", "--json").json
    assert entry.keys() == {"name", "method", "rank", "base", "bytes", "valid_loss", "created", "state"}
    assert entry["name"] == "mine" and entry["rank"] == 4
    assert run("adapters", "show", "mine", "--json").json["method"] == "lora"
    assert run("adapters", "path", "mine").out.strip() == str(home / "adapters" / "mine")
    assert run("adapters", "verify", "mine", "--model", tiny_path).code == 0
    assert run("adapters", "rename", "mine", "yours").code == 0
    assert (home / "runs" / "yours").is_dir() and not (home / "runs" / "mine").exists()
    assert run("adapters", "remove", "yours").code == 1  # no terminal to ask on
    assert run("adapters", "remove", "yours", "--yes").code == 0
    assert run("adapters", "list", "--json").json == [] and not (home / "runs" / "yours").exists()


def test_doctor(run: Run) -> None:
    facts: dict[str, Any] = run("doctor", "--json").json
    assert facts["device"] in ("cpu", "gpu") and facts["memory_bytes"] > 0 and facts["adapters"] == []
    assert run("doctor").code == 0


@pytest.mark.real
def test_an_adapter_over_a_base_quantized_on_the_way_in(run: Run, data: Path, tiny_path: Path, tmp_path: Path) -> None:
    """It belongs to the quantized base: a plain directory is quantized on loading, a quantized one is used as it is."""
    words = ["train", "--model", tiny_path, "--data", data, "--name", "q", "train.iters=2", "quantize.bits=4"]
    assert run(*words, "quantize.group_size=32").code == 0
    assert run("quantize", tiny_path, tmp_path / "q4", "--bits", 4, "--group-size", 32).code == 0
    losses = []
    for base in (tiny_path, tmp_path / "q4"):
        results = run("eval", "--model", base, "--adapter", "q", "--data", data, "--json").json["results"]
        losses.append([result["loss"] for result in results])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert run("quantize", tiny_path, tmp_path / "q8", "--bits", 8).code == 0
    refused = run("eval", "--model", tmp_path / "q8", "--adapter", "q", "--data", data)
    assert refused.code == 1 and "another base" in refused.err


@pytest.mark.real
def test_each_adapter_is_evaluated_with_the_settings_it_was_trained_with(run: Run, data: Path, tiny_path: Path) -> None:
    for name, template in (("chatty", "chat"), ("plain", "none")):
        words = ["train", "--model", tiny_path, "--data", data, "--name", name, "train.iters=1"]
        assert run(*words, f"data.template={template}").code == 0
    alone = [run("eval", "--model", tiny_path, "--adapter", name, "--data", data, "--json").json["results"][1]["loss"]
             for name in ("chatty", "plain")]  # fmt: skip
    both = run("eval", "--model", tiny_path, "--adapter", "chatty", "--adapter", "plain", "--data", data, "--json")
    assert [result["loss"] for result in both.json["results"][1:]] == alone


def test_adapters_of_one_name_in_two_places_are_two(
    trained: Ran, run: Run, home: Path, data: Path, tiny_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "adapters" / "mine", tmp_path / "mine")
    words = [
        "eval",
        "--model",
        tiny_path,
        "--adapter",
        "mine",
        "--adapter",
        tmp_path / "mine",
        "--data",
        data,
        "--json",
    ]
    names = [result["adapter"] for result in run(*words).json["results"]]
    assert len(names) == len(set(names)) == 3


@pytest.mark.parametrize("word", ["train.batch_size=3", "model=x", "data.path=/nowhere"])
def test_settings_that_eval_does_not_use_are_errors(run: Run, data: Path, tiny_path: Path, word: str) -> None:
    ran = run("eval", "--model", tiny_path, "--data", data, word)
    assert ran.code == 1 and "only data settings" in ran.err


def test_a_manifest_holds_no_path_of_this_machine(trained: Ran, home: Path, tmp_path: Path) -> None:
    """An adapter may be given away."""
    manifest = (home / "adapters" / "mine" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and "/" not in json.loads(manifest)["recipe"]["model"]


def test_losses_that_are_not_finite_end_with_an_explanation_and_what_there_was(
    run: Run, home: Path, data: Path, tiny_path: Path
) -> None:
    words = ["train", "--model", tiny_path, "--data", data, "--name", "hot", "train.learning_rate=1e30", "--json",
             "train.optimizer=sgd", "train.max_grad_norm=null", "train.iters=12", "train.warmup=0"]  # fmt: skip
    ran = run(*words)
    assert ran.code == 1 and "not finite" in ran.err and "learning_rate" in ran.err
    assert ran.json["stopped_by"] == "nonfinite" and (home / "adapters" / "hot").is_dir()
    assert "NaN" not in (home / "runs" / "hot" / "metrics.jsonl").read_text()


def test_out_may_not_be_the_model_itself(trained: Ran, run: Run, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    for words in (["quantize", base, base], ["fuse", "--model", base, "--adapter", "mine", "--out", base]):
        ran = run(*words, "--force")
        assert ran.code == 1 and "model itself" in ran.err


def test_a_table_in_a_pipe_is_not_folded(trained: Ran, run: Run) -> None:
    assert run("adapters", "rename", "mine", "m" * 100).code == 0
    assert "m" * 100 in run("adapters", "list").out
