"""Paths of modules in transformers' model, which PEFT's files use, and in mlx_lm's.

Most are the same. They differ in three ways:

    text models inside larger ones   model.language_model.layers.0…     here  language_model.model.layers.0…
    experts                          mlp.experts, one parameter for     here  mlp.switch_mlp.gate_proj, up_proj and
                                     gate and up, one for down                down_proj, each an array of all experts
    a few architectures              names of their own

On reading, every name that the base has a module for is tried, and shapes are compared afterwards. For writing, a table
says which architectures were compared name by name with transformers 5; tests/real/test_peft_names.py compares again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, LINEARS, layer_shape
from mlx_lora.adapters.targets import adaptable, bare_modules, layer_prefixes
from mlx_lora.errors import AdapterError
from mlx_lora.models.architectures import routes

PARTS = ("gate_proj", "up_proj", "down_proj")
# What a checkpoint's files call the parts of one expert, before transformers 5 stacked them.
OLD_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# By model_type: linear layers, embeddings and head have the same names, after the prefix of a larger model.
SAME = frozenset({
    "apertus", "cohere", "cohere2", "ernie4_5", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4",
    "gemma4_text", "glm", "glm4", "gpt_bigcode", "granite", "helium", "hunyuan_v1_dense", "internlm3", "lfm2",
    "llama", "mamba", "minicpm3", "ministral3", "mistral", "mistral3", "nemotron", "olmo2", "olmo3", "olmo_hybrid",
    "phi", "phi3", "qwen2", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_vl", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe",
    "granitemoehybrid", "jamba", "mellum", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
})  # fmt: skip
# Of these: gate and up are the halves of one parameter of experts, gate first.
HALVES = frozenset({
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "gemma4", "gemma4_text", "glm4_moe",
    "granitemoe", "granitemoehybrid", "jamba", "mellum", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_next",
})  # fmt: skip
# Here gate and up take turns: rows 0, 2, 4 … are the gate's.
TURNS = frozenset({"gpt_oss"})
# Here transformers 5 says `mlp` where mlx_lm and the files say `block_sparse_moe`.
_MLP = frozenset({"mixtral", "phimoe"})
# In these, PEFT takes targets called gate_proj, up_proj and down_proj for parts of the experts, which were linear
# layers before transformers 5. An adapter on a shared expert or a dense MLP would be dropped without a word.
TAKEN = frozenset({
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "mellum", "mixtral",
    "olmoe", "qwen3_moe", "qwen3_next",
})  # fmt: skip

# Beginnings of a path: as transformers or an older file has it, and what mlx_lm may call it.
_BEGINNINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("model.", "language_model.model."),
    ("model.", "backbone."),
    ("transformer.", "model."),
    ("lm_head", "language_model.lm_head"),
    ("language_model.lm_head", "lm_head"),
)


class Names:
    """The paths of one model, from mlx_lm's to transformers' and back. `config` is its config.json."""

    def __init__(self, model: nn.Module, config: dict[str, Any]):
        self._all = bare_modules(model)
        self._layers = layer_prefixes(model)
        found = adaptable(model)
        inside_first = sorted(found, key=lambda path: not path.startswith(tuple(self._layers)))  # as targets are found
        self.modules = {path: found[path] for path in inside_first}
        self.kind = str(config.get("model_type", ""))
        architectures = config.get("architectures") or [""]
        inside = any(path.startswith("language_model.") for path in self.modules)
        alone = str(architectures[0]).endswith("ForCausalLM")
        self._prefix = ("model." if alone else "model.language_model.") if inside else None

    def ours(self, path: str) -> str | None:
        """mlx_lm's path of the module that transformers has at `path`, or None where the base has none."""
        return next((name for name in _candidates(path) if name in self.modules), None)

    def experts(self, path: str) -> dict[str, str]:
        """The modules by part (`PARTS`) of the experts that transformers has at `path`, …mlp.experts; {} for none."""
        for name in _candidates(path):
            block = name.removesuffix("experts")
            for folder in ("switch_mlp", "experts", "experts.switch_glu", "switch_glu"):
                parts = {part: f"{block}{folder}.{part}" for part in PARTS}
                if all(isinstance(self.modules.get(found), EXPERTS) for found in parts.values()):
                    return parts
        return {}

    def theirs(self, path: str) -> str:
        """transformers' path of a linear layer, an embedding or the head. Raises AdapterError where it isn't known."""
        self.check_known()
        if self._routes(path):
            raise AdapterError(f"{path}: transformers keeps the weight that chooses experts outside of a linear layer")
        name = path.rpartition(".")[2]
        if name in PARTS and self.kind in TAKEN:
            raise AdapterError(
                f"{path}: PEFT takes a target called {name} for a part of the experts in a {self.kind} model, "
                "and would drop this module",
                hint="train without it (adapter.targets), or fuse and export the model",
            )
        return self._outer(path)

    def experts_path(self, path: str) -> tuple[str, str]:
        """transformers' path of the experts that the module at `path` is of, and its part. Raises AdapterError."""
        self.check_known()
        block, _, part = path.rpartition(".")
        if self.kind not in HALVES | TURNS or part not in PARTS:
            raise AdapterError(f"{path}: how transformers stacks the experts of a {self.kind} model isn't known here")
        block = self._outer(re.sub(r"\.(switch_mlp|experts|experts\.switch_glu)$", ".experts", block))
        return block.replace(".block_sparse_moe.", ".mlp.") if self.kind in _MLP else block, part

    def check_known(self) -> None:
        """Raise AdapterError for an architecture whose names in transformers aren't known."""
        if self.kind not in SAME:
            raise AdapterError(
                f"the names that transformers gives the modules of a {self.kind} model aren't known here",
                hint="--to mlx-lm needs no other names; fuse merges the adapter into the model",
            )

    def _outer(self, path: str) -> str:
        if self._prefix is None:
            return path
        if path.startswith("language_model.model."):
            return self._prefix + path.removeprefix("language_model.model.")
        return path.removeprefix("language_model.")

    def shape(self, path: str) -> tuple[int, ...]:
        """The unpacked shape of the weight at mlx_lm's `path`."""
        return layer_shape(self.modules[path])

    def is_head(self, path: str) -> bool:
        """Whether the linear at `path` is the output head: outside the layers, with as many rows as the embedding."""
        module = self.modules[path]
        return isinstance(module, LINEARS) and not path.startswith(tuple(self._layers)) and path in self._as_wide()

    def tied(self) -> bool:
        """Whether the embedding is the output head too: nothing else has an output for each token."""
        return not any(self.is_head(path) for path in self.modules)

    def embedding(self) -> str | None:
        """mlx_lm's path of the token embedding: the first one outside of the layers."""
        outside = (path for path in self.modules if not path.startswith(tuple(self._layers)))
        return next((path for path in outside if isinstance(self.modules[path], EMBEDDINGS)), None)

    def expected(self) -> list[str]:
        """Linear layers that PEFT sees as linear layers too: without those that choose experts."""
        return [path for path, module in self.modules.items() if isinstance(module, LINEARS) and not self._routes(path)]

    def _as_wide(self) -> set[str]:
        rows = {layer_shape(module)[0] for module in self.modules.values() if hasattr(module, "as_linear")}
        return {path for path, module in self.modules.items() if layer_shape(module)[0] in rows}

    def _routes(self, path: str) -> bool:
        prefix = next((prefix for prefix in self._layers if path.startswith(prefix)), None)
        return prefix is not None and routes(path, prefix, self._all)


def theirs_of(path: str) -> Iterator[str]:
    """Every path that transformers may have for the module at mlx_lm's `path`."""
    yield path
    for theirs, ours in _BEGINNINGS:
        if path.startswith(ours):
            yield theirs + path.removeprefix(ours)


def _candidates(path: str) -> Iterator[str]:
    """Every path that mlx_lm may have for the module at transformers' `path`."""
    names = [path, *(ours + path.removeprefix(theirs) for theirs, ours in _BEGINNINGS if path.startswith(theirs))]
    yield from names
    yield from (name.replace(".mlp.", ".block_sparse_moe.") for name in names if ".mlp." in name)
