"""A GGUF file's beginning: metadata of the right types, and the list of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

# Metadata lists whose elements have another type than gguf's writer would choose.
LISTS = {"tokenizer.ggml.token_type": gguf.GGUFValueType.INT32, "tokenizer.ggml.scores": gguf.GGUFValueType.FLOAT32}


def write_header(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Write `fields` and the tensors' infos that the writer was given; then their data can follow, in that order."""
    kinds = gguf.GGUFValueType
    for key, value in fields.items():
        if key == "general.architecture":  # the writer adds its own
            continue
        if isinstance(value, list | tuple):
            writer.add_key_value(key, list(value), kinds.ARRAY, sub_type=LISTS.get(key))
        elif isinstance(value, bool | np.bool_):
            writer.add_bool(key, bool(value))
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
