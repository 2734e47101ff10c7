"""adapters merge, from two trained adapters to one that every other command and mlx_lm take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.adapters.attach import put
from mlx_lora.models.load import load
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.tasks.merge import parse
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def both(trained: Ran, run: Run, data: Path, tiny_path: Path) -> None:
    """`mine` of rank 4, and `yours` of rank 2 (3 for one projection) on fewer modules with another scale."""
    words = ["train", "--model", tiny_path, "--data", data, "--name", "yours", "train.iters=4", "adapter.rank=2",
             "adapter.alpha=3", "train.learning_rate=0.01", "adapter.targets=[q_proj,v_proj]", "seed=1",
             "adapter.rank_pattern={v_proj: 3}"]  # fmt: skip
    assert trained.code == 0 and run(*words).code == 0


def deltas(stored: StoredAdapter) -> dict[str, Any]:
    """ΔWᵀ of every module as the files say it, float64."""
    arrays = {name: np.array(array.astype(mx.float32), np.float64) for name, array in stored.arrays.items()}
    return {
        path: stored.scale * arrays[f"{path}.lora_a"] @ arrays[f"{path}.lora_b"] for path in stored.manifest.modules
    }


def stored(home: Path, name: str) -> StoredAdapter:
    return read(home / "adapters" / name)


@pytest.mark.usefixtures("both")
def test_what_cat_stores_is_the_weighted_sum(run: Run, home: Path, tiny_path: Path) -> None:
    ran = run("adapters", "merge", "mine:0.7", "yours:-1.5", "--name", "sum", "--method", "cat", "--json")
    assert ran.code == 0 and ran.json.keys() == {
        "adapter", "name", "method", "rank", "modules", "relative_error", "bytes",
    }  # fmt: skip
    assert ran.json["rank"] == 7 and ran.json["modules"] == 12 and ran.json["relative_error"] == 0
    mine, yours, merged = (deltas(stored(home, name)) for name in ("mine", "yours", "sum"))
    assert mine.keys() == merged.keys() > yours.keys()
    for path, delta in merged.items():
        expected = 0.7 * mine[path] - 1.5 * yours.get(path, 0.0)
        assert np.linalg.norm(delta - expected) <= 1e-6 * np.linalg.norm(expected), path
    manifest, parent = (stored(home, name).manifest for name in ("sum", "mine"))
    assert manifest.parents == ["mine:0.7", "yours:-1.5"] and manifest.method == "lora"
    assert manifest.base == parent.base and manifest.template == parent.template
    assert manifest.metrics["merge"]["method"] == "cat" and len(manifest.data) == 2 * len(parent.data)


@pytest.mark.usefixtures("both")
def test_every_command_and_mlx_lm_take_what_was_merged(run: Run, home: Path, data: Path, tiny_path: Path) -> None:
    assert run("adapters", "merge", "mine", "yours:0.5", "--name", "sum").code == 0
    assert run("adapters", "verify", "sum", "--model", tiny_path).code == 0
    assert [entry["name"] for entry in run("adapters", "list", "--json").json] == ["mine", "sum", "yours"]
    assert run("generate", "--model", tiny_path, "--adapter", "sum", "--prompt", "say 1", "--max-tokens", 2).code == 0
    words = ["eval", "--model", tiny_path, "--adapter", "mine", "--adapter", "sum", "--data", data, "--json"]
    base, mine, merged = (result["loss"] for result in run(*words).json["results"])
    assert merged < base and merged != mine
    loaded, tokens = load(tiny_path), mx.array([[5, 9, 70, 2, 33]])
    wrappers = wrappers_for(loaded.model, stored(home, "sum"))
    assert wrappers[Q].rank == 6 and wrappers[Q.replace("q_proj", "v_proj")].rank == 7
    assert wrappers[Q.replace("q_proj", "k_proj")].rank == 4, "each module has its own rank, the file has one"
    put(loaded.model, wrappers)
    model, _ = mlx_lm.utils.load(str(tiny_path), adapter_path=str(home / "adapters" / "sum"))
    np.testing.assert_allclose(np.array(model(tokens)), np.array(loaded.model(tokens)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("both")
def test_every_method_stores_an_adapter(run: Run, home: Path, tiny_path: Path) -> None:
    cases: dict[str, tuple[list[Any], int]] = {
        "linear": ([], 7), "svd": ([], 4), "ties": (["--density", 0.4, "--rank", 5], 5),
        "dare_linear": (["--density", 0.4, "--seed", 3], 7), "dare_ties": ([], 7),
        "magnitude_prune": (["--rank", 2], 2),
    }  # fmt: skip
    for method, (words, rank) in cases.items():
        ran = run("adapters", "merge", "mine", "yours", "--name", method, "--method", method, *words, "--json")
        assert ran.code == 0 and ran.json["rank"] == rank, (method, ran.err)
        assert stored(home, method).rank == rank
    dropped = run("adapters", "merge", "mine", "yours", "--name", "again", "--method", "dare_linear", "--density", 0.4)
    assert dropped.code == 0 and "relative error" in dropped.out
    first, other = (deltas(stored(home, name))[Q] for name in ("dare_linear", "again"))
    assert not np.allclose(first, other), "another seed drops other entries"


@pytest.mark.usefixtures("both")
def test_a_tolerance_says_what_it_cost(run: Run, home: Path) -> None:
    words = ["adapters", "merge", "mine", "yours", "--method", "svd", "--json", "--tolerance"]
    loose, tight = (run(*words, tolerance, "--name", f"t{tolerance}").json for tolerance in (0.5, 0.01))
    assert loose["rank"] <= tight["rank"] and loose["bytes"] <= tight["bytes"]
    assert 0.01 < loose["relative_error"] <= 0.5 and tight["relative_error"] <= 0.01
    ran = run(*words, 0.001, "--rank", 1, "--name", "none")
    assert ran.code == 1 and "rank 1 leaves a relative error" in ran.err and "--tolerance" in ran.err
    assert not (home / "adapters" / "none").exists()


def test_names_that_are_taken(trained: Ran, run: Run, home: Path) -> None:
    before = (home / "adapters" / "mine" / "adapters.safetensors").read_bytes()
    refused = run("adapters", "merge", "mine:2", "--name", "mine")
    assert refused.code == 1 and "'mine' exists" in refused.err and "--force" in refused.err
    assert (home / "adapters" / "mine" / "adapters.safetensors").read_bytes() == before
    expected = 2 * deltas(stored(home, "mine"))[Q]
    assert run("adapters", "merge", "mine:2", "--name", "mine", "--force").code == 0
    np.testing.assert_allclose(deltas(stored(home, "mine"))[Q], expected)
    assert not (home / "runs" / "mine").exists(), "the run that made the adapter before is not this one's"


@pytest.mark.usefixtures("both")
def test_adapters_of_different_bases_are_named(run: Run, home: Path) -> None:
    file = home / "adapters" / "yours" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["base"] |= {"name": "other", "fingerprint": "f" * 64}
    file.write_text(json.dumps(manifest))
    ran = run("adapters", "merge", "mine", "yours", "--name", "sum")
    assert ran.code == 1 and "different bases" in ran.err and f"yours over other ({'f' * 12})" in ran.err
    assert "mine over " in ran.err and not (home / "adapters" / "sum").exists()


WRONG: list[tuple[list[str], int, str]] = [
    (["nothing", "--name", "x"], 1, "no adapter 'nothing'"),
    (["mine:much", "--name", "x"], 1, "'mine:much' is not NAME:WEIGHT"),
    (["mine:nan", "--name", "x"], 1, "'mine:nan' is not NAME:WEIGHT"),
    (["mine:", "--name", "x"], 1, "'mine:' is not NAME:WEIGHT"),
    (["mine", "--name", "../x"], 1, "'../x' is not a name"),
    (["mine", "--name", "x", "--method", "svd", "--density", "0.5"], 1, "density is for"),
    (["mine", "--name", "x", "--rank", "2"], 1, "cat keeps every rank"),
    (["mine", "--name", "x", "--method", "mean"], 2, "mean"),
    (["mine"], 2, "--name"),
    (["--name", "x"], 2, "NAME[:WEIGHT]"),
]


def test_what_users_get_wrong(trained: Ran, run: Run, home: Path) -> None:
    for words, code, said in WRONG:
        ran = run("adapters", "merge", *words)
        assert ran.code == code and said in ran.err, ran.err
    assert [path.name for path in (home / "adapters").iterdir()] == ["mine"]


def test_words_with_weights() -> None:
    words = ["sql", "sql:2", "sql:-0.5", "./a:b/sql:1e-2"]
    assert [parse(word) for word in words] == [("sql", 1.0), ("sql", 2.0), ("sql", -0.5), ("./a:b/sql", 0.01)]


@pytest.mark.usefixtures("both")
def test_adapters_merge_says_to_evaluate_both_tasks(run: Run) -> None:
    """A merge said no word of a task that fell from 0.73 to 0."""
    ran = run("adapters", "merge", "mine", "yours", "--name", "sum")
    assert ran.code == 0
    for parent in ("mine", "yours"):
        assert f"mlx-lora eval --model tiny --adapter {parent} --adapter sum --data ROWS_OF_{parent} --exact" in ran.err


@pytest.mark.usefixtures("both")
def test_adapters_merge_with_data_warns_when_a_task_fell(run: Run, data: Path, tiny_path: Path) -> None:
    words = ["adapters", "merge", "mine:-1", "yours", "--name", "sum", "--model", tiny_path, "--data", f"mine={data}"]
    ran = run(*words, "--json")
    (task,) = ran.json["tasks"]
    assert ran.code == 0 and task["parent"] == "mine" and task["fell"] is True and task["kept"] < 0.5
    assert task["merged_loss"] > task["parent_loss"] < task["base_loss"]
    assert "lost most of mine's task" in ran.err
    kept = run("adapters", "merge", "mine", "--name", "same", "--model", tiny_path, "--data", data)
    assert kept.code == 0 and "lost most" not in kept.err and "100%" in kept.out
    refused = run("adapters", "merge", "mine", "--name", "no", "--data", f"other={data}")
    assert refused.code == 1 and "'other' is none of the adapters" in refused.err
