"""Ways to damage a valid file, each a function of a seeded generator: its bytes, its text, its structure, its header.

`mutate(kind, content, random)` gives other bytes. Structure is changed under a header that stays readable, because a
reader that stops at the first wrong length never shows what it does with the rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf

# Where counting goes wrong: around zero, around the widths of integers, and beyond all of them.
NUMBERS = [0, 1, 2, 3, 7, 31, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    None, True, False, -1, -(2**31), -(2**63), 2**70, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "\0", "../../etc/passwd", "/dev/zero", "é" * 500, "\u202e", [], {}, [[]], [None], {"": None},
    *NUMBERS,
]  # fmt: skip
KEYS = ["auto_map", "model_file", "", "x", "__metadata__", "num_hidden_layers", "quantization", "a" * 300]
DTYPES = ["F64", "F32", "F16", "BF16", "BOOL", "C64", "F4", "F8_E5M2", "I64", "", None]


def mutate(kind: str, content: bytes, random: Random) -> bytes:
    """A damaged copy of a file's bytes, by one to three steps that its kind allows."""
    ways = [_bytes, *WAYS[kind]]
    for _ in range(random.choice((1, 1, 2, 3))):
        content = random.choice(ways)(content, random)
    return content


def _bytes(content: bytes, random: Random) -> bytes:
    """Flip bits, cut off, cut out, put in, repeat, or overwrite with a number; the front more often than the rest."""
    damaged = bytearray(content)
    reach = len(damaged) if random.random() < 0.4 else min(len(damaged), 4096)
    at = random.randrange(reach + 1)
    span = slice(at, at + random.choice((1, 2, 4, 8, 100, 5000)))
    way = random.randrange(6)
    if way == 0:
        for _ in range(random.choice((1, 2, 8, 64))):
            if damaged:
                damaged[random.randrange(min(reach, len(damaged)) or 1)] ^= 1 << random.randrange(8)
    elif way == 1:
        del damaged[at:]
    elif way == 2:
        del damaged[span]
    elif way == 3:
        filler = random.choice((b"\0", b"\xff", b"{", b'"', b"[", b"\n", random.randbytes(1)))
        damaged[at:at] = filler * random.choice((1, 3, 8, 1000))
    elif way == 4:
        damaged[at:at] = damaged[span] * random.choice((1, 2, 50))
    else:
        number = struct.pack(random.choice("<>") + "Q", random.choice(NUMBERS))[: random.choice((1, 2, 4, 8))]
        damaged[at : at + len(number)] = number
    return bytes(damaged)


