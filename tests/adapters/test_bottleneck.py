"""What is the bottleneck's own: its formula, where it goes, and that it can't be merged."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.attach import build
from mlx_lora.adapters.bottleneck import Bottleneck
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.models import SwitchLinear
from tests.adapters.zoo import network

WIDTH, OUT, IN = 5, 32, 64
OUTPUTS = Adapter(method="bottleneck", bottleneck=WIDTH, targets="outputs")


def wrap(layer: nn.Module) -> Bottleneck:
    wrapper = Bottleneck.from_base(layer, OUTPUTS, path="layer", key=mx.random.key(0))
    for index, name in enumerate(wrapper.adapter_params()):
        wrapper[name] = 0.3 * mx.random.normal(wrapper[name].shape, key=mx.random.key(index))
    return wrapper


def houlsby(h: np.ndarray, wrapper: Bottleneck) -> np.ndarray:
    """h + up GELU(down h), in float64."""
    down, down_bias, up, up_bias = (np.array(wrapper[name], np.float64) for name in wrapper.adapter_params())
    z = h @ down + down_bias
    gelu = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
    return h + gelu @ up + up_bias


def test_output_is_the_base_output_through_the_bottleneck() -> None:
    wrapper, x = wrap(nn.Linear(IN, OUT)), mx.random.normal((2, 3, IN))
    h = np.array(wrapper.base(x), np.float64)
    np.testing.assert_allclose(wrapper(x), houlsby(h, wrapper), rtol=1e-4, atol=1e-5)


def test_experts_share_one_bottleneck() -> None:
    wrapper, chosen = wrap(SwitchLinear(IN, OUT, 4)), mx.array([[0, 3], [1, 1], [2, 0]])
    x = mx.random.normal((3, 1, 1, IN))
    h = np.array(wrapper.base(x, chosen), np.float64)
    np.testing.assert_allclose(wrapper(x, chosen), houlsby(h, wrapper), rtol=1e-4, atol=1e-5)
    assert wrapper.down.shape == (OUT, WIDTH)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gemma3", {"self_attn.o_proj", "mlp.down_proj"}),
        ("phi3 fused qkv", {"self_attn.o_proj", "mlp.down_proj"}),
        ("qwen3 experts", {"self_attn.o_proj", "mlp.switch_mlp.down_proj"}),
        ("mixtral experts", {"self_attn.o_proj", "block_sparse_moe.switch_mlp.down_proj"}),
    ],
)
def test_outputs_are_the_last_linears_of_every_sub_layer(name: str, ends: set[str]) -> None:
    model = network(name)
    assert set(build(model, OUTPUTS)) == {f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ends}
    second = build(model, OUTPUTS.model_copy(update={"layers": [1]}))
    assert set(second) == {f"model.layers.1.{end}" for end in ends}


def test_pfeiffer_is_named_in_targets() -> None:
    found = build(network("llama"), OUTPUTS.model_copy(update={"targets": ["down_proj"]}))
    assert list(found) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_a_network_whose_outputs_are_unknown_says_so_and_names_its_layers() -> None:
    toy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="has a name that is known to end a sub-layer") as caught:
        build(toy, OUTPUTS)
    assert "adapter.targets" in str(caught.value.hint) and "0, 2" in str(caught.value.hint)


def test_an_embedding_is_refused_with_what_works() -> None:
    with pytest.raises(AdapterError, match="method lora serves embeddings"):
        build(network("llama"), OUTPUTS.model_copy(update={"targets": ["embed_tokens"]}))


def test_what_is_not_linear_cannot_merge() -> None:
    wrapper = wrap(nn.Linear(IN, OUT))
    for merge in (wrapper.fuse, wrapper.delta):
        with pytest.raises(CannotFuse, match="not linear") as caught:
            merge()
        assert caught.value.hint
    assert wrapper.fuse_packed() is None
