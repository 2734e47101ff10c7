"""Rows of the embedding, told from config.json alone, and what is done with ids that have none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.data.rows import Row
from mlx_lora.errors import ModelError, TrainingError
from mlx_lora.models import shapes, token_ids
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.models.open import check_architecture, load_tokenizer
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.train.preconditions import check_model
from tests.conftest import VOCABULARY, write_model
from tests.models.test_every_architecture import CONFIGS


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_rows_of_every_architecture_are_known_from_its_configuration() -> None:
    wrong = {}
    for name, config in CONFIGS.items():
        logits = shapes.network(config, gpu=True)(mx.zeros((1, 2), mx.int32))  # never computed
        rows = token_ids.rows_of(config, check_architecture(config)[1])
        if rows != logits.shape[-1]:
            wrong[name] = (rows, logits.shape)
    assert not wrong


def test_a_default_of_mlx_lm_stands_for_a_size_that_config_json_leaves_out() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert token_ids.rows_of(config, check_architecture(config)[1]) == 262208


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_without_a_row_end_nothing(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(tmp_path / "m")
    (path / file).write_text(
        json.dumps({**json.loads((path / "config.json").read_text()), "eos_token_id": [-1, 99999]})
    )
    with caplog.at_level(logging.INFO, "mlx_lora"):
        assert load_tokenizer(path).eos_token_ids == {256}
    assert f"eos_token_id names -1, 99999, the embedding has {VOCABULARY} rows: ignored" in caplog.text


def test_end_tokens_of_which_none_has_a_row_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    change(path / "config.json", eos_token_id=99999)
    change(path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=f"no answer could end: eos_token_id is 99999, the embedding has {VOCABULARY}"):
        load_tokenizer(path)


def test_a_prompt_of_ids_is_refused_before_it_enters_the_model(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    with pytest.raises(ModelError, match=f"id {VOCABULARY}, the model's embedding has {VOCABULARY} rows") as caught:
        next(engine.stream([1, VOCABULARY]))
    assert caught.value.hint == token_ids.HINT
    with pytest.raises(ModelError, match=f"id {VOCABULARY}"):
        next(engine.batch([[1, 2], [VOCABULARY]]))


def test_rows_of_another_source_are_refused_before_they_train(tiny_path: Path) -> None:
    rows = [Row(np.array([1, token], np.int32), np.array([0, 1], np.float32)) for token in (2, VOCABULARY)]
    trunk = take_apart(load(tiny_path).model)
    check_model(trunk, rows[:1])
    with pytest.raises(TrainingError, match=f"token id {VOCABULARY}, the model's embedding has {VOCABULARY} rows"):
        check_model(trunk, rows)
