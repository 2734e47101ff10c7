"""`adapters show` for people: targets by layer, not a hundred names in a line."""

from __future__ import annotations

import pytest

from mlx_lora.store.summary import targets


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([f"model.layers.{i}.self_attn.{n}" for i in range(30) for n in ("q_proj", "v_proj")],
         "q_proj, v_proj × 30 layers"),
        ([f"model.layers.{i}.mlp.down_proj" for i in (26, 27, 28, 29)], "down_proj × 4 layers, 26 to 29"),
        ([f"model.layers.{i}.self_attn.q_proj" for i in (0, 3, 6)] + ["lm_head"], "q_proj × 3 layers; lm_head"),
        (["h.5.attn.c_attn"], "c_attn in layer 5"),
        ([f"layers.{i}.{n}.q_proj" for i in (0, 1) for n in ("self_attn", "cross_attn")],
         "cross_attn.q_proj, self_attn.q_proj × 2 layers"),
    ],
)  # fmt: skip
def test_targets_are_grouped_by_their_layers(modules: list[str], text: str) -> None:
    assert targets(modules) == text
