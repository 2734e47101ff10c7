"""What training a model with its adapter costs, read off its modules: bytes of each kind, multiplications a position.

Kept for the backward pass are: the inputs of norms; attention's queries, keys and values, and a gated activation's two
inputs (`trunk.lean`); and of an adapted linear its input, once for those that share it, and its low-rank intermediate.
Attention and activations that aren't lean keep more. A linear without an adapter keeps nothing: its weight is frozen.
All of this is a matter of shapes: any model will do, with weights or from `models.shapes`, and nothing is evaluated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import Wrappers, attached
from mlx_lora.adapters.base import EXPERTS, layer_shape
from mlx_lora.adapters.targets import adaptable
from mlx_lora.config import Train
from mlx_lora.models.architectures import ATTENTION, mixes_tokens
from mlx_lora.models.layer_calls import LayerCalls, Scan, layer_calls
from mlx_lora.models.trunk.layers import layers_of, lowest_trainable
from mlx_lora.models.trunk.lean import lean
from mlx_lora.quant.quantize import model_bytes
from mlx_lora.train import optim
from mlx_lora.train.adalora import rule_for

# Arrays of its inner width that an activation keeps, and of its scores that attention keeps, where they aren't lean.
ACTIVATION, SCORES = 4, 3
# Arrays that stay of a short convolution's channels, of a recurrence's output, and of a state that is looped over.
CONVOLVED, GATED, LOOPED = 2, 2, 3
# Where a loop cuts its inputs into positions, the gradient of each is as large as all: this part of them is alive.
SLICED = 2
HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
CHOSEN = ("top_k", "num_experts_per_tok")


@dataclass(frozen=True)
class Layer:
    """Numbers a position: `kept` for the backward pass, `after_attention` those of them that only what follows it
    needs, `inner` the widest linear's output, `heads` of queries.

    `scores` is how many numbers a position and key attention keeps: none where it is lean, one for each head whose
    scores are handed to it as a mask, of which there are `masked`. `weight` is the size of the largest weight. `scans`
    are its recurrences, `mixed` what goes into them, before and after the convolution, and `sliced` the numbers a
    position and position that the backward pass of a loop of mlx-lm's holds.
    """

    kept: int
    after_attention: int
    inner: int
    heads: int
    scores: int
    weight: int
    masked: int = 0
    mixed: int = 0
    sliced: int = 0
    scans: tuple[Scan, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Bytes, but for the numbers `hidden` and `vocabulary`; `size` is that of one activation.

    `layers` are the lowest adapted one and those above it, `below` those before it; `bits` is None for a base that
    isn't packed. `forward` and `backward` count
    multiplications a position, `again` those of gradient checkpointing.
    """

    weights: int
    adapter: int
    state: int
    size: int
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    below: tuple[Layer, ...]
    bits: int | None
    gpu: bool
    forward: int
    again: int

    @property
    def fixed(self) -> int:
        """Bytes that stay from step to step: weights, adapter, optimizer state, and the zeros gradients begin from."""
        return self.weights + 2 * self.adapter + self.state

    def kept(self, lines: int, width: int) -> int:
        """Bytes that all layers keep of a batch of `lines` lines of `width` positions."""
        return sum(self.kept_by(layer, lines, width) for layer in self.layers)

    def kept_by(self, layer: Layer, lines: int, width: int) -> int:
        """What one layer keeps; of a recurrence also the states after every span, in float32."""
        states = sum(4 * lines * scan.state * -(-width // scan.span(lines, gpu=self.gpu)) for scan in layer.scans)
        return self.size * lines * width * (layer.kept + layer.scores * width) + states

    def span_bytes(self, layer: Layer, lines: int, width: int) -> int:
        """What the backward pass of one span of a layer holds, of its largest recurrence."""
        spans = [(scan, min(scan.span(lines, gpu=self.gpu), width)) for scan in layer.scans]
        held = [lines * scan.chunk_bytes * -(-span // scan.chunk) for scan, span in spans]
        return max(held, default=0)

    def entering(self, lines: int, width: int) -> int:
        """Bytes of what enters each of the layers, which is what gradient checkpointing keeps."""
        return len(self.layers) * self.size * lines * width * self.hidden

    def work(self, *, recompute: bool) -> int:
        """Multiplications a position in a step."""
        return self.forward + self.again * (2 if recompute else 1)


def costs(model: nn.Module, settings: Train, *, dtype: mx.Dtype, gpu: bool) -> Costs:
    """The costs of training what is attached to `model`, with activations in `dtype`."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    adapter = sum(array.nbytes for array in trained.values())
    optimizer = optim.build(settings.model_copy(update={"learning_rate": 1.0}), 1)  # no rate changes a shape
    optimizer.init(model.trainable_parameters())
    rule = rule_for(model, 1)
    states = [optimizer.state, rule.state if rule else {}]
    layers, lowest = layers_of(model), lowest_trainable(model)
    first = lowest if isinstance(lowest, int) else 0
    vocabulary, hidden = _embedding(model, layers)
    found = tuple(_layer(layer, hidden, notes) for layer, notes in zip(layers, layer_calls(model), strict=True))
    work = [sum(_products(layer).values()) for layer in layers]
    return Costs(
        weights=model_bytes(model) - adapter,
        adapter=adapter,
        state=sum(array.nbytes for _, array in tree_flatten(states) if isinstance(array, mx.array)),
        size=int(dtype.size),
        hidden=hidden,
        vocabulary=vocabulary,
        layers=found[first:],
        below=found[:first],
        bits=next((module.bits for module in model.modules() if "scales" in module), None),
        gpu=gpu,
        forward=sum(work) + 2 * vocabulary * hidden,
        again=sum(work[first:]),
    )


def hidden_size(model: nn.Module) -> int:
    """Numbers of a hidden state: the width of the token embedding."""
    return _embedding(model, layers_of(model))[1]


def _embedding(model: nn.Module, layers: list[nn.Module]) -> tuple[int, int]:
    """(vocabulary, hidden size): the shape of the largest table outside the layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    tables = [layer_shape(module) for module in adaptable(model).values() if id(module) not in inside]
    rows, *_, columns = max(tables, key=lambda shape: (shape[-2], -shape[-1]))
    return rows, columns


def _layer(layer: nn.Module, hidden: int, notes: LayerCalls) -> Layer:
    linears, wrappers, lean_parts = adaptable(layer), attached(layer), _lean(layer)
    modules, runs = dict(layer.named_modules()), bool(notes.scans or notes.looped)
    blocks = defaultdict(list)
    for path in linears:
        blocks[path.rpartition(".")[0]].append(path)
    heads = 0 if runs and not notes.attends else _attribute(layer, HEADS) or max(hidden // 64, 1)
    kept, after_attention, scores, inner, mixing, mixed = _norms(layer, linears, hidden), 0, 0, 0, 0, 0
    for block, paths in blocks.items():
        outputs = {path: layer_shape(linears[path])[-2] * _times(layer, linears[path]) for path in paths}
        last = [path for path in paths if layer_shape(linears[path])[-2] == hidden][-1:]
        inside = sum(size for path, size in outputs.items() if path not in last)
        here = inside + _inputs(linears, wrappers, paths, last)
        lean_here = any(part.startswith(block) for part in lean_parts)
        if ATTENTION.search(block) or (runs and mixes_tokens(paths[0], "", modules)):
            scores += 0 if lean_here or runs else SCORES * heads
            mixing = max(mixing, *outputs.values())
            mixed += inside if runs else 0
        else:
            here += 0 if lean_here or not inside else ACTIVATION * max(outputs.values())
            after_attention += here
            inner = max(inner, *outputs.values())
        kept += here
    routed = _routed(layer, linears, hidden)
    masked = sum(count for count, _ in notes.masked)
    largest = max(math.prod(layer_shape(linear)[-2:]) for linear in linears.values())
    return Layer(
        kept + _mixed(notes) + routed,
        after_attention + routed,
        inner or mixing,
        heads,
        scores + masked,
        largest,
        masked=masked,
        mixed=mixed + notes.convolved + sum(scan.inputs for scan in notes.scans),
        sliced=mixed // SLICED if notes.looped and not notes.attends else 0,
        scans=tuple(notes.scans),
    )


def _mixed(notes: LayerCalls) -> int:
    """What mixers keep beside the outputs of their projections.

    Of a short convolution its output and two parts of the activation behind it; of a recurrence its inputs and output,
    and two parts of the gated norm behind it; of attention with a mask of numbers queries, keys and values; of a loop
    some copies of its state for each position.
    """
    scans = sum(scan.inputs + GATED * scan.output for scan in notes.scans)
    return CONVOLVED * notes.convolved + scans + sum(size for _, size in notes.masked) + LOOPED * notes.looped


def _routed(layer: nn.Module, linears: dict[str, nn.Module], hidden: int) -> int:
    """What a layer of experts keeps for their weights: the probabilities of all, and the outputs of the chosen."""
    last = {
        path.rpartition(".")[0]: linear
        for path, linear in linears.items()
        if isinstance(linear, EXPERTS) and layer_shape(linear)[-2] == hidden
    }
    return sum(_times(layer, linear) * hidden + 2 * layer_shape(linear)[0] for linear in last.values())


def _inputs(linears: dict[str, nn.Module], wrappers: Wrappers, paths: list[str], last: list[str]) -> int:
    """What the adapted linears of a block keep: an input for all that share it, another for the last, and Ax of each.

    With dropout every one keeps its own input, with the mask that it was multiplied by.
    """
    shared: dict[tuple[bool, int], int] = {}
    kept = 0
    for path in paths:
        if (wrapper := wrappers.get(path)) is None:
            continue
        width = layer_shape(linears[path])[-1]
        kept += getattr(wrapper, "rank", 0)
        if getattr(getattr(wrapper, "dropout", None), "_keep", 1) < 1:
            kept += width + width // 4
        else:
            shared[path in last, width] = width
    return kept + sum(shared.values())


def _norms(layer: nn.Module, linears: dict[str, nn.Module], hidden: int) -> int:
    """The inputs of a layer's norms; a norm of heads is one of the whole projection that its name says."""
    kept = 0
    for path, module in layer.named_modules():
        if "norm" not in type(module).__name__.lower() or "weight" not in module:
            continue
        width = module["weight"].size
        if width < hidden and (projection := linears.get(path.replace("norm", "proj"))) is not None:
            width = layer_shape(projection)[-2]
        kept += width
    return kept


def _lean(layer: nn.Module) -> set[str]:
    """Paths of the modules that run with functions that keep less."""
    before = {path: type(module) for path, module in layer.named_modules()}
    with lean([layer]):
        return {path for path, module in layer.named_modules() if type(module) is not before[path]}


def _products(layer: nn.Module) -> dict[str, int]:
    """Multiplications a position of each linear of a layer."""
    found = {}
    for path, linear in adaptable(layer).items():
        outputs, inputs = layer_shape(linear)[-2:]
        found[path] = outputs * inputs * _times(layer, linear)
    return found


def _times(layer: nn.Module, linear: nn.Module) -> int:
    """How many of its experts a position goes through; 1 for a linear that is not a layer of experts."""
    return (_attribute(layer, CHOSEN) or 1) if isinstance(linear, EXPERTS) else 1


def _attribute(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first whole number that a module of the layer has under one of these names."""
    for module in layer.modules():
        for name in names:
            if isinstance(value := getattr(module, name, None), int):
                return value
    return None
