"""The table of names in interop/peft/names.py against transformers: every architecture in it, module by module.

transformers builds each model without weights from the same tiny configuration as mlx_lm.
"""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from typing import Any

import mlx.nn as nn
import pytest

from mlx_lora.adapters.base import EXPERTS, layer_shape
from mlx_lora.errors import AdapterError
from mlx_lora.interop.peft.names import HALVES, SAME, TAKEN, TURNS, Names
from tests.models.tiny import mixed, plain

pytestmark = pytest.mark.real

CONFIGS: dict[str, dict[str, Any]] = {**plain.CONFIGS, **mixed.CONFIGS}
# Built by the module of another architecture, or not from such a small configuration.
NOT_BUILT = {"mistral": "llama's module"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def theirs(config: dict[str, Any]) -> Any:
    """transformers' model on torch's meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        settings = transformers.AutoConfig.for_model(**{**config, **TOKENS})
        with torch.device("meta"):
            try:
                return transformers.AutoModelForCausalLM.from_config(settings)
            except ValueError:
                return transformers.AutoModelForImageTextToText.from_config(settings)


@pytest.mark.parametrize("kind", sorted(SAME - NOT_BUILT.keys()))
def test_names_are_transformers_own(kind: str) -> None:
    config = CONFIGS[kind]
    module = import_module(f"mlx_lm.models.{kind}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(dict(config)))
    other = theirs(config)
    names = Names(model, config | {"architectures": [type(other).__name__]})
    modules, parameters = dict(other.named_modules()), dict(other.named_parameters())
    found = 0
    for path, layer in names.modules.items():
        try:
            if isinstance(layer, EXPERTS):
                block, part = names.experts_path(path)
                name = f"{block}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
                _, outputs, inputs = layer_shape(layer)
                rows = outputs if part == "down_proj" else 2 * outputs
                shape = (inputs, rows) if kind in TURNS else (rows, inputs)
                assert tuple(parameters[name].shape[1:]) == shape, name
                assert bool(getattr(modules[block], "is_transposed", False)) is (kind in TURNS)
            else:
                name = names.theirs(path)
                assert tuple(modules[name].weight.shape) in (layer_shape(layer), layer_shape(layer)[::-1]), name
        except AdapterError as error:
            assert re.search("chooses experts|would drop this module", error.message), error.message
            continue
        assert names.ours(name) == path or isinstance(layer, EXPERTS)
        found += 1
    assert found > 3
    if any(isinstance(layer, EXPERTS) for layer in names.modules.values()):
        assert kind in HALVES | TURNS


def test_targets_that_peft_takes_for_experts_are_known() -> None:
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    assert {kind for kind in SAME if _MODEL_TO_CONVERSION_PATTERN.get(kind) in _MOE_TARGET_MODULE_MAPPING} == TAKEN
