"""Methods against PEFT, torch on the CPU: the same weights on both sides, then outputs, gradients and merged weights.

The network is two linears of different shapes under names that tell IA³ which of them is feed-forward. PEFT's GLoRA
has one choice for A and B and one for D and E, so rows of it go in pairs. torch and peft come with the extra `real`;
without them these tests fail, they don't skip.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.attach import Wrappers, build, put
from mlx_lora.config import Adapter
from mlx_lora.methods import METHODS

pytestmark = pytest.mark.real

IN, MIDDLE, OUT, RANK, ALPHA = 24, 40, 16, 3, 6.0
SHAPES = {"k_proj": (MIDDLE, IN), "down_proj": (OUT, MIDDLE)}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One method on both sides. `arrays`: our name -> PEFT's, which is transposed ("T") or flattened, or as it is."""

    ours: dict[str, Any]
    config: str
    theirs: dict[str, Any]
    arrays: dict[str, tuple[str, str]]


LORA_ARRAYS = {"lora_a": ("lora_A.default.weight", "T"), "lora_b": ("lora_B.default.weight", "T")}
LORA = {"rank": RANK, "alpha": ALPHA}
THEIR_LORA = {"r": RANK, "lora_alpha": ALPHA}


def glora(a_b: str, c: str, d_e: str) -> Row:
    their = {"lora": "lora", "vector": "vector", "scalar": "constant", "none": "none"}
    ours: dict[str, Any] = {"method": "glora", "glora": {"a": a_b, "b": a_b, "c": c, "d": d_e, "e": d_e}}
    arrays = {}
    for letter, choice in (("a", a_b), ("b", a_b), ("c", c), ("d", d_e), ("e", d_e)):
        name, peer = f"glora_{letter}", f"glora_{letter.upper()}.default"
        if choice == "lora" and letter == "c":
            arrays |= {f"{name}_down": (f"{peer}.Xd", ""), f"{name}_up": (f"{peer}.Xu", "flat")}
        elif choice == "lora":
            arrays |= {f"{name}_down": (f"{peer}.Xu", "T"), f"{name}_up": (f"{peer}.Xd", "T")}
        elif choice != "none":
            arrays[name] = (f"{peer}.X", "flat")
    ranked = "lora" in (a_b, c)
    settings = {"r": RANK, "config_A_B": their[a_b], "config_C": their[c], "config_D_E": their[d_e]}
    return Row(ours | ({"rank": RANK} if ranked else {}), "GloraConfig", settings, arrays)


ROWS: dict[str, Row] = {
    "lora": Row({"method": "lora", **LORA}, "LoraConfig", THEIR_LORA, LORA_ARRAYS),
    "rslora": Row(
        {"method": "lora", "rslora": True, **LORA}, "LoraConfig", {**THEIR_LORA, "use_rslora": True}, LORA_ARRAYS
    ),
    "dora": Row(
        {"method": "dora", **LORA}, "LoraConfig", {**THEIR_LORA, "use_dora": True},
        LORA_ARRAYS | {"m": ("lora_magnitude_vector.default.weight", "flat")},
    ),
    "vera": Row(
        {"method": "vera", "rank": RANK}, "VeraConfig", {"r": RANK},
        {"vera_b": ("vera_lambda_b.default", ""), "vera_d": ("vera_lambda_d.default", "")},
    ),
    "ia3": Row(
        {"method": "ia3"}, "IA3Config", {"feedforward_modules": ["down_proj"]}, {"vector": ("ia3_l.default", "flat")}
    ),
    "adalora": Row(
        {"method": "adalora", **LORA}, "AdaLoraConfig",
        {"init_r": RANK, "target_r": 2, "lora_alpha": ALPHA, "total_step": 10},
        {"lora_a": ("lora_A.default", "T"), "lora_e": ("lora_E.default", "flat"), "lora_b": ("lora_B.default", "T")},
    ),
    "glora lora lora vector": glora("lora", "lora", "vector"),
    "glora vector vector scalar": glora("vector", "vector", "scalar"),
    "glora scalar none none": glora("scalar", "none", "none"),
    "glora none lora vector": glora("none", "lora", "vector"),
}  # fmt: skip


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.down_proj = nn.Linear(IN, MIDDLE), nn.Linear(MIDDLE, OUT)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(mx.tanh(self.k_proj(x)))


@dataclass
class Both:
    """One network adapted by PEFT and by us, with equal arrays; `layers` are PEFT's wrappers."""

    torch: Any
    peer: Any
    layers: dict[str, Any]
    network: Network
    wrappers: Wrappers


