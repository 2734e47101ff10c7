"""A kept prefix changes no loss and no adapter, runs frozen layers once a row, and is refused where it can't be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import by_length, collate, epoch_steps
from mlx_lora.errors import TrainingError
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train import prefix
from mlx_lora.train.events import Evaluated, Finished, Note, Step
from mlx_lora.train.trainer import train
from tests.adapters import zoo
from tests.fixed import fixed
from tests.train.test_trainer import arrays_of, make_rows, of

ROWS, VALID = make_rows(12), make_rows(5, seed=1)
MODELS = ["llama", "qwen3", "gemma3"]
# Positions that are run to find out whether the model can be cut, its last layer run alone, and its rows packed.
TRIALS = 400


@pytest.fixture(autouse=True)
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.COMMON, "num_hidden_layers", 4)


def adapted(name: str = "llama", **adapter: Any) -> nn.Module:
    """A model of the zoo with adapters that already do something."""
    model = zoo.network(name)
    wrappers = attach(model, Adapter(**{"rank": 4, "targets": "all-linear", "layers": 2} | adapter))
    for key, wrapper in zip(mx.random.split(mx.random.key(1), len(wrappers)), wrappers.values(), strict=True):
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=key)
    return model


def run(model: nn.Module, *, seed: int = 0, **settings: Any) -> list[Any]:
    """Train with SGD, whose steps follow the gradients; by default for three epochs with a kept prefix."""
    packing, scratch = settings.pop("packing", False), settings.pop("scratch", None)
    parts = settings.pop("trunk") if "trunk" in settings else take_apart(model)
    chosen = fixed(**{
        "epochs": 3, "batch_size": 4, "warmup": 0.0, "optimizer": "sgd", "learning_rate": 0.05, "cache_prefix": "on",
    } | settings)  # fmt: skip
    return list(train(model, ROWS, VALID, chosen, seed=seed, trunk=parts, packing=packing, scratch=scratch))


def kept(events: list[Any]) -> list[str]:
    return [note.text for note in of(events, Note) if "computed once a row and kept" in note.text]


def assert_same(on: list[Any], off: list[Any]) -> None:
    """Losses, figures and the final adapter, up to rounding."""
    assert kept(on) and not kept(off)
    for one, other in zip(of(on, Step), of(off, Step), strict=True):
        assert (one.step, one.tokens, one.skipped) == (other.step, other.tokens, other.skipped)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    for one, other in zip(of(on, Evaluated), of(off, Evaluated), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    learned = arrays_of(off)
    assert learned.keys() == arrays_of(on).keys()
    for name, array in arrays_of(on).items():
        assert (mx.linalg.norm(array - learned[name]) < 1e-4 * mx.linalg.norm(array)).item(), name
    assert of(on, Finished)[0].computed_tokens == of(off, Finished)[0].computed_tokens


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_adapter_are_those_of_the_whole_model(name: str, layers: int) -> None:
    on, off = (run(adapted(name, layers=layers), cache_prefix=choice, eval_every=3) for choice in ("on", "off"))
    assert_same(on, off)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 2, "grad_accumulation": 3},
        {"dropout": 0.3},
        {"packing": True, "batch_size": 6},
        {"grad_checkpoint": "on"},
        {"packing": True, "grad_checkpoint": "on", "dropout": 0.3, "name": "gemma3", "epochs": 2},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_it_goes_together_with_every_other_choice(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    adapter = {key: settings.pop(key) for key in ("dropout", "name") if key in settings}
    assert_same(*(run(adapted(**adapter), cache_prefix=choice, **settings) for choice in ("on", "off")))


def count_positions(layer: nn.Module) -> list[int]:
    """Positions that enter a layer in each of its calls from now on."""
    calls: list[int] = []
    original = type(layer)

    def call(self: nn.Module, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
        calls.append(x.shape[0] * x.shape[1])
        return original.__call__(self, x, *arguments, **named)

    layer.__class__ = type(original.__name__, (original,), {"__call__": call})
    return calls


@pytest.mark.parametrize("packing", [False, True])
def test_frozen_layers_run_once_a_row_and_adapted_ones_every_time(
    packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    plan = epoch_steps([len(row) for row in ROWS], batch_size=4, grad_accumulation=1, seed=0, epoch=0, packing=packing)
    of_epoch = [collate(ROWS, lines).inputs.size for step in plan for lines in step]
    of_valid = sum(batch.inputs.size for batch in by_length(VALID, 4))
    below, above = {}, {}
    for epochs in (2, 4):
        model = adapted()
        parts = take_apart(model)
        lower, upper = count_positions(layers_of(model)[1]), count_positions(layers_of(model)[2])
        run(model, epochs=epochs, eval_every=1, packing=packing, trunk=parts)
        below[epochs], above[epochs] = lower, upper
    assert below[2] == below[4], "later epochs run nothing below"
    # beforehand: the first batch through the whole model, and trials of a few tokens
    assert sum(below[2]) <= sum(of_epoch) + of_valid + of_epoch[0] + TRIALS
    assert sum(above[2]) >= 2 * sum(of_epoch) and sum(above[4]) >= 4 * sum(of_epoch)


def test_what_was_asked_for_is_refused_with_a_reason() -> None:
    whole = adapted()
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (adapted(layers="all"), {}, "the first layer is adapted"),
        (adapted(layers=[0, 3]), {}, "the first layer is adapted"),
        (adapted("llama untied", targets=["embed_tokens", "q_proj"]), {}, "embed_tokens is trained, which is outside"),
        (adapted("llama untied", targets=["lm_head", "q_proj"]), {}, "lm_head is trained, which is outside"),
        (whole, {"trunk": Trunk(whole, vocabulary=zoo.VOCABULARY)}, "can't be taken apart"),
    ]
    for model, settings, reason in cases:
        with pytest.raises(TrainingError, match=f"train.cache_prefix can't be used: .*{reason}") as refused:
            run(model, **settings)
        assert refused.value.hint == "train.cache_prefix=off"
    events = run(adapted(layers="all"), cache_prefix="auto")
    assert not kept(events) and events[-1].stopped_by == "epochs"


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({"epochs": 1}, False), ({"epochs": 2}, True), ({"iters": 3}, False), ({"iters": 4}, True)],
    ids=str,
)
def test_auto_keeps_it_when_rows_come_again_and_says_so(settings: dict[str, int], chosen: bool) -> None:
    events = run(adapted(), cache_prefix="auto", **settings)
    assert len(kept(events)) == chosen
    if chosen:
        assert isinstance(events[0], Note) and "layer 2" in events[0].text and "memory" in events[0].text


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=["unpacked", "packed"])
def test_a_file_gives_the_same_bytes_as_memory_and_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned(**more: Any) -> tuple[dict[str, mx.array], list[Any]]:
        events = run(adapted(dropout=0.1), seed=3, **settings, **more)
        return arrays_of(events), [(event.step, event.loss) for event in of(events, Step | Evaluated)]  # type: ignore[arg-type]

    memory = learned()
    assert_equal(memory, learned())
    monkeypatch.setattr(prefix, "place", lambda *_: "file")
    made: list[list[Path]] = []
    original = prefix.PrefixStore.batch

    def noted(self: Any, *arguments: Any) -> mx.array:
        made.append(list(tmp_path.iterdir()))
        return original(self, *arguments)

    monkeypatch.setattr(prefix.PrefixStore, "batch", noted)
    monkeypatch.setattr(prefix.tempfile, "gettempdir", lambda: pytest.fail("not in the folder it was given"))
    assert_equal(memory, learned(scratch=tmp_path))
    assert made and not any(made) and not list(tmp_path.iterdir())


def assert_equal(one: tuple[dict[str, mx.array], Any], other: tuple[dict[str, mx.array], Any]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(mx.array_equal(one[0][name], other[0][name]) for name in one[0])


def noisy(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    return lambda *arguments: original(*arguments) + 0.1 * mx.random.normal((1,), key=mx.random.key(0))


def nothing(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    return lambda *arguments: original(*arguments) * mx.nan


@pytest.mark.parametrize("fault", [noisy, nothing])
def test_wrong_states_are_noticed_before_the_first_step(
    fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = run(adapted(), cache_prefix="off")
    monkeypatch.setattr(prefix.PrefixStore, "batch", fault(prefix.PrefixStore.batch))
    with pytest.raises(TrainingError, match="can't be used: kept states differ"):
        run(adapted())
    auto = run(adapted(), cache_prefix="auto")
    assert not kept(auto)
    learned = arrays_of(off)
    assert all(mx.array_equal(array, learned[name]) for name, array in arrays_of(auto).items())
