"""Grammars by llguidance: what may be said next, as a mask over the vocabulary.

The tokenizer of a base is prepared once, which takes about a second (several for large vocabularies). A grammar is
text in llguidance's form of Lark; schemas stand in it as `%json`. Sizes are bounded before a grammar is compiled, and
llguidance's own limits bound compiling and every step after it.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from typing import Any

from mlx_lora.serve.openai.errors import ApiError, refused

# Bytes, levels and values of a schema.
MOST_BYTES, MOST_DEPTH, MOST_VALUES = 1 << 16, 32, 8192
# llguidance builds an automaton with a state for every remainder.
MOST_MULTIPLE = 1000
# White space between the parts of JSON, a space or a new line with its indent: without a bound, a small model may write
# nothing else.
WHITE_SPACE = r"( |\n[ \t]{0,24})"
KEPT = 32  # compiled grammars

log = logging.getLogger(__name__)
_known: weakref.WeakKeyDictionary[Any, Grammars] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Grammars:
    """The grammars of one tokenizer. Any thread may use them."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = weakref.proxy(tokenizer)
        self._ends = sorted(tokenizer.eos_token_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    @staticmethod
    def of(tokenizer: Any) -> Grammars:
        """Those of a tokenizer, made at the first use."""
        with _lock:
            if tokenizer not in _known:
                _known[tokenizer] = Grammars(tokenizer)
            return _known[tokenizer]

    def prepare(self) -> None:
        """Prepare the vocabulary before the first request needs it. Raises ApiError as `compiled`."""
        with self._lock:
            _ = self.vocabulary

    def prepare_in_background(self) -> None:
        """The same in a thread; where it can't be done, the first request that needs it says why."""

        def run() -> None:
            with suppress(ApiError):
                self.prepare()

        threading.Thread(target=run, name="grammars", daemon=True).start()

    @cached_property
    def vocabulary(self) -> Any:
        """llguidance's form of the tokenizer. Raises ApiError where there is none."""
        library = _llguidance()
        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is None:
            raise ApiError(501, "no_grammar", "grammars need a tokenizer with tokenizer.json, and this model has none")
        log.info("preparing grammars for this vocabulary of %s tokens", f"{len(inner):,}")
        try:
            return library.LLTokenizer(backend.to_str(), eos_token=self._ends)
        except Exception as error:
            raise ApiError(501, "no_grammar", f"grammars can't be made for this model's tokenizer: {error}") from None

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that were added to the vocabulary, which text inside a grammar wouldn't match."""
        return {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items()}

    def literal(self, text: str) -> str:
        """A text in a grammar; added tokens in it as the very tokens."""
        present = sorted((name for name in self.added if name and name in text), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, present))})", text) if present else [text]
        return " ".join(
            f"<[{self.added[part]}]>" if part in self.added else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def compiled(self, grammar: str, param: str) -> Any:
        """A matcher at the beginning of a grammar. Raises ApiError, for the field `param`, where it is refused."""
        library = _llguidance()
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = library.LLMatcher(
                    self.vocabulary, grammar, log_level=0, limits=library.LLParserLimits(verbose_errors=False)
                )
                if fault := _fault(matcher.deep_copy()):
                    raise refused(param, f"the grammar can't be enforced: {fault}")
                self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


def json_rule(schema: dict[str, Any] | bool, param: str) -> str:
    """A schema in a grammar. Raises ApiError for one that is too large, or that would take too long."""
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except (RecursionError, ValueError):
        raise refused(param, "the schema isn't JSON, or too deep") from None
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise refused(param, f"the schema has more than {MOST_BYTES:,} bytes")
    _check(schema, param)
    options = {"whitespace_pattern": WHITE_SPACE}
    whole = {**schema, "x-guidance": options} if isinstance(schema, dict) else {"x-guidance": options}
    if schema is False:
        raise refused(param, "nothing satisfies the schema false")
    return f"%json {json.dumps(whole)}"


def _check(schema: Any, param: str) -> None:
    """Bounds of a schema's shape, and what llguidance's own limits don't cover."""
    level, depth, count = [schema], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MOST_DEPTH or count > MOST_VALUES:
            raise refused(param, f"the schema has more than {MOST_DEPTH} levels or {MOST_VALUES:,} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if "x-guidance" in value:
                    raise refused(param, "the schema has x-guidance, which isn't a keyword of JSON schemas")
                multiple = value.get("multipleOf")
                if isinstance(multiple, int | float) and not 1e-4 <= multiple <= MOST_MULTIPLE:
                    raise refused(param, f"multipleOf is {multiple:g}, at most {MOST_MULTIPLE} can be enforced")
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below


def _fault(matcher: Any) -> str | None:
    """Why nothing can keep to the grammar of a new matcher: llguidance's reason, without the grammar it repeats."""
    if not matcher.is_error():
        matcher.compute_bitmask()  # some faults show at the first step
    if not matcher.is_error() and (matcher.is_accepting() or not matcher.is_stopped()):
        return None
    lines = [line for line in matcher.get_error().splitlines() if "|" not in line and not line.startswith("<")]
    return re.sub(r"^at \d+\(\d+\): ", "", " ".join(lines)[:400]).strip() or "nothing satisfies it"


def _llguidance() -> Any:
    """The library. Raises ApiError where it isn't installed."""
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            501, "no_grammar", "a grammar needs the package llguidance: pip install 'mlx-lora[serve]'"
        ) from None
    return llguidance
