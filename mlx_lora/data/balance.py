"""How often each answer occurs, where answers are few and short: labels of a classifier, yes and no."""

from __future__ import annotations

from collections import Counter

from mlx_lora.data.example import Example

MOST_LABELS = 20
MOST_CHARACTERS = 30


class Balance:
    """Feed examples by `add`, then ask for the `labels`. Nothing is kept once an answer is long or there are many."""

    def __init__(self) -> None:
        self._counts: Counter[str] | None = Counter()

    def add(self, example: Example) -> None:
        """Take note of an example's last answer."""
        if self._counts is None:
            return
        answer = _answer(example)
        if answer is None or len(answer) > MOST_CHARACTERS:
            self._counts = None
            return
        self._counts[answer] += 1
        if len(self._counts) > MOST_LABELS:
            self._counts = None

    def labels(self) -> dict[str, int] | None:
        """Rows by answer, most frequent first; None where answers are no labels.

        They are none where they are long, more than twenty, or seldom given twice.
        """
        if not self._counts or self._counts.total() < 2 * len(self._counts):
            return None
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))


def _answer(example: Example) -> str | None:
    """The text of the last message, where that is an answer in words alone."""
    last = example.messages[-1] if example.messages else {}
    content = last.get("content")
    if last.get("role") != "assistant" or last.get("tool_calls") or not isinstance(content, str):
        return None
    return content.strip()
