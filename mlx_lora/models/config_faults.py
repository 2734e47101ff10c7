"""Which setting of config.json is to blame where mlx_lm can't make a model of it, or run one.

mlx_lm takes the values of config.json as they are, and a wrong one shows somewhere inside a layer: as a number that
can't be divided by a text, or as a missing key of a mapping that no message names. Nothing is checked beforehand: its
annotations aren't exact, and a model that it runs must not be refused. Once it has failed, config.json is compared with
what it said, with the values that it was working on, and with its annotations. Knows no architecture.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import re
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlx_lora.errors import MlxLoraError, ModelError
from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    import mlx_lm.utils as mlx_lm_utils

HINT = "compare it with the config.json of the model's source, or of another model of that architecture"
# Counts and sizes, none of which can be 0.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# MLX's dimensions are of 32 bits.
LARGEST = 2**31 - 1
# Mappings that scale rotary positions, and the numbers in them.
ROPE = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor", "rope_theta",
)  # fmt: skip
KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object",
}  # fmt: skip
_SHAPES = re.compile(r"Expected shape \(([\d, ]*)\) but received shape \(([\d, ]*)\) for parameter (\S+)")
_MODELS = re.compile(r"[/\\]mlx_lm[/\\]models[/\\]")


@contextmanager
def naming_settings(config: dict[str, Any], *, where: str = "config.json") -> Iterator[None]:
    """Turn what mlx_lm's models raise into a ModelError that names the setting of `config`, the content of `where`.

    What was raised elsewhere, as by a damaged file of weights, passes.
    """
    try:
        yield
    except MlxLoraError:
        raise
    except Exception as error:
        if found := _blame(config, error):
            raise ModelError(f"{where}: {found}", hint=HINT) from error
        line = _line(error)
        if line is None:
            raise
        words = str(error).strip().partition("\n")[0][:300]
        raise ModelError(
            f"{where} has a setting that mlx-lm can't use: {words} ({type(error).__name__}), in `{line}`", hint=HINT
        ) from error


def _blame(config: dict[str, Any], error: Exception) -> str | None:
    """The setting at fault and what is wrong with it, or None."""
    if found := _SHAPES.search(str(error)):
        return _unfitting(config, found)
    if _line(error) is None:
        return None
    reasons = [_missing_key(config, error), _missing_settings(config, error)]
    for check in (_wrong_type, _out_of_range, _indivisible):
        reasons += [check(prefix, part) for prefix, part in _parts(config)]
    reasons.append(_mentioned(config, str(error)))
    return next((reason for reason in reasons if reason), None)


def _parts(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """config.json, and what it says of the text model inside a larger one; each with what its keys begin with."""
    inner = config.get("text_config")
    return [("", config)] + ([("text_config.", inner)] if isinstance(inner, dict) else [])


def _mappings(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every mapping in config.json by its dotted key, the innermost last."""
    found = [("", config)]
    for prefix, part in found:
        found += [(f"{prefix}{key}.", value) for key, value in part.items() if isinstance(value, dict)]
    return found


def _frames(error: Exception) -> list[types.FrameType]:
    """Frames of a traceback, the innermost first."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        found.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return found[::-1]


def _line(error: Exception) -> str | None:
    """The innermost line of mlx_lm's models that raised, or None; what reads weights is none."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_name == "sanitize":
            return None
        if _MODELS.search(code.co_filename):
            found = linecache.getline(code.co_filename, traceback.tb_lineno).strip()
        traceback = traceback.tb_next
    return found


def _missing_key(config: dict[str, Any], error: Exception) -> str | None:
    """The mapping of config.json that a KeyError is about, known by being at hand where it was raised."""
    if not isinstance(error, KeyError) or not error.args:
        return None
    key = error.args[0]
    for frame in _frames(error):
        at_hand = [value for value in frame.f_locals.values() if isinstance(value, dict) and key not in value]
        for prefix, part in reversed(_mappings(config)):
            if any(part == value for value in at_hand):
                return f"{prefix.removesuffix('.')} has no {key!r}" if prefix else f"{key!r} is missing"
    return None


def _missing_settings(config: dict[str, Any], error: Exception) -> str | None:
    """Settings without a default that are missing, where mlx_lm's class of them was being made."""
    for frame in _frames(error):
        kind, given = frame.f_locals.get("cls"), frame.f_locals.get("params")
        if isinstance(error, TypeError) and dataclasses.is_dataclass(kind) and isinstance(given, dict):
            missing = [
                field.name
                for field in dataclasses.fields(kind)
                if field.name not in given
                and field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ]
            where = next((prefix for prefix, part in reversed(_parts(config)) if part == given), "")
            if missing:
                names = ", ".join(f"{where}{name}" for name in missing)
                return f"{names} {'is' if len(missing) == 1 else 'are'} missing"
    return None


