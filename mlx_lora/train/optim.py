"""Optimizers and learning-rate schedules, by the names a recipe uses. The update rules are MLX's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten

from mlx_lora.config import Train, number

Schedule = Callable[[mx.array], mx.array]


def total_steps(settings: Train, per_epoch: int) -> int:
    """Optimizer steps of a whole run, of which a pass over the rows takes `per_epoch`."""
    return settings.iters or number(settings.epochs) * per_epoch


def schedule(settings: Train, steps: int) -> Schedule:
    """Learning rate as a function of the optimizer step, from 0: linear warm-up, then the chosen shape down to 0."""
    peak = number(settings.learning_rate)
    warmup = math.ceil(settings.warmup * steps) if settings.warmup else 0

    def rate(step: mx.array) -> mx.array:
        rising = (step + 1) / max(warmup, 1)
        progress = mx.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        falling = {
            "constant": lambda: mx.array(1.0),
            "linear": lambda: 1.0 - progress,
            "cosine": lambda: 0.5 * (1.0 + mx.cos(math.pi * progress)),
        }[settings.schedule]()
        return peak * mx.where(step < warmup, rising, falling)

    return rate


def build(settings: Train, steps: int) -> optimizers.Optimizer:
    """The optimizer a recipe asks for, with bias correction where Adam has it.

    With `loraplus_ratio` λ two of them: the one for every `lora_b` learns at λ times the rate, η_B = λ·η_A (LoRA+,
    arXiv 2402.12354, section 5).
    """
    rate = schedule(settings, steps)
    ratio = settings.loraplus_ratio
    if ratio is None:
        return _one(settings, rate)
    faster = _one(settings, lambda step: ratio * rate(step))
    return optimizers.MultiOptimizer([faster, _one(settings, rate)], [lambda path, _: is_b(path)])


def is_b(path: str) -> bool:
    """Whether a trainable array is the factor that LoRA+ gives a rate of its own."""
    return path.rpartition(".")[2] == "lora_b"


def _one(settings: Train, rate: Schedule) -> optimizers.Optimizer:
    decay = settings.weight_decay
    makers: dict[str, Callable[[], optimizers.Optimizer]] = {
        "adam": lambda: optimizers.Adam(rate, bias_correction=True),
        "adamw": lambda: optimizers.AdamW(rate, weight_decay=decay, bias_correction=True),
        "sgd": lambda: optimizers.SGD(rate, momentum=0.9, weight_decay=decay),
        "lion": lambda: optimizers.Lion(rate, weight_decay=decay),
        "adafactor": lambda: optimizers.Adafactor(
            rate, weight_decay=decay, relative_step=False, scale_parameter=False, warmup_init=False
        ),
        "muon": lambda: optimizers.Muon(rate, weight_decay=decay),
    }
    return makers[settings.optimizer]()


def global_norm(gradients: Any) -> mx.array:
    """√Σ‖g‖² over every array of a tree, float32."""
    squares = [mx.square(array.astype(mx.float32)).sum() for _, array in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())