def _text(content: bytes, random: Random) -> bytes:
    """What editors and other programs do to text: marks, encodings, disguises, nesting without end."""
    start, end = content[: len(content) // 2], content[len(content) // 2 :]
    return random.choice(
        [
            b"\xef\xbb\xbf" + content, b"\xff\xfe" + content, content.replace(b"e", b"\xe9", 1), start + b"\0" + end,
            b"PK\x03\x04" + content, b"\x80\x04" + content, b"[" * 5000 + content, b'{"a":' * 2000 + content,
            content * 2, b"", b" ", b"null", b"[]", b"{}", b"9" * 5000, content.replace(b"\n", b"\r"),
            content.replace(b":", b": 1e999 #", 1), content.replace(b'"', b"", 1), content.replace(b"}", b"", 1),
        ]
    )  # fmt: skip


def _json(content: bytes, random: Random) -> bytes:
    """Change one value, one key or one list of a JSON document, which stays JSON."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, random)
    return json.dumps(_changed(value, random)).encode()


def _json_lines(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = _json(lines[at], random)
    return b"\n".join(lines)


def _changed(value: Any, random: Random) -> Any:
    """A JSON value with something inside it changed."""
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = random.choice(keys)
        way = random.random()
        if way < 0.7:
            value[key] = _changed(value[key], random)
        elif way < 0.85:
            del value[key]
        elif isinstance(value, dict):
            value[random.choice(KEYS)] = random.choice([value[key], *VALUES])
        else:
            value.insert(random.randrange(len(value) + 1), random.choice([value[key], *VALUES]))
        return value
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.3:
        return value + random.choice((-1, 1))
    return random.choice(VALUES)


def _safetensors_header(content: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file and write its new length before it, or a wrong one."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    way = random.random()
    if way < 0.1:
        return struct.pack("<Q", random.choice([length - 1, length + 1, *NUMBERS])) + text + data
    if way < 0.2:  # a name twice
        text = text.replace(b'":{', b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"twice":{', 1)
        text = text.replace(b"{", b'{"twice":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', 1)
    else:
        text = _tensor_changed(text, random) if way < 0.7 else _json(text, random)
    return struct.pack("<Q", len(text)) + text + data


def _tensor_changed(text: bytes, random: Random) -> bytes:
    """One tensor's type, shape, offsets or name."""
    try:
        header = json.loads(text)
        name = random.choice([name for name in header if name != "__metadata__"])
        tensor = header[name]
        way = random.randrange(5)
        if way == 0:
            tensor["dtype"] = random.choice(DTYPES)
        elif way == 1:
            shape = tensor["shape"]
            tensor["shape"] = random.choice([shape[::-1], [*shape, 1], [*shape, 0, 2**63], [-1, *shape], shape * 2, []])
        elif way == 2:
            offsets = tensor["data_offsets"]
            moved = [offsets[0] + random.choice((-4, 4, 2**32)), offsets[1] + random.choice((-4, 4, 2**62))]
            tensor["data_offsets"] = random.choice([offsets[::-1], moved, [0, offsets[1]], [offsets[0]], None, [0, 0]])
        elif way == 3:
            header[random.choice(["", "../x", "a\0b", "__metadata__", name + "x"])] = header.pop(name)
        else:
            header[random.choice(["zero", "other"])] = dict(tensor)
    except (ValueError, LookupError, TypeError, AttributeError):
        return text[:-1]
    return json.dumps(header).encode()


def _gguf_numbers(content: bytes, random: Random) -> bytes:
    """Overwrite a count, a length, a type, a dimension or an offset of a GGUF file with another number."""
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 2))):
        at, size = random.choice(_gguf_places)
        number = random.choice([*NUMBERS, *range(16)])
        damaged[at : at + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(damaged)


_gguf_places: list[tuple[int, int]] = []


def learn_gguf(file: Path) -> None:
    """Note where the numbers stand in a valid GGUF file, for `mutate`."""
    reader = gguf.GGUFReader(file)
    places = [(4, 4), (8, 8), (16, 8)]
    for field in list(reader.fields.values())[3:]:
        at = field.offset
        for part in field.parts[:5]:
            places += [(at, part.nbytes)] if part.nbytes in (1, 4, 8) else []
            at += part.nbytes
    for tensor in reader.tensors:
        at = tensor.field.offset
        for part in tensor.field.parts:
            step = part.itemsize
            places += [(at + n, step) for n in range(0, part.nbytes, step)] if step > 1 else []
            at += part.nbytes
    _gguf_places[:] = places


def _yaml(content: bytes, random: Random) -> bytes:
    """What YAML has beyond plain values, anchors, tags, documents, odd scalars: between lines, or in place of one."""
    lines = content.split(b"\n")
    laughs = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(ord("a"), ord("p"))
    )
    line = random.choice(
        [
            b"train: *x", b"train: &x {iters: *x}", b"<<: {seed: 1}", b"<<: 5", b"? [a, b]\n: c", b"? {a: b}\n: c",
            b"seed: !!python/object/apply:os.system [id]", b"seed: !!int ''", b"seed: !!float ''", b"seed: !!bool x",
            b"seed: !!timestamp x", b"seed: !!binary x", b"seed: !!set {a}", b"seed: !!omap [a]", b"seed: 2024-13-45",
            b"seed: 9" + b"9" * 5000, b"seed: 0x" + b"f" * 5000, b"seed: .nan", b"seed: .inf", b"seed: 1:2:3:4:5:6",
            b"--- {}\n--- {}", b"%YAML 9.9", b"\tseed: 1", b"seed: |", b"seed: 'x", b"{" * 2000, b"[" * 2000,
            b"- " * 2000, b"seed: ~", b"seed: yes", b"adapter: 5", b"adapter: [rank]", b"data: {path: \"\\0\"}",
            b"name: ../x", b"name: \"\\u202e\"", laughs, laughs + b"seed: *p", laughs + b"adapter: {targets: *p}",
        ]
    )  # fmt: skip
    at = random.randrange(len(lines))
    lines[at : at + random.randrange(2)] = [line]
    return b"\n".join(lines)


WAYS: dict[str, list[Callable[[bytes, Random], bytes]]] = {
    "safetensors": [_safetensors_header, _safetensors_header, _safetensors_header],
    "gguf": [_gguf_numbers, _gguf_numbers, _gguf_numbers],
    "json": [_json, _json, _json, _text],
    "jsonl": [_json_lines, _json_lines, _json_lines, _text],
    "yaml": [_yaml, _yaml, _text],
}
