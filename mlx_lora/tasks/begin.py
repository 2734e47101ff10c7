"""The adapter a run begins with: attached, and filled from what its init asks for.

LoftQ asks for the weights from before packing, which are read a second time, lazily and one after another; EVA for
activations, of a few batches of the training rows. Both give every process of a group the same arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_lora import methods
from mlx_lora.adapters.attach import Wrappers, attach, build
from mlx_lora.adapters.init import eva, loftq
from mlx_lora.adapters.placement import place
from mlx_lora.adapters.targets import adaptable
from mlx_lora.config import Recipe
from mlx_lora.data.batch import collate, epoch_steps
from mlx_lora.data.rows import Row, lengths
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import RecipeError
from mlx_lora.models import finite
from mlx_lora.models.load import LoadedModel, load_stored
from mlx_lora.models.open import OpenModel

# EVA's look at the data: so many batches, and so many positions of each.
BATCHES, POSITIONS = 16, 256


def check_start(recipe: Recipe) -> None:
    """Raise RecipeError for what this base or this method can't give, before anything is loaded."""
    if recipe.train.max_drift is not None and "prompt" in methods.parts(recipe.adapter.method):
        raise RecipeError(
            "train.max_drift runs the base on the same rows, and it has no embedding for prompt's virtual tokens",
            hint="leave max_drift out, or use method lora or prefix",
        )
    if recipe.adapter.init == "loftq" and recipe.quantize is None:
        raise RecipeError(
            "adapter.init loftq starts from what packing the base loses, and this recipe packs none",
            hint="add quantize: for a base in half precision; over one that is packed already, init pissa or default",
        )
    if recipe.adapter.init == "eva" and virtual_of(recipe.adapter):
        raise RecipeError(
            f"adapter.init eva looks at the activations of rows as they are, and {recipe.adapter.method} changes them",
            hint="init default, or method lora",
        )


def begin(recipe: Recipe, opened: OpenModel, loaded: LoadedModel, rows: Sequence[Row]) -> Wrappers:
    """The wrappers of a recipe on its loaded base, ready to train.

    Raises AdapterError as `attach` does, and NotFinite for weights or activations that no factors can be made of.
    """
    with finite.explaining(loaded.model):
        settings = recipe.adapter
        directions: dict[str, mx.array] = {}
        if settings.init == "eva":
            settings = place(loaded.model, settings).config  # the ranks that there are to redistribute
            wanted = build(loaded.model, settings, seed=recipe.seed)  # raises where nothing has activations
            layers = {path: wrapper.base for path, wrapper in wanted.items() if "lora_a" in wrapper}
            settings, directions = eva(loaded.model, layers, settings, _batches(recipe, rows))
        wrappers = attach(loaded.model, settings, seed=recipe.seed)
        for path, columns in directions.items():
            wrappers[path].lora_a = columns
        if settings.init == "loftq":
            loftq(wrappers, _originals(opened, wrappers))
        for path, wrapper in wrappers.items():
            mx.eval(wrapper.parameters())  # one after another: a weight taken apart is freed before the next
            if not all(mx.isfinite(array).all().item() for array in wrapper.adapter_arrays().values()):
                raise FloatingPointError(f"the factors made of {path} aren't finite")
    return wrappers


def _originals(opened: OpenModel, wrappers: Wrappers) -> dict[str, mx.array]:
    """The weights of the wrapped layers as the files hold them, not yet read."""
    layers = adaptable(load_stored(opened).model)
    return {path: layers[path]["weight"] for path in wrappers if path in layers}


def _batches(recipe: Recipe, rows: Sequence[Row]) -> Iterator[tuple[mx.array, mx.array]]:
    """Tokens (B, T) and positions with loss, evenly spaced, of the first batches of the first epoch."""
    steps = epoch_steps(
        lengths(rows).tolist(), batch_size=recipe.train.batch_size, grad_accumulation=1, seed=recipe.seed, epoch=0
    )
    for lines in [lines for step in steps[:BATCHES] for lines in step][:BATCHES]:
        batch = collate(rows, lines)
        (found,) = np.nonzero(batch.weights.reshape(-1))
        spaced = np.unique(np.linspace(0, len(found) - 1, min(POSITIONS, len(found))).astype(int))
        yield mx.array(batch.inputs), mx.array(found[spaced].astype(np.int32))