@pytest.fixture(scope="module")
def peers() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
    return SimpleNamespace(torch=torch, peft=peft)


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture
def both(row: Row, peers: SimpleNamespace) -> Both:
    torch = peers.torch
    torch.manual_seed(1)

    class Theirs(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.k_proj, self.down_proj = torch.nn.Linear(IN, MIDDLE), torch.nn.Linear(MIDDLE, OUT)

        def forward(self, x: Any) -> Any:
            return self.down_proj(torch.tanh(self.k_proj(x)))

    theirs, network = Theirs(), Network()
    for path in SHAPES:
        for name, array in getattr(theirs, path).named_parameters():
            network[path][name] = mx.array(array.detach().numpy())
    network.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peers.peft, row.config)(target_modules=list(SHAPES), **row.theirs)
        peer = peers.peft.get_peft_model(theirs, config)
    layers = {path: getattr(peer.base_model.model, path) for path in SHAPES}
    wrappers = build(network, Adapter(**row.ours, targets=list(SHAPES)), only=list(SHAPES))
    for path, wrapper in wrappers.items():
        arrays = dict(layers[path].named_parameters())
        assert sorted(wrapper.adapter_params()) == sorted(row.arrays)
        trained = {name for name, array in arrays.items() if array.requires_grad}
        assert trained == {name for name, _ in row.arrays.values()}, "an array has no partner"
        for name, (theirs_name, _) in row.arrays.items():
            with torch.no_grad():
                arrays[theirs_name] += 0.3 * torch.randn(arrays[theirs_name].shape)
            wrapper[name] = mx.array(as_ours(row, name, arrays[theirs_name]))
        if row.config == "VeraConfig":
            a, b = (getattr(layers[path], name)["default"].numpy() for name in ("vera_A", "vera_B"))
            assert [array.shape for array in wrapper._pair] == [a.T.shape, b.shape]
            wrapper._pair = (mx.array(a.T), mx.array(b))
    put(network, wrappers)
    return Both(torch, peer, layers, network, wrappers)


def as_ours(row: Row, name: str, array: Any) -> np.ndarray:
    """PEFT's array, or its gradient, in the shape that ours has."""
    values: np.ndarray = array.detach().numpy()
    return {"T": values.T, "flat": values.reshape(-1), "": values}[row.arrays[name][1]].copy()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """x, and what the output is multiplied with to get a loss."""
    random = np.random.default_rng(2)
    return tuple(random.normal(size=(2, 5, size)).astype(np.float32) for size in (IN, OUT))  # type: ignore[return-value]


def test_outputs_equal_pefts(both: Both, row: Row) -> None:
    x, _ = inputs()
    expected = both.peer(both.torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(both.network(mx.array(x)), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with both.peer.disable_adapter():
        bare = both.peer(both.torch.from_numpy(x)).detach().numpy()
    assert np.abs(expected - bare).max() > 0.1, "the adapter is too small to show anything"


def test_gradients_equal_pefts(both: Both, row: Row) -> None:
    x, slopes = inputs()
    (both.peer(both.torch.from_numpy(x)) * both.torch.from_numpy(slopes)).sum().backward()
    loss = nn.value_and_grad(both.network, lambda: (both.network(mx.array(x)) * mx.array(slopes)).sum())
    _, gradients = loss()
    for path, layer in both.layers.items():
        arrays = dict(layer.named_parameters())
        for name, (theirs, _) in row.arrays.items():
            expected = as_ours(row, name, arrays[theirs].grad)
            most = np.abs(expected).max()
            assert most > 0
            np.testing.assert_allclose(
                gradients[path][name], expected, rtol=TOLERANCE, atol=TOLERANCE * most, err_msg=f"{path}.{name}"
            )


def test_merged_weights_equal_pefts(both: Both, row: Row) -> None:
    merged = both.peer.merge_and_unload()
    for path, wrapper in both.wrappers.items():
        fused = wrapper.fuse()
        for name, expected in getattr(merged, path).named_parameters():
            expected = expected.detach().numpy()
            np.testing.assert_allclose(fused[name], expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{path}.{name}")


def test_every_method_that_peft_has_is_compared() -> None:
    compared = {row.ours["method"] for row in ROWS.values()}
    elsewhere = {"qalora", "bitfit", "prefix", "prompt", "bottleneck", "full"}  # other formulas, or no layer's method
    assert compared | elsewhere == set(METHODS)
