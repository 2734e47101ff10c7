"""Files of a chat: those that a message mentions, saved conversations, and rated answers.

A rated file holds one JSON object a line, the messages that were sent in `prompt`:

    {"prompt": […], "completion": [answer]}              rated good: `train` learns the completion
    {"prompt": […], "rejected": [answer]}                rated bad: for preference training, `train` leaves it out
    {"prompt": […], "chosen": [good], "rejected": [bad]} both of one prompt, whichever came first: as the line before

An adapter that was trained without a chat template has texts in place of the lists of messages.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora import paths, ui
from mlx_lora.data.example import as_written, checked_message
from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.conversation import Conversation, Message, system_of

# `@` at the beginning of a word; `@@` is an @ itself. What begins inside a word is an address.
MENTION = re.compile(r'(?<!\S)@(?:@|"([^"\n]+)"|([^\s"@]\S*))')
MENTION_BEGUN = r"(?:^|\s)@([^\s\"@]\S*)?$"
AT_THE_END = ".,;:!?)]}'"
MOST_BYTES = 1 << 20


def with_files(text: str, count: Callable[[str], int]) -> str:
    """A message whose `@path` are replaced by the texts of those files; says how many tokens (`count`) each has.

    Raises MlxLoraError for a file that is missing, no text, or larger than MOST_BYTES.
    """

    def put(found: re.Match[str]) -> str:
        if found[0] == "@@":
            return "@"
        path, after = _mentioned(found[1], found[2])
        content = _text(path)
        ui.note(f"({path}: {count(content):,} tokens)")
        return content + after

    return MENTION.sub(put, text)


def _mentioned(quoted: str | None, word: str | None) -> tuple[Path, str]:
    """The file that is meant, and what follows its name: a word may have a full stop behind it."""
    if quoted is not None:
        return Path(quoted).expanduser(), ""
    assert word is not None
    path, bare = Path(word).expanduser(), word.rstrip(AT_THE_END)
    if not path.exists() and bare != word and Path(bare).expanduser().exists():
        return Path(bare).expanduser(), word[len(bare) :]
    return path, ""


def _text(path: Path) -> str:
    """The text of a file without the end of its last line."""
    hint = 'an @ that is no file is written @@, and a name with spaces @"a name"'
    try:
        if not path.is_file():
            what = "isn't a file" if path.exists() else "there is no such file"
            raise MlxLoraError(f"@{path}: {what}", hint=hint)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise MlxLoraError(f"@{path} has {ui.size(size)}, at most {ui.size(MOST_BYTES)} go into a message")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MlxLoraError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MlxLoraError(f"@{path} is no text in UTF-8") from None
    if not text.strip():
        raise MlxLoraError(f"@{path} is empty")
    return text.removesuffix("\n")


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file that only the user can read."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with paths.created(file, "ab") as stream:
            stream.write(lines.encode())
    except OSError as error:
        raise MlxLoraError(f"can't write {file}: {error.strerror}") from None


def save(conversation: Conversation, file: str, *, history: bool) -> None:
    """Append a conversation to a file as training data. Raises MlxLoraError where it can't."""
    if not file or not conversation.turns:
        raise MlxLoraError("/save FILE needs a file name and a conversation")
    rows = conversation.rows(history=history)
    _append(Path(file).expanduser(), [{"messages": [as_written(message) for message in row]} for row in rows])


def load(file: str) -> list[Message]:
    """The last conversation of a file that `save` has written. Raises MlxLoraError naming what is wrong with it."""
    if not file:
        raise MlxLoraError("/load FILE needs a file name")
    try:
        with open(Path(file).expanduser(), encoding="utf-8") as stream:
            lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip()]
    except OSError as error:
        raise MlxLoraError(f"can't read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MlxLoraError(f"{file} is no text in UTF-8") from None
    if not lines:
        raise MlxLoraError(f"{file} is empty")
    number, line = lines[-1]
    try:
        row = json.loads(line)
        found = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(found, list):
            raise ValueError("no list of messages")
        messages = [checked_message(message, f"message {place}") for place, message in enumerate(found, start=1)]
        roles = [message["role"] for message in messages[len(system_of(messages)) :]]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("not questions and answers in turn")
    except (ValueError, RecursionError) as error:
        raise MlxLoraError(f"{file}:{number}: {error}", hint="/load takes what /save has written") from None
    return messages


class Ratings:
    """A file of rated answers. An answer that is rated again, before any other, takes its first rating back."""

    def __init__(self, file: Path):
        self.file = file
        self._good: dict[str, Any] = {}
        self._bad: dict[str, Any] = {}
        self._last: tuple[Any, bool, int, int] | None = None  # what was rated and how, where its lines begin and end

    def add(self, sent: Sequence[Message], answer: Message, *, good: bool, template: bool) -> str:
        """Append an answer to the messages that were sent; say what was done."""
        prompt, reply = _sides(sent, answer, template=template)
        key = json.dumps(prompt, sort_keys=True)
        same, other = (self._good, self._bad) if good else (self._bad, self._good)
        if self._last is not None and self._last[0] == (key, reply):
            if self._last[1] == good:
                return f"rated {'good' if good else 'bad'} already"
            self._take_back(key, other)
        partner = other.get(key)
        rows = [{"prompt": prompt, "completion": reply}] if good else []
        if partner is not None:
            chosen, rejected = (reply, partner) if good else (partner, reply)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        elif not good:
            rows.append({"prompt": prompt, "rejected": reply})
        start = self._size()
        _append(self.file, rows)
        same[key] = reply
        self._last = ((key, reply), good, start, self._size())
        return f"rated {'good' if good else 'bad'} in {self.file}{', with its pair' if partner is not None else ''}"

    def _size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def _take_back(self, key: str, rated: dict[str, Any]) -> None:
        """Cut the last rating off the file. Raises MlxLoraError where somebody else has written to it since."""
        assert self._last is not None
        _, _, start, end = self._last
        if self._size() != end:
            raise MlxLoraError(f"{self.file} has changed since this answer was rated: change the rating there")
        os.truncate(self.file, start)
        rated.pop(key, None)
        self._last = None


def _sides(sent: Sequence[Message], answer: Message, *, template: bool) -> tuple[Any, Any]:
    """Prompt and answer as a row has them: messages, or texts where there is no chat template."""
    if not template:
        return str(sent[-1]["content"]), str(answer["content"])
    return [as_written(message) for message in sent], [as_written(answer)]
