"""adapter_config.json of PEFT: which settings are understood, what they say of a module, and which are refused by name.

PEFT's own rules decide which modules an adapter is on, and with which rank and alpha:

    target_modules        a string is a regular expression for the whole path, and `all-linear` every linear layer but
                          the output head; an entry of a list is a path, or the end of one after a dot
    exclude_modules       the same; what it names is left out
    layers_to_transform   numbers of layers, where targets are a list; `layers_pattern` is the name of the layers' list
    rank_pattern,         the first key that matches the end of a path, as a regular expression, wins
    alpha_pattern

Paths are those of transformers' model. A setting that isn't known here may change what the adapter computes, so it is
refused unless its value says that it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from mlx_lora import files
from mlx_lora.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPES = ("LORA", "VERA", "IA3")
ALL_LINEAR = "all-linear"
# Initial values that leave the base as it was. After any other one, the adapter belongs to a base that was changed.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", None)

# Settings that say nothing about what an adapter computes.
_NOTES = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "runtime_config", "eva_config",
}  # fmt: skip
_PLACES = {"target_modules", "layers_to_transform", "layers_pattern"}
_KNOWN = {
    "LORA": _NOTES | _PLACES | {
        "exclude_modules", "target_parameters", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
        "use_qalora", "qalora_group_size", "rank_pattern", "alpha_pattern", "init_lora_weights",
    },
    "VERA": _NOTES | _PLACES | {
        "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights",
    },
    "IA3": _NOTES | {"target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"},
}  # fmt: skip
# What refused settings do, where that isn't plain from their names.
_MEANINGS = {
    "alora_invocation_tokens": "an activated LoRA is off until these tokens appear",
    "arrow_config": "routes between several adapters",
    "bias": "biases of the base were trained too",
    "ensure_weight_tying": "ties adapters of embeddings and head",
    "layer_replication": "the base has repeated layers",
    "lora_bias": "B has a bias",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained too",
}
# Ranks and alphas are below this, and so is the time in seconds that an expression may take on one path: a foreign file
# can hold one that would take for ever.
LARGEST = 1 << 31
LONGEST = 1.0
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {})


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_targets(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_names(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _is_pattern(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(kind(entry) for entry in value.values()))

    return check


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# Default, and what a value must be.
_VALUES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "r": (None, _is_integer, "a whole number above 0"),
    "lora_alpha": (8, _is_number, "a number above 0"),
    "qalora_group_size": (16, _is_integer, "a whole number above 0"),
    "use_rslora": (False, _is_flag, "true or false"),
    "use_dora": (False, _is_flag, "true or false"),
    "use_qalora": (False, _is_flag, "true or false"),
    "save_projection": (True, _is_flag, "true or false"),
    "target_modules": (None, _is_targets, "a string or a list of names"),
    "exclude_modules": (None, _is_targets, "a string or a list of names"),
    "feedforward_modules": (None, _is_targets, "a string or a list of names"),
    "target_parameters": (None, lambda value: value is None or _is_names(value), "a list of names"),
    "layers_to_transform": (None, _is_layers, "a number or a list of numbers"),
    "layers_pattern": (None, _is_targets, "a string or a list of names"),
    "rank_pattern": (None, _is_pattern(_is_integer), "whole numbers above 0 by name"),
    "alpha_pattern": (None, _is_pattern(_is_number), "numbers above 0 by name"),
}


@dataclass(frozen=True)
class Settings:
    """What a configuration says; `method` is ours: lora, dora, qalora, vera or ia3. Paths are transformers'."""

    method: str
    values: dict[str, Any]

    def rank_of(self, path: str) -> int:
        """The rank of the module, or of the parameter of experts, at `path`."""
        return int(_first(self.values["rank_pattern"], path, self.values["r"]))

    def scale_of(self, path: str) -> float:
        """s = α/r, or α/√r with rsLoRA, after both patterns."""
        rank = self.rank_of(path)
        alpha = float(_first(self.values["alpha_pattern"], path, self.values["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.values["use_rslora"] else rank)

    def targets(self, path: str, *, linear: bool, head: bool = False) -> bool:
        """Whether PEFT puts the adapter on the module at `path`, which is a linear layer, the output head or neither.

        True where the configuration names no target: then PEFT has a list for each kind of model, which isn't in it.
        """
        excluded, chosen = self.values["exclude_modules"], self.values["target_modules"]
        if excluded and _names(excluded, path):
            return False
        if chosen is None:
            return not self.values["target_parameters"]
        if isinstance(chosen, str):
            if chosen.lower() == ALL_LINEAR:
                return linear and not head
            return fits(chosen, path)
        return path in chosen or (_names(chosen, path) and self._has_layer(path))

    def targets_parameter(self, path: str) -> bool:
        """Whether the adapter is on the parameter of experts at `path`."""
        return _names(self.values["target_parameters"] or [], path)

    def feeds_forward(self, path: str) -> bool:
        """Whether IA³ multiplies the inputs of the module at `path`: PEFT compares the ends of paths, without a dot."""
        chosen = self.values["feedforward_modules"]
        if isinstance(chosen, str):
            return fits(chosen, path)
        return any(path.endswith(name) for name in chosen or [])

    def _has_layer(self, path: str) -> bool:
        wanted, pattern = self.values["layers_to_transform"], self.values["layers_pattern"]
        if wanted is None or wanted == []:
            return True
        names = [pattern] if isinstance(pattern, str) and pattern else pattern or []
        expressions = [_layer_of(name) for name in names] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
        found = next((match for expression in expressions if (match := _match(expression + ".*", path))), None)
        return found is not None and int(found["index"]) in (wanted if isinstance(wanted, list) else [wanted])


def fits(expression: str, path: str) -> bool:
    """Whether a regular expression matches a whole path. Raises AdapterError for one that takes too long to say so."""
    return _match(expression, path) is not None


def _match(expression: str, path: str) -> Any:
    try:
        return regex.fullmatch(expression, path, timeout=LONGEST)
    except TimeoutError:
        raise AdapterError(f"the expression {expression[:80]!r} takes too long on {path}; it was stopped") from None


def _layer_of(name: str) -> str:
    """The expression for a path inside a list of layers that is called `name`."""
    return rf"(?:^|.*?\.){name}\.(?P<index>\d+)\."


def _own_end(key: str) -> str:
    """The expression for a path whose end matches `key`."""
    return rf"(.*\.)?({key})"


def _names(chosen: str | list[str], path: str) -> bool:
    if isinstance(chosen, str):
        return fits(chosen, path)
    return any(path == name or path.endswith(f".{name}") for name in chosen)


def _first(patterns: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if fits(_own_end(key), path)), default)


def read_settings(folder: Path) -> Settings:
    """The settings of a PEFT directory. Raises one AdapterError with every setting that isn't understood."""
    file = folder / CONFIG
    given = files.read_json(file, AdapterError, finite=True)
    if not isinstance(given, dict) or given.get("peft_type") not in TYPES:
        kind = given.get("peft_type") if isinstance(given, dict) else None
        raise AdapterError(f"{file}: peft_type {kind!r} is not supported, only {', '.join(TYPES)}")
    kind = given["peft_type"]
    values = {name: given.get(name, default) for name, (default, _, _) in _VALUES.items()}
    faults = [_refusal(name, value) for name, value in given.items() if name not in _KNOWN[kind] and value not in _OFF]
    faults += _faults(kind, values)
    init = given.get("init_lora_weights", True)
    if kind == "LORA" and not any(
        init is known or (isinstance(init, str) and init == known) for known in HARMLESS_INITS
    ):
        faults.append(
            f"init_lora_weights is {init!r}: this start changed the base, so the adapter isn't for the original"
        )
    if faults:
        raise AdapterError(
            f"{file}:\n  " + "\n  ".join(faults),
            hint="PEFT can merge such an adapter into its model, which then goes in as a base",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = values[name] or {}
    return Settings(_method(kind, values), values)


def _refusal(name: str, value: Any) -> str:
    shown = repr(value)
    meaning = _MEANINGS.get(name, "this setting isn't supported")
    return f"{name} is {shown if len(shown) < 80 else shown[:77] + '…'}: {meaning}"


def _faults(kind: str, values: dict[str, Any]) -> list[str]:
    """Settings of a wrong type, expressions that aren't any, and methods that exclude each other."""
    faults = [
        f"{name} is {values[name]!r}, not {wanted}"
        for name, (_, fits, wanted) in _VALUES.items()
        if name in _KNOWN[kind] and not fits(values[name])
    ]
    if faults:
        return faults
    if kind == "LORA" and sum((values["use_dora"], values["use_qalora"])) > 1:
        faults.append("use_dora and use_qalora are both on")
    strings = ("target_modules", "exclude_modules", "feedforward_modules")
    used = [(name, text, text) for name in strings if isinstance(text := values[name], str)]
    used += [(name, key, _own_end(key)) for name in ("rank_pattern", "alpha_pattern") for key in values[name] or {}]
    layers = values["layers_pattern"]
    lists = layers if isinstance(layers, list) else [layers] if layers else []
    used += [("layers_pattern", name, _layer_of(name)) for name in lists]
    for name, text, expression in used:
        try:
            re.compile(expression)
        except re.error as error:
            faults.append(f"{name}: {text!r} is not a regular expression that PEFT can use: {error}")
    return faults


def _method(kind: str, values: dict[str, Any]) -> str:
    if kind != "LORA":
        return kind.lower()
    return "dora" if values["use_dora"] else "qalora" if values["use_qalora"] else "lora"
