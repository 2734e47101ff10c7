"""AdaLoRA's rule against a plain account of the paper's, and in training: budget, penalty, what stays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import collate
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train import step
from mlx_lora.train.adalora import Allocation, rule_for
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint, Saved
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.fixed import fixed
from tests.train.test_trainer import arrays_of, make_rows, of, run

RANK = 4
SETTINGS: dict[str, Any] = {"method": "adalora", "rank": RANK, "alpha": 8}


def parameters(*, experts: int = 0, scale: float = 1.0) -> Any:
    """Two layers of triplets, or two of experts."""
    shapes = {"lora_a": (6, RANK), "lora_e": (RANK,), "lora_b": (RANK, 5)}
    if experts:
        shapes = {"lora_a": (experts, RANK, 6), "lora_e": (experts, RANK), "lora_b": (experts, 5, RANK)}
    key = iter(mx.random.split(mx.random.key(int(100 * scale)), 6))
    named = [(f"{layer}.{name}", scale * mx.random.normal(shape, key=next(key))) for layer in "xy"
             for name, shape in shapes.items()]  # fmt: skip
    return tree_unflatten(named)


def test_the_budget_falls_as_a_cubic() -> None:
    rule = Allocation(Adapter(**SETTINGS, target_rank=1, prune_from=0.1, prune_until=0.6), 100, parameters())
    budgets = [int(rule.budget(mx.array(step)).item()) for step in range(1, 101)]
    first, last = 2 * RANK, 2
    expected = [int(last + (first - last) * (1 - min(max((t - 10) / 50, 0), 1)) ** 3) for t in range(1, 101)]
    assert all(abs(a - b) <= 1 for a, b in zip(budgets, expected, strict=True))
    assert budgets[9] == first and budgets[59] == budgets[99] == last and budgets == sorted(budgets, reverse=True)
    pruned = [t for t in range(1, 101) if rule.prunes(mx.array(t)).item()]
    assert pruned == [20, 30, 40, 50, *range(60, 101)]


def test_without_a_target_half_the_rank_stays() -> None:
    for rank, stays in ((8, 4), (5, 3), (1, 1)):
        rule = Allocation(Adapter(method="adalora", rank=rank), 10, tree_unflatten([("x.lora_e", mx.zeros((rank,)))]))
        assert (rule.first, rule.last) == (rank, stays)


@pytest.mark.parametrize("experts", [0, 3])
def test_scores_follow_the_paper(experts: int) -> None:
    """Smoothed sensitivity times smoothed uncertainty, a triplet's as the sum of its value's and its vectors' means."""
    rule = Allocation(Adapter(**SETTINGS), 100, parameters(experts=experts))
    mean = spread = {name: 0.0 for name, _ in tree_flatten(parameters(experts=experts))}
    for number in range(1, 4):
        weights, gradients = (parameters(experts=experts, scale=number + off) for off in (0.0, 0.5))
        rule.observe(weights, gradients)
        felt = {
            name: np.abs(np.array(a, np.float64) * np.array(b))
            for (name, a), (_, b) in zip(tree_flatten(weights), tree_flatten(gradients), strict=True)
        }
        mean = {name: 0.85 * mean[name] + 0.15 * felt[name] for name in felt}
        spread = {name: 0.85 * spread[name] + 0.15 * np.abs(felt[name] - mean[name]) for name in felt}
    score = {name: mean[name] * spread[name] for name in mean}
    for layer in "xy":
        a, e, b = (score[f"{layer}.{name}"] for name in ("lora_a", "lora_e", "lora_b"))
        expected = e + (a.mean(2) + b.mean(1) if experts else a.mean(0) + b.mean(1))
        np.testing.assert_allclose(rule._scores(f"{layer}.lora_e"), expected, rtol=1e-4)


def test_the_best_triplets_of_the_whole_adapter_stay() -> None:
    rule = Allocation(Adapter(**SETTINGS, target_rank=2), 4, parameters())
    for number in (1.0, 2.0, 3.0):
        rule.observe(parameters(scale=number), parameters(scale=number + 0.5))
    assert rule.prunes(rule.state["step"]).item()
    before = dict(tree_flatten(parameters(scale=4.0)))
    after = dict(tree_flatten(rule.pruned(parameters(scale=4.0))))
    scores = np.concatenate([np.array(rule._scores(f"{layer}.lora_e")) for layer in "xy"])
    values = np.concatenate([np.array(after[f"{layer}.lora_e"]) for layer in "xy"])
    best = set(np.argsort(-scores)[:4].tolist())
    assert set(np.flatnonzero(values).tolist()) == best
    for name, array in before.items():
        if not name.endswith("lora_e"):
            np.testing.assert_array_equal(array, after[name])
        else:
            np.testing.assert_array_equal(np.where(np.array(after[name]), array, 0), after[name])


