"""The names a recipe may use, and where each is built: `module:class`, resolved only when needed.

The command line validates against these tables without importing MLX. Adding a method is one file in `adapters/`
and one line here. A combination of two methods is written with a plus; each wraps its own modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS: dict[str, str] = {
    "lora": "mlx_lora.adapters.lora:LoRA",
    "dora": "mlx_lora.adapters.dora:DoRA",
    "qalora": "mlx_lora.adapters.qalora:QALoRA",
    "glora": "mlx_lora.adapters.glora:GLoRA",
    "vera": "mlx_lora.adapters.vera:VeRA",
    "adalora": "mlx_lora.adapters.adalora:AdaLoRA",
    "ia3": "mlx_lora.adapters.ia3:IA3",
    "bitfit": "mlx_lora.adapters.bitfit:BitFit",
    "prefix": "mlx_lora.adapters.prefix:Prefix",
    "prompt": "mlx_lora.adapters.prompt:Prompt",
    "bottleneck": "mlx_lora.adapters.bottleneck:Bottleneck",
    "full": "mlx_lora.adapters.full:Full",
}
COMBINATIONS: tuple[str, ...] = ("lora+prefix", "lora+prompt")

# Ways to merge adapters (`store.arithmetic`).
MERGES: tuple[str, ...] = ("cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")

# Other tools' formats that `adapters export` writes.
ADAPTER_FORMATS: tuple[str, ...] = ("peft", "mlx-lm")

# Where a method goes when `adapter.targets` doesn't say: attention for the others, and None where the place is its own.
TARGETS: dict[str, str | list[str] | None] = {
    "ia3": ["k_proj", "v_proj", "down_proj"],
    "bitfit": "all-linear",
    "bottleneck": "outputs",
    "full": "all",
    "prefix": None,
    "prompt": None,
}

LOW_RANK: tuple[str, ...] = ("lora", "dora", "qalora", "glora", "vera", "adalora")
# Those whose rank is at most the smaller dimension of the weight: more would train nothing more.
BOUNDED: tuple[str, ...] = ("lora", "dora", "glora", "adalora")
# Adapter settings that only some methods have, a combination having those of both.
SETTINGS: dict[str, tuple[str, ...]] = {
    "rank": LOW_RANK,
    "rank_pattern": ("lora", "dora", "qalora", "glora", "adalora"),
    "alpha": ("lora", "dora", "qalora", "adalora"),
    "alpha_pattern": ("lora", "dora", "qalora", "adalora"),
    "rslora": ("lora", "dora", "qalora", "adalora"),
    "dropout": ("lora", "dora", "qalora", "vera", "adalora"),
    "init": ("lora", "dora", "qalora", "glora", "adalora"),
    "zero_points": ("qalora",),
    "glora": ("glora",),
    "projection_seed": ("vera",),
    "virtual_tokens": ("prefix", "prompt"),
    "position": ("prompt",),
    "bottleneck": ("bottleneck",),
    "target_rank": ("adalora",),
    "prune_from": ("adalora",),
    "prune_until": ("adalora",),
    "prune_every": ("adalora",),
    "orthogonal": ("adalora",),
}

INITIALISATIONS: tuple[str, ...] = ("default", "gaussian", "pissa", "olora", "loftq", "eva")
# Those that start LoRA's factors from the weights or from activations: for LoRA alone.
LORA_ONLY: tuple[str, ...] = ("pissa", "olora", "loftq", "eva")

# Bits per mode, and the group sizes (those MLX has kernels for); the first of each is the mode's own default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
    "nf4": ((4,), (64, 32, 128)),
}


def parts(method: str) -> list[str]:
    """The methods of a combination, or the one."""
    return method.split("+")


def resolve(method: str) -> Any:
    """Import and return the class behind the name of one method."""
    module, _, attribute = METHODS[method].partition(":")
    return getattr(import_module(module), attribute)
