"""Answers that are labels, and answers that are not."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_lora.data.balance import Balance
from mlx_lora.data.example import Example, conversation


def labels(answers: list[Any]) -> dict[str, int] | None:
    balance = Balance()
    for answer in answers:
        if isinstance(answer, Example):
            balance.add(answer)
        else:
            last = {"role": "assistant", **(answer if isinstance(answer, dict) else {"content": answer})}
            balance.add(conversation([{"role": "user", "content": "q"}, last]))
    return balance.labels()


@pytest.mark.parametrize(
    ("answers", "counts"),
    [
        (["yes", "no", "yes", " yes\n"], {"yes": 3, "no": 1}),
        (["b", "a", "b", "a"], {"a": 2, "b": 2}),
        ([str(n % 20) for n in range(40)], {str(n): 2 for n in sorted(range(20), key=str)}),
        ([str(n % 21) for n in range(84)], None),
        (["yes", "no", "a", "b"], None),
        (["yes"] * 5 + ["x" * 31], None),
        (["yes"] * 5 + ["x" * 30], {"yes": 5, "x" * 30: 1}),
        (["yes"] * 5 + [{"content": "", "tool_calls": [{"name": "f"}]}], None),
        (["yes"] * 5 + [Example(text="plain")], None),
        ([], None),
    ],
)
def test_labels(answers: list[Any], counts: dict[str, int] | None) -> None:
    found = labels(answers)
    assert found == counts and list(found or {}) == list(counts or {})