@pytest.mark.parametrize("experts", [0, 3])
def test_the_penalty_is_that_of_peft(experts: int) -> None:
    """γ · mean over P and Q of ‖PᵀP − I‖_F, differentiated by MLX; an expert's vectors are a matrix of their own."""
    tree = parameters(experts=experts)
    rule = Allocation(Adapter(**SETTINGS, orthogonal=0.3), 10, tree)

    def penalty(tree: Any) -> mx.array:
        norms = []
        for name, array in tree_flatten(tree):
            if not name.endswith("lora_e"):
                by_rows = name.endswith("lora_a") == bool(experts)  # an expert's A, a linear's B
                skew = (array @ array.swapaxes(-1, -2) if by_rows else array.swapaxes(-1, -2) @ array) - mx.eye(RANK)
                norms.append(mx.sqrt(mx.square(skew).sum((-1, -2))).reshape(-1))
        return 0.3 * mx.concatenate(norms).mean()

    expected = dict(tree_flatten(mx.grad(penalty)(tree)))
    zeros = tree_unflatten([(name, mx.zeros_like(array)) for name, array in tree_flatten(tree)])
    for name, array in tree_flatten(rule.penalized(tree, zeros)):
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)


def values_of(arrays: dict[str, mx.array]) -> np.ndarray:
    return np.concatenate([np.array(array).ravel() for name, array in arrays.items() if name.endswith("lora_e")])


def test_training_ends_with_the_budget(tiny: LoadedModel) -> None:
    adapter = Adapter(**SETTINGS, target_rank=1, prune_every=2, prune_from=0.2, prune_until=0.6)
    events = run(tiny, make_rows(16), [], iters=10, save_every=1, adapter=adapter)
    states = [event.arrays for event in of(events, Checkpoint)]
    adapters = [{name: array for name, array in arrays.items() if name.startswith("adapter.")} for arrays in states]
    saved = [np.count_nonzero(values_of(arrays)) for arrays in adapters]
    modules = 4 * 3
    assert saved[0] == saved[2] == RANK * modules, "pruned too early"
    assert RANK * modules > saved[3] > modules and saved[5:] == [modules] * 4
    assert np.count_nonzero(values_of(arrays_of(events))) == modules
    assert of(events, Saved)[-1].step == 10


def test_the_penalty_is_added_once_for_a_step(tiny: LoadedModel) -> None:
    """With no singular value yet, P and Q feel nothing but the penalty, however many micro-batches a step has."""
    adapter = Adapter(**SETTINGS, orthogonal=0.7)
    wrappers = attach(tiny.model, adapter)
    start = {name: array for name, array in tree_flatten(tiny.model.trainable_parameters())}
    zeros = tree_unflatten([(name, mx.zeros_like(array)) for name, array in start.items()])
    pull = dict(tree_flatten(rule_for(tiny.model, 1).penalized(tree_unflatten(list(start.items())), zeros)))
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "max_grad_norm": None}
    events = run(tiny, make_rows(4), [], iters=1, batch_size=2, grad_accumulation=2, adapter=adapter, **settings)
    after = arrays_of(events)
    for name, array in start.items():
        if not name.endswith("lora_e"):
            assert pull[name].any().item()
            np.testing.assert_allclose(after[name], array - 0.1 * pull[name], atol=1e-7, err_msg=name)
    assert len(wrappers) == 12


def test_a_step_that_is_not_finite_is_not_remembered(tiny: LoadedModel) -> None:
    attach(tiny.model, Adapter(**SETTINGS))
    stepper = step.Stepper(tiny.model, Loss(take_apart(tiny.model)), fixed(), 10, 0, Processes())
    batch = collate(make_rows(4))
    arrays, states = as_arrays(batch), []
    for broken in (False, True):
        weights = arrays["weights"] * (mx.nan if broken else 1.0)
        stepper.dispatch([arrays | {"weights": weights}], batch.trained)
        states.append({name: np.array(array) for name, array in stepper.state().items() if name.startswith("rule.")})
    assert states[0]["rule.step"] == 1
    assert any(array.any() for name, array in states[0].items() if "uncertainty" in name)
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)


def test_other_methods_have_no_rule(tiny: LoadedModel) -> None:
    attach(tiny.model, Adapter())
    assert rule_for(tiny.model, 10) is None
