"""Measuring: the floor counts the products it should, rows carry the loss asked for, the model is bare afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import attach, attached, detach
from mlx_lora.config import Adapter
from mlx_lora.models.load import LoadedModel
from mlx_lora.study import bench
from mlx_lora.study.products import Product, Work
from tests.conftest import VOCABULARY

HIDDEN, INNER, KEYS, LAYERS, HEADS = 64, 128, 32, 3, 4
# Multiplications and additions of one layer's linears, for each position.
LINEARS = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER)
WORK = Work(rows=2, length=8)


def counted(tiny: LoadedModel, adapter: Adapter, work: Work = WORK) -> Counter[Product]:
    attach(tiny.model, adapter)
    found = bench.products(tiny.model, tiny.config, work)
    detach(tiny.model)
    return found


def operations(products: Counter[Product]) -> int:
    return sum(times * product.operations for product, times in products.items())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_floor_has_no_gradient_below_the_lowest_adapted_layer(tiny: LoadedModel, layers: int) -> None:
    """Closed form: linears and attention forward everywhere and backward above, six thin products, the head twice."""
    found = operations(counted(tiny, Adapter(rank=4, targets=["q_proj"], layers=layers)))
    positions = WORK.rows * WORK.length
    attention = 2 * (2 * WORK.rows * HEADS * WORK.length**2 * HIDDEN // HEADS)
    adapters = layers * 3 * 2 * positions * 4 * (HIDDEN + HIDDEN)
    head = 2 * (2 * WORK.trained * HIDDEN * VOCABULARY)
    trunk = LINEARS * positions * (LAYERS + layers) + attention * (LAYERS + 2 * layers)
    assert found == trunk + adapters + head


def test_the_floor_counts_a_quantized_base_like_a_plain_one(tiny: LoadedModel) -> None:
    from mlx_lora.config import Quantize
    from mlx_lora.models.load import load

    packed = load(tiny.path, quantization=Quantize(bits=4, group_size=32))
    assert counted(packed, Adapter()) == counted(tiny, Adapter())


def test_only_positions_with_loss_enter_the_head(tiny: LoadedModel) -> None:
    some, every = (counted(tiny, Adapter(), Work(2, 8, loss)) for loss in ("completion", "all"))  # type: ignore[arg-type]
    assert some[Product(4, HIDDEN, VOCABULARY, "nt")] == every[Product(16, HIDDEN, VOCABULARY, "nt")] == 1


def test_a_configuration_without_the_usual_names_has_no_floor(tiny: LoadedModel) -> None:
    tiny.config = {"n_embd": 64}
    assert bench.floor(tiny, WORK, Adapter(), seconds=1.0) == []


@pytest.mark.parametrize("product", [Product(3, 4, 5), Product(3, 4, 5, "nt", 2), Product(3, 4, 5, "tn")])
def test_every_form_of_product_can_be_timed(product: Product) -> None:
    assert bench.time_product(product, mx.float32) > 0
    assert product.operations == 2 * 3 * 4 * 5 * product.batch


@pytest.mark.parametrize(("loss", "trained"), [("completion", 2), ("all", 8)])
def test_random_rows_have_the_positions_and_the_loss_asked_for(tiny: LoadedModel, loss: str, trained: int) -> None:
    rows = bench.random_rows(tiny.model, Work(3, 8, loss))  # type: ignore[arg-type]
    assert [(len(row), row.trained) for row in rows] == [(9, trained)] * 3
    assert max(row.tokens.max() for row in rows) < VOCABULARY == bench.vocabulary(tiny.model)


def test_the_first_and_the_last_step_are_not_timed(tiny: LoadedModel) -> None:
    measured = bench.run(tiny, WORK, Adapter(), steps=2)
    assert len(measured.seconds) == 2 and len(measured.losses) == 4
    assert measured.tokens == [WORK.trained] * 4 and measured.peak_bytes > 0


def test_seconds_are_those_of_whole_steps(tiny: LoadedModel) -> None:
    """The trainer reports late; each timed step must still be about as long as the others."""
    measured = bench.run(tiny, Work(4, 128, "all"), Adapter(), steps=4)
    assert min(measured.seconds) > max(measured.seconds) / 20


def test_epochs_after_the_first() -> None:
    """Three epochs of two steps; the very first step isn't among the seconds."""
    assert bench.Steps(seconds=[1.0, 2.0, 3.0, 4.0, 5.0]).epochs(2) == [5.0, 9.0]


@pytest.mark.real
def test_everything_has_a_name_a_value_and_a_unit_and_the_model_is_bare_again(tiny: LoadedModel) -> None:
    before = dict(tiny.model.parameters())
    results = bench.bench(tiny, WORK, lengths=[8, 16], steps=1)
    assert all(entry.keys() == {"name", "value", "unit"} and entry["value"] > 0 for entry in results)
    names = [entry["name"] for entry in results]
    assert len(names) == len(set(names))
    assert {"step", "peak memory, checkpointing", "step / matrix products", "step, 16 positions"} <= set(names)
    assert not attached(tiny.model) and dict(tiny.model.parameters()).keys() == before.keys()


@pytest.mark.parametrize("measure", [bench.prefix, bench.packing])
def test_what_saves_work_is_compared_with_doing_without(
    tiny: LoadedModel, measure: Callable[..., bench.Results]
) -> None:
    without, with_it, ratio = measure(tiny, WORK, Adapter(), batches=2)
    assert ratio["value"] == pytest.approx(without["value"] / with_it["value"]) and ratio["unit"] == "ratio"
    assert not attached(tiny.model)
