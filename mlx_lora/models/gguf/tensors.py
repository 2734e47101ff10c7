"""What the table of GGUF architectures in `names.py` is made of, and every tensor of a model with known sizes.

A file stores some tensors in another form than MLX, and `Tensor` says in which:

- Rotary pairs. llama.cpp rotates pairs of neighbouring values for llama and granite, MLX the two halves of a head. In
  the files of these two, the rows of q and k (weights and biases) are in the order of pairs. Other architectures rotate
  halves in both programs.
- Norms plus 1. Gemma multiplies by 1 + weight. Its files store that sum, MLX stores the weight.
- Convolutions. A file has (channels, taps), MLX (channels, taps, 1).

Fused matrices (phi3's qkv and gate with up) and stacked experts (E, out, in) have the same order in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Kind = Literal["linear", "embedding", "experts", "norm", "convolution", "vector"]
Bias = Literal["never", "optional", "always"]


@dataclass(frozen=True)
class Setting:
    """One number of config.json (`key`) and its metadata key in a file, which is "<architecture>.<field>"."""

    key: str
    field: str
    type: type[int] | type[float] = int
    # The value where a file has none: a number, or the config key whose value is taken. None: the file must have it.
    default: int | float | str | None = None


@dataclass(frozen=True)
class Place:
    """Where one tensor of a layer, or of the model, stands in MLX; sizes are the names that `sizes_of` computes."""

    path: str
    sizes: str
    kind: Kind = "linear"
    bias: Bias = "never"
    layers: Literal["all", "attention", "convolution"] = "all"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file of a model with known sizes.

    `name` is the file's, without the ending ".weight" or ".bias"; `path` and `parameter` are MLX's module and its
    array. `shape` is the file's, with rows first as numpy has it. `bias` says whether a bias of shape[:-1] exists.
    `heads` is the number of heads whose rows are in the order of rotary pairs, or 0.
    """

    name: str
    path: str
    kind: Kind
    shape: tuple[int, ...]
    bias: Bias = "never"
    heads: int = 0
    plus_one: bool = False
    parameter: str = "weight"

    @property
    def mlx_shape(self) -> tuple[int, ...]:
        """The shape of the unpacked array in MLX."""
        return (*self.shape, 1) if self.kind == "convolution" else self.shape

    def rows_to_mlx(self, values: Array) -> Array:
        """Reorder axis 0 from the file's order to MLX's: of a weight (also in blocks of bytes), bias or LoRA's B."""
        return values[rotary_pairs(len(values), self.heads)] if self.heads else values

    def rows_to_gguf(self, values: Array) -> Array:
        """Reorder axis 0 from MLX's order to the file's: the inverse of `rows_to_mlx`."""
        return values[np.argsort(rotary_pairs(len(values), self.heads))] if self.heads else values

    def weight_to_mlx(self, values: Array) -> Array:
        """The file's weight, as unpacked floats of `shape`, in MLX's form and `mlx_shape`."""
        return self.rows_to_mlx(values - 1 if self.plus_one else values).reshape(self.mlx_shape)

    def weight_to_gguf(self, values: Array) -> Array:
        """MLX's weight, as unpacked floats of `mlx_shape`, in the file's form and `shape`."""
        values = self.rows_to_gguf(values.reshape(self.shape))
        return values + 1 if self.plus_one else values


Layout = dict[str, Tensor]  # by `Tensor.name`


def rotary_pairs(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row in MLX's order (halves of a head), the index of that row in llama.cpp's order (pairs)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Architecture:
    """What one GGUF architecture is called and how its files differ from MLX.

    `model_types` are config.json's; an import writes the first. `model` and `layer` map tensor names to places; the
    names of a layer stand after "blk.N." in a file, its paths after "model.layers.N." in MLX. `head` says whether a
    file may ("optional") or must ("always") have an output matrix beside the embedding, and `tied` what a config.json
    means that doesn't say. `own_head_dim`: the head size is free; otherwise MLX computes it as hidden size / heads.
    `scalings` are the rotary embedding's that MLX's code of the architecture has. `fixed` are entries of config.json
    that every file of the architecture implies. `ignored` are metadata that neither llama.cpp nor MLX uses.
    """

    name: str
    model_types: tuple[str, ...]
    transformers_class: str
    model: Mapping[str, Place]
    layer: Mapping[str, Place]
    settings: tuple[Setting, ...]
    head: Bias = "optional"
    tied: bool = True
    own_head_dim: bool = True
    rotary_pairs: bool = False
    norms_plus_one: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that places name, from a config.json: hidden, inner, queries, keys, …"""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    inner = _inner_size(config)
    return {
        "hidden": hidden, "inner": inner, "vocabulary": config["vocab_size"], "heads": heads, "head": head,
        "queries": queries, "keys": keys, "qkv": queries + 2 * keys, "gate_up": 2 * inner, "hidden3": 3 * hidden,
        "experts": config.get("num_experts") or config.get("num_local_experts") or 0,
        "expert_inner": config.get("moe_intermediate_size") or inner,
        "taps": config.get("conv_L_cache") or 0,
    }  # fmt: skip


def _inner_size(config: Mapping[str, Any]) -> int:
    """The feed-forward size; LFM2 may name it before an adjustment that other settings of its config describe."""
    inner = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim"):
        return inner
    inner = int((config.get("block_ffn_dim_multiplier") or 1) * int(2 * inner / 3))
    multiple = config["block_multiple_of"]
    return int(multiple * ((inner + multiple - 1) // multiple))


def attends(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has attention; LFM2's other layers are short convolutions."""
    if (indices := config.get("full_attn_idxs")) is not None:
        return layer in indices
    types = config.get("layer_types") or []
    return layer >= len(types) or types[layer] != "conv"


def layout_of(architecture: Architecture, config: Mapping[str, Any]) -> Layout:
    """Every tensor of a model with this config.json, by its name in the file, in the order of the layers.

    `config` needs `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size`, and
    where they apply `num_key_value_heads`, `head_dim`, `tie_word_embeddings`, `layer_types`, the numbers of experts.
    """
    sizes = sizes_of(config)
    places = dict(architecture.model)
    tied = config.get("tie_word_embeddings", architecture.tied)
    if architecture.head == "always" or (architecture.head == "optional" and not tied):
        places["output"] = Place("lm_head", "vocabulary hidden")
    layout = {name: _tensor(architecture, name, place, sizes, "") for name, place in places.items()}
    for n in range(config["num_hidden_layers"]):
        kind = "attention" if attends(config, n) else "convolution"
        for name, place in architecture.layer.items():
            if place.layers in ("all", kind):
                tensor = _tensor(architecture, name, place, sizes, f"{n}.")
                layout[tensor.name] = tensor
    return layout


def _tensor(architecture: Architecture, name: str, place: Place, sizes: Mapping[str, int], layer: str) -> Tensor:
    heads = {"attn_q": sizes["heads"], "attn_k": sizes["keys"] // sizes["head"]} if architecture.rotary_pairs else {}
    path, _, parameter = place.path.rpartition(".") if place.kind == "vector" else (place.path, "", "weight")
    return Tensor(
        name=f"blk.{layer}{name}" if layer else name,
        path=f"model.layers.{layer}{path}" if layer else path,
        kind=place.kind,
        shape=tuple(sizes[size] for size in place.sizes.split()),
        bias=place.bias,
        heads=heads.get(name, 0),
        plus_one=architecture.norms_plus_one and place.kind == "norm",
        parameter=parameter,
    )
