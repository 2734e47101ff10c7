"""How long a context a config.json allows."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_lora.models.context import context_length


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        ({"text_config": {"max_position_embeddings": 1024}, "vision_config": {"max_position_embeddings": 9}}, 1024),
        ({"n_positions": 1024}, 1024),
        ({"model_type": "mamba"}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "8192"}, None),
        ({"max_position_embeddings": True}, None),
        # Qwen's own instructions leave the setting at what it was before scaling
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        # Llama 3's setting is the scaled one already
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": "x"}}, 2048),
    ],
)
def test_the_context_of_a_configuration(config: dict[str, Any], length: int | None) -> None:
    assert context_length(config) == length
