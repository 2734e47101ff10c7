"""The model card: what a model was made of, nothing of the rows, and the base's licence as its own files have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mlx_lora.interop.card import UNKNOWN_LICENCE, card, licence_of
from mlx_lora.store.manifest import Base, Manifest

MANIFEST = Manifest(
    method="lora",
    adapter={"rank": 4},
    modules=["q"],
    scales={"q": 2.0},
    base=Base(name="owner/base: \"x\"", fingerprint="f" * 64, quantization={"bits": 4, "mode": "affine"}),
    recipe={"adapter": {"rank": 4, "targets": ["q_proj"]}, "train": {"learning_rate": 2e-4, "iters": None}, "data": {}},
    data=[{"file": "my-diary.jsonl", "rows": 24, "tokens": 480, "sha256": "d" * 64, "answers": 1}],
    metrics={"valid_loss": 0.12345, "iters": 4, "stopped_by": None},
)  # fmt: skip


def test_a_card_says_what_a_model_was_made_of() -> None:
    text = card(MANIFEST, name="mine", form="MLX model, fused", checked=["KL 0.01"], use=["run it\n# so"])
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": 'owner/base: "x"', "license": "other", "pipeline_tag": "text-generation",
        "tags": ["mlx-lora", "lora"],
    }  # fmt: skip
    for line in (
        "# mine", "- method: lora", "- adapter.rank: `4`", '- adapter.targets: `["q_proj"]`',
        "- train.learning_rate: `0.0002`", f"- file 1: 24 rows, 480 tokens, sha256 `{'d' * 64}`",
        "- validation loss: 0.1235", "- steps: 4", "- KL 0.01", "- run it # so", "quantized to 4 bits (affine)",
    ):  # fmt: skip
        assert line in body, line
    assert "diary" not in text and "iters: `null`" not in text and f"Licence of the base: {UNKNOWN_LICENCE}." in body


def test_an_adapter_from_elsewhere_and_without_a_check_says_so() -> None:
    manifest = Manifest(method="dora", adapter={"rank": 8}, modules=["q"], scales={"q": 1.0})
    text = card(manifest, name="theirs", form="GGUF model")
    assert "base_model" not in text and "the base `not known`" in text and "- adapter.rank: `8`" in text
    assert "was not compared" in text


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, UNKNOWN_LICENCE),
        ({"README.md": "---\nlicense: apache-2.0\nx: y\n---\n"}, "apache-2.0"),
        ({"README.md": '---\nlicense: other\nlicense_name: "gemma"\n---\n'}, "gemma"),
        ({"README.md": "license: mit\n"}, UNKNOWN_LICENCE),
        ({"README.md": "---\nlicense: other\n---\n", "LICENSE.txt": "…"}, "see LICENSE.txt of the base"),
        ({"COPYING": "…", "licence": "…"}, "see COPYING of the base"),
    ],
)
def test_the_licence_is_what_the_bases_files_say(files: dict[str, str], licence: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert licence_of(tmp_path) == licence
    front = card(MANIFEST, name="m", form="f", base=tmp_path).split("---\n")[1]
    assert yaml.safe_load(front)["license"] == (licence if licence in ("apache-2.0", "gemma") else "other")
    assert json.dumps(licence)
