"""AdaLoRA's rule (arXiv 2303.10512): which triplets stay within a falling budget, and a penalty for skewed vectors.

    Ī ← β₁ Ī + (1 − β₁)|w · ∇w|,   Ū ← β₂ Ū + (1 − β₂)||w · ∇w| − Ī|,   s(w) = Ī · Ū           (eq. 8 to 11)
    S of a triplet = s(λ) + mean of s over its column of P + mean of s over its row of Q        (eq. 7)
    b(t) = b₀ until t_i, then b_T + (b₀ − b_T)(1 − (t − t_i)/(t_f − t_i))³, b_T from t_f on      (eq. 12)

Every `prune_every` steps between t_i and t_f, and at every step after it, the singular values of all but the b(t) best
triplets of the whole adapter become zero; in between a pruned one may come back. b_T is `target_rank` times the number
of matrices. The penalty is PEFT's and the authors' code's: γ times the mean over P and Q of ‖PᵀP − I‖_F, which the
paper's eq. 4 squares; its gradient is added once for a step. Knows nothing of loss, rows or optimizers; everything it
remembers is in `state`, so that a run can go on.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.adalora import AdaLoRA
from mlx_lora.adapters.attach import attached
from mlx_lora.config import Adapter

BETA1, BETA2 = 0.85, 0.85

Arrays = dict[str, mx.array]


def rule_for(model: nn.Module, steps: int) -> Allocation | None:
    """The rule of the AdaLoRA layers on `model` for a run of `steps`, or None without any."""
    found = [wrapper for wrapper in attached(model).values() if isinstance(wrapper, AdaLoRA)]
    if not found:
        return None
    return Allocation(found[0].settings, steps, model.trainable_parameters())


class Allocation:
    """The rule and what it remembers. Trees are those of a model's trainable parameters, or of their gradients."""

    def __init__(self, settings: Adapter, steps: int, parameters: Any):
        start = {name: array for name, array in tree_flatten(parameters) if _kind(name)}
        values = {name: array for name, array in start.items() if _kind(name) == "lora_e"}
        matrices = sum(array.size // array.shape[-1] for array in values.values())
        target = settings.target_rank or (settings.rank + 1) // 2
        self.first = sum(array.size for array in values.values())
        self.last = min(target * matrices, self.first)
        self.begins, self.ends = settings.prune_from * steps, settings.prune_until * steps
        self.every, self.weight = settings.prune_every, settings.orthogonal
        self.state: dict[str, Any] = {
            "step": mx.array(0, mx.int32),
            "sensitivity": {name: mx.zeros_like(array) for name, array in start.items()},
            "uncertainty": {name: mx.zeros_like(array) for name, array in start.items()},
        }

    def budget(self, step: mx.array) -> mx.array:
        """How many triplets stay after optimizer step `step`, counted from 1; int32."""
        left = 1 - mx.clip((step - self.begins) / max(self.ends - self.begins, 1e-6), 0.0, 1.0)
        return mx.floor(self.last + (self.first - self.last) * left**3).astype(mx.int32)

    def prunes(self, step: mx.array) -> mx.array:
        """Whether singular values become zero after optimizer step `step`."""
        return (step > self.begins) & ((step % self.every == 0) | (step >= self.ends))

    def penalized(self, parameters: Any, gradients: Any) -> Any:
        """The gradients with that of the penalty: γ/n · 2 (PPᵀ − I) P / ‖PPᵀ − I‖ for each P of n, vectors as rows."""
        factors = {name: array for name, array in tree_flatten(parameters) if _kind(name) in ("lora_a", "lora_b")}
        added = {}
        for name, array in factors.items():
            rows = _vectors(name, array)
            skew = rows @ rows.swapaxes(-1, -2) - mx.eye(rows.shape[-2])
            norm = mx.sqrt(mx.square(skew).sum(axis=(-1, -2), keepdims=True))
            matrices = array.size // (rows.shape[-1] * rows.shape[-2])
            share = 2 * self.weight / (len(factors) * matrices)
            added[name] = _vectors(name, share * (skew @ rows) / mx.maximum(norm, 1e-12))
        pairs = [(name, array + added[name] if name in added else array) for name, array in tree_flatten(gradients)]
        return tree_unflatten(pairs)

    def observe(self, parameters: Any, gradients: Any) -> None:
        """Count a step: how much the loss would feel each weight, before it is updated; not after t_f, as in PEFT."""
        self.state["step"] = self.state["step"] + 1
        looks = (self.state["step"] < self.ends) | (self.state["step"] == 1)
        weights, found = dict(tree_flatten(parameters)), dict(tree_flatten(gradients))
        for name, smooth in self.state["sensitivity"].items():
            felt, unsure = mx.abs(weights[name] * found[name]), self.state["uncertainty"][name]
            mean = BETA1 * smooth + (1 - BETA1) * felt
            spread = BETA2 * unsure + (1 - BETA2) * mx.abs(felt - mean)
            self.state["sensitivity"][name] = mx.where(looks, mean, smooth)
            self.state["uncertainty"][name] = mx.where(looks, spread, unsure)

    def pruned(self, parameters: Any) -> Any:
        """The parameters after the update, with the singular values of what the budget leaves out at zero."""
        values = {name: array for name, array in tree_flatten(parameters) if _kind(name) == "lora_e"}
        scores = mx.concatenate([self._scores(name).reshape(-1) for name in values])
        places = mx.argsort(mx.argsort(-scores))  # 0 for the best; of equal ones the first
        step = self.state["step"]
        stays = (places < self.budget(step)) | ~self.prunes(step)
        kept, start = {}, 0
        for name, array in values.items():
            kept[name] = mx.where(stays[start : start + array.size].reshape(array.shape), array, 0.0)
            start += array.size
        return tree_unflatten([(name, kept.get(name, array)) for name, array in tree_flatten(parameters)])

    def _scores(self, name: str) -> mx.array:
        """S of the triplets of one layer, in the shape of its singular values `name`."""
        stem = name.removesuffix("lora_e")
        score = {
            kind: self.state["sensitivity"][stem + kind] * self.state["uncertainty"][stem + kind]
            for kind in ("lora_a", "lora_e", "lora_b")
        }
        vectors = sum(_vectors(kind, score[kind]).mean(axis=-1) for kind in ("lora_a", "lora_b"))
        return score["lora_e"] + vectors


def _kind(name: str) -> str | None:
    """Which array of a triplet's a parameter is."""
    kind = name.rpartition(".")[2]
    return kind if kind in ("lora_a", "lora_e", "lora_b") else None


def _vectors(name: str, array: mx.array) -> mx.array:
    """lora_a (in, r) or (E, r, in), lora_b (r, out) or (E, out, r) with its r vectors as rows; or back."""
    turned = name.endswith("lora_a") == (array.ndim == 2)
    return array.swapaxes(-1, -2) if turned else array
