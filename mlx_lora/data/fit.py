"""A data file becomes rows: what is too long is cut, dropped or a problem, and all of it is counted.

Rows are read, encoded and written to a `RowFile` one after another, so memory doesn't grow with the file.

    max_seq_length 8, too_long split      a b c d e f g h | h i j k l m n o      the later piece has h as context
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoded, Encoder
from mlx_lora.data.example import Example
from mlx_lora.data.read import Item, stream
from mlx_lora.data.rows import RowFile
from mlx_lora.data.turns import Tokens, Weighted
from mlx_lora.errors import Problem

# Consecutive pieces of a split text share this fraction of the length: the later one has it as context, without loss.
OVERLAP = 0.125


def encode_file(
    file: Path,
    encoder: Encoder,
    on_row: Callable[[], None] = lambda: None,
    on_example: Callable[[int, Encoded], None] = lambda line, one: None,
    on_item: Callable[[Item], None] = lambda item: None,
) -> EncodedFile:
    """Read and encode every example of a file; faults are collected, not raised.

    `on_item` is called for each row that is read, `on_row` for each example that is encoded, `on_example` with the line
    and the encoding of each one that gave rows.
    Raises ModelError where the chat template itself fails.
    """
    result, source = EncodedFile(encoder.settings, file), stream(file, encoder.settings)
    places: deque[tuple[int, Path]] = deque()

    def examples() -> Iterator[Example]:
        for item in source:
            on_item(item)
            result.take(item)
            if item.example:
                places.append((item.line, item.file or file))
                yield item.example

    for one in encoder.encoded(examples()):
        on_row()
        line, path = places.popleft()
        if result.add(one, line, path):
            on_example(line, one)
    result.format, result.columns, result.notes = source.format, source.columns, source.notes
    return result


@dataclass
class EncodedFile:
    """The rows of one data file, and what became of its examples.

    Of the examples that were `read`, `examples` gave rows, `texts` of them plain text; `answers` is the most that one
    has; `split` gave several rows because of how the template shows history. `reasoned` answers are learned with
    reasoning, `unreasoned` without. `tools_hidden` conversations define tools that the template doesn't show; `hidden`
    are other such parts, each with its file and line.
    """

    settings: Data
    path: Path
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: RowFile = field(default_factory=RowFile)
    problems: list[Problem] = field(default_factory=list)
    read: int = 0
    examples: int = 0
    texts: int = 0
    answers: int = 0
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    reasoned: int = 0
    unreasoned: int = 0
    tools_hidden: int = 0
    hidden: list[tuple[Path, int, str]] = field(default_factory=list)

    def take(self, item: Item) -> None:
        """Count a row that was read, or keep its problem."""
        self.read += item.example is not None
        self.problems += [item.problem] if item.problem else []

    def add(self, one: Encoded, line: int, path: Path) -> bool:
        """Take an encoded example of a file; whether it gave rows. A fault becomes a problem with its line."""
        self.hidden += [(path, line, part) for part in (one.talk.hidden if one.talk else ())]
        try:
            if one.fault:
                raise ValueError(one.fault)
            rows = [piece for row in one.rows for piece in self._fitting(one, *row)]
        except ValueError as error:
            self.problems.append(Problem(str(path), line, str(error)))
            return False
        for tokens, weights in rows:
            self.rows.append(tokens, weights, self.examples)
        if rows:
            self._count(one)
        return bool(rows)

    def _count(self, one: Encoded) -> None:
        self.examples += 1
        self.texts += one.example.text is not None
        self.answers = max(self.answers, sum(m["role"] == "assistant" for m in one.example.messages))
        if one.talk:
            self.split += len(one.rows) > 1
            self.tools_hidden += not one.talk.tools_shown
            messages = one.talk.example.messages
            answers = [messages[turn.index] for turn in one.talk.turns]
            for answer in answers or [message for message in messages if message["role"] == "assistant"][-1:]:
                reasons = bool(answer.get("reasoning_content"))
                self.reasoned, self.unreasoned = self.reasoned + reasons, self.unreasoned + (not reasons)

    def _fitting(self, one: Encoded, tokens: Tokens, weights: list[float]) -> list[Weighted]:
        limit, choice = self.settings.max_seq_length, self.settings.too_long
        too_long = len(tokens) > limit
        if too_long and choice == "error":
            raise ValueError(
                f"{len(tokens)} tokens, data.max_seq_length is {limit} (data.too_long can drop, truncate or split)"
            )
        if too_long and choice == "drop":
            self.dropped += 1
            return []
        if too_long and choice == "split":
            if one.example.text is None:
                raise ValueError(f"{len(tokens)} tokens, and too_long split is for plain text only")
            return list(_pieces(tokens, limit))
        if too_long:
            cut = slice(-limit, None) if choice == "truncate-start" else slice(limit)
            tokens, weights = tokens[cut], weights[cut]
        if not any(weights[1:]):
            raise ValueError("no token carries loss" + (" after truncation" if too_long else ""))
        self.truncated += too_long
        return [(tokens, weights)]


def _pieces(tokens: Tokens, limit: int) -> Iterator[Weighted]:
    """Rows of at most `limit` tokens; what one repeats of the one before is context, so each token is learned once."""
    overlap = max(1, int(limit * OVERLAP))
    for start in range(0, len(tokens) - overlap, limit - overlap):
        piece = tokens[start : start + limit]
        context = overlap if start else 1
        yield piece, [0.0] * context + [1.0] * (len(piece) - context)


def notes(file: EncodedFile) -> list[str]:
    """What people should know of how a file was encoded."""
    found = []
    if file.split:
        found.append(
            f"{file.split} of {file.examples} conversations became several rows, one an answer: the chat template "
            "shows an earlier answer in another form than the last one"
        )
    if file.tools_hidden:
        found.append(
            f"the chat template doesn't show the tools that {file.tools_hidden} conversations define: calls are "
            "learned without them (data.drop=[tools] says that this is meant)"
        )
    if file.reasoned:
        without = f", {file.unreasoned} without (asked with thinking off)" if file.unreasoned else ""
        found.append(f"{file.reasoned} answers are learned with their reasoning{without}")
    return found
