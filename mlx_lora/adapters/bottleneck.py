"""Bottleneck adapters: a small two-layer network with a residual connection after each sub-layer.

    y = h + up σ(down h),  h = W₀x + b,  σ = GELU

Houlsby et al. (arXiv 1902.00751, figure 2) put one after attention's output projection and one after the MLP's last
linear: targets `outputs`, the method's default. Pfeiffer et al. (2005.00247) leave out the one after attention: for
that, name the MLP's last linear in adapter.targets. `up` starts at zero, so a new adapter changes no bit. The network
isn't linear, so it can't be merged into a weight.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, AdapterLayer, draw, layer_shape
from mlx_lora.adapters.ia3 import FEED_FORWARD
from mlx_lora.adapters.targets import find_targets
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse

# Names of a sub-layer's last linear in mlx-lm's models: of an MLP or expert, of attention or another mixer.
OUTPUTS = FEED_FORWARD | {"o_proj", "out_proj", "wo", "dense", "attn_out", "linear_out", "o_b_proj"}


class Bottleneck(AdapterLayer):
    """down (d, width), down_bias (width,), up (width, d), up_bias (d,); a layer's experts share them; float32."""

    def __init__(self, layer: nn.Module, config: Adapter, key: Any):
        super().__init__()
        outputs, width = layer_shape(layer)[-2], config.bottleneck
        self.linear = layer
        self.down = draw(config, (outputs, width), fan_in=outputs, rank=width, key=key)
        self.down_bias = mx.zeros((width,))
        self.up = mx.zeros((width, outputs))
        self.up_bias = mx.zeros((outputs,))

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> Bottleneck:
        """Wrap a Linear or a SwitchLinear, quantized or not. `key` seeds `down`."""
        return Bottleneck(layer, config, key)

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str] | None:
        """For targets `outputs`: the last linear of every attention block, MLP and expert in the chosen layers."""
        if config.targets != "outputs":
            return None
        linear = find_targets(model, config.model_copy(update={"targets": "all-linear"}))
        if paths := [path for path in linear if path.rpartition(".")[2] in OUTPUTS]:
            return paths
        names = sorted({path.rpartition(".")[2] for path in linear})
        raise AdapterError(
            "no linear of this model has a name that is known to end a sub-layer",
            hint=f"name it in adapter.targets; its layers have: {', '.join(names)}",
        )

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if isinstance(layer, EMBEDDINGS):
            return f"{path} is an embedding; bottlenecks follow linear layers, and method lora serves embeddings"
        return AdapterLayer.refusal(layer, config, path)

    @property
    def base(self) -> nn.Module:
        return self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("down", "down_bias", "up", "up_bias")

    def __call__(self, x: mx.array, *indices: mx.array, **sorting: bool) -> mx.array:
        h = self.linear(x, *indices, **sorting)
        down, down_bias, up, up_bias = (self[name].astype(h.dtype) for name in self.adapter_params())
        return h + mx.addmm(up_bias, nn.gelu(mx.addmm(down_bias, h, down)), up)

    def delta(self) -> mx.array:
        raise _not_linear()

    def fuse(self) -> nn.Module:
        raise _not_linear()


def _not_linear() -> CannotFuse:
    return CannotFuse(
        "a bottleneck adapter is not linear and has no merged form",
        hint="keep it beside its base: chat, serve and eval attach it; lora and dora are methods that merge",
    )