def _wrong_type(prefix: str, part: dict[str, Any]) -> str | None:
    """The first setting whose value isn't of the kind that mlx_lm's annotations have."""
    wanted: dict[str, str] = {}
    with suppress(Exception):  # no such architecture, or annotations that can't be evaluated
        kind = mlx_lm_utils._get_classes(part)[1]
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in part and (words := _wanted(part[field.name], hints[field.name], field.default)):
                wanted[field.name] = words
    for key, value in part.items():
        if key in SIZES and not isinstance(value, int | None | list):
            wanted.setdefault(key, KINDS[int])
        if key in ROPE and isinstance(value, dict):
            wrong = [name for name in ROPE_NUMBERS if name in value and not isinstance(value[name], int | float)]
            wanted |= {f"{key}.{name}": KINDS[float] for name in wrong}
    for key, words in wanted.items():
        name, _, inner = key.partition(".")
        value = part[name][inner] if inner else part[name]
        return f"{prefix}{key} is {_shown(value)}, {words} is needed"
    return None


def _wanted(value: Any, hint: Any, default: Any) -> str | None:
    """What an annotation wants in place of `value`, or None where it fits or says nothing."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        words = [_wanted(value, one, default) for one in typing.get_args(hint)]
        return None if None in words else " or ".join(dict.fromkeys(word for word in words if word and word != "null"))
    if value is None and (default is None or hint is type(None)):
        return None
    kind = typing.get_origin(hint) or hint
    if kind not in KINDS:
        return "null" if hint is type(None) else None
    fitting = {float: (int, float), bool: (bool, int), list: (list, tuple)}.get(kind, kind)
    fits = isinstance(value, fitting) and not (isinstance(value, bool) and kind in (int, float))
    return None if fits else KINDS[kind]


def _out_of_range(prefix: str, part: dict[str, Any]) -> str | None:
    for key in SIZES:
        value = part.get(key)
        if isinstance(value, int | float) and not 0 < value <= LARGEST:
            return f"{prefix}{key} is {_shown(value)}, " + (
                "at least 1 is needed" if value <= 0 else "too large for MLX"
            )
    for key in ROPE:
        factor = part[key].get("factor") if isinstance(part.get(key), dict) else None
        if isinstance(factor, int | float) and factor <= 0:
            return f"{prefix}{key}.factor is {_shown(factor)}, more than 0 is needed"
    return None


def _indivisible(prefix: str, part: dict[str, Any]) -> str | None:
    hidden, heads, of_keys = (part.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or not heads:
        return None
    if isinstance(of_keys, int) and of_keys and heads % of_keys:
        return f"{prefix}num_attention_heads is {heads}, which num_key_value_heads, {of_keys}, doesn't divide"
    if isinstance(hidden, int) and not part.get("head_dim") and hidden % heads:
        return f"{prefix}hidden_size is {hidden}, which num_attention_heads, {heads}, doesn't divide"
    return None


def _mentioned(config: dict[str, Any], words: str) -> str | None:
    """The setting whose value mlx_lm's words repeat, the innermost first, or else whose name they repeat."""
    mappings = reversed(_mappings(config))
    items = [(f"{prefix}{key}", key, value) for prefix, part in mappings for key, value in part.items()]
    for path, _, value in items:
        if isinstance(value, str) and len(value) > 1 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", words):
            return f"{path} is {_shown(value)}, which mlx-lm can't use: {words[:300]}"
    for path, key, value in items:
        if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", words):
            return f"{path} is {_shown(value)}, which mlx-lm can't use: {words[:300]}"
    return None


def _unfitting(config: dict[str, Any], found: re.Match[str]) -> str | None:
    """The size that makes the model want another shape of a tensor than the files have."""
    wanted, stored = ([int(size) for size in text.split(",") if size.strip()] for text in found.groups()[:2])
    name = found[3].rstrip(".,")
    files_have = f"{name} has shape {tuple(stored)} in the files, {tuple(wanted)} by config.json"
    if len(wanted) != len(stored):
        return files_have
    packed = bool(config.get("quantization"))
    differing = [size for size, other in zip(wanted, stored, strict=True) if size != other]
    if packed and wanted[0] == stored[0]:  # the columns of a packed weight follow from its bits
        return f"quantization doesn't fit the files: {files_have}"
    for prefix, part in _parts(config):
        if reason := _out_of_range(prefix, part) or _indivisible(prefix, part):
            return f"{reason}; {files_have}"
        for key, value in _sizes(part, name).items():
            if value in differing:
                return f"{prefix}{key} is {part.get(key.split(' ')[0])}, which doesn't fit the files: {files_have}"
    return files_have


def _sizes(part: dict[str, Any], name: str) -> dict[str, int]:
    """What the dimensions of the tensor of this name may be made of, by setting."""
    attention, mlp = re.search(r"attn|attention", name), re.search(r"mlp|ffn|feed_forward|experts", name)
    keys = ["hidden_size"] + ["intermediate_size"] * bool(mlp) + ["vocab_size"] * (not attention and not mlp)
    sizes = {key: part[key] for key in keys if isinstance(part.get(key), int)}
    hidden, heads = part.get("hidden_size"), part.get("num_attention_heads")
    if attention and isinstance(hidden, int) and isinstance(heads, int) and heads:
        width = part.get("head_dim") or hidden // heads
        of_keys = part.get("num_key_value_heads") or heads
        sizes |= {"num_attention_heads": heads * width, "num_key_value_heads": of_keys * width, "head_dim": width}
    return sizes


def _shown(value: Any) -> str:
    """A value as config.json has it, shortened."""
    return json.dumps(value, default=str)[:100]
