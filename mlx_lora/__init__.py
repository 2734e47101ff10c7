"""mlx-lora: LoRA fine-tuning on this machine, with MLX. See README.md for the commands.

Importing this package imports neither MLX nor mlx_lm and changes nothing in the process; `attach` and `detach` do when
they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlx_lora.adapters.attach import Wrappers

__version__ = "0.1.0"


def attach(model: nn.Module, *, seed: int = 0, **settings: Any) -> Wrappers:
    """Freeze any network of dense layers and attach an adapter to it; returns the wrappers by module path.

    `settings` are the keys of a recipe's `adapter:`, for example method="lora", rank=4, targets="all-linear". What
    trains from then on is the adapter: `nn.value_and_grad(model, …)` and an optimizer of MLX do the rest. Raises
    AdapterError for a target that matches nothing, or for an init that needs rows (eva) or the weights before packing
    (loftq), and pydantic's ValidationError for a setting that isn't one.
    """
    from mlx_lora.adapters.attach import attach as attach_to
    from mlx_lora.config import Adapter
    from mlx_lora.errors import AdapterError

    if settings.get("init") in ("loftq", "eva"):
        raise AdapterError(f"init {settings['init']} needs a recipe", hint="mlx-lora train, or init default")
    model.freeze()
    return attach_to(model, Adapter(**settings), seed=seed)


def detach(model: nn.Module) -> None:
    """Take an adapter off: every wrapped layer's place is given back to that very layer."""
    from mlx_lora.adapters.attach import detach as detach_from

    detach_from(model)


__all__ = ["__version__", "attach", "detach"]
