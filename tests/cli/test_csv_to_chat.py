"""Shows 2: a CSV of 200 question-answer pairs goes from file to chat with the README's commands alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.mark.real
def test_a_csv_of_questions_and_answers_goes_from_file_to_chat(
    run: Run, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.csv"
    with open(file, "w", newline="", encoding="utf-8-sig") as stream:
        rows = csv.writer(stream, delimiter=";")
        rows.writerow(["Id", "Question", "Answer"])
        for index in range(200):
            rows.writerow([index, f"say {index % 7} twice", f"{index % 7}{index % 7}"])

    checked = run("data", "check", file, "--model", tiny_path, "--show", 1)
    assert checked.code == 0, checked.err
    assert "columns          prompt: Question, completion: Answer" in checked.out
    assert "⟦00<|end|>⟧" in checked.out and "rows             200" in checked.out
    assert run("plan", "--model", tiny_path, "--data", file).code == 0
    trained = run("train", "--model", tiny_path, "--data", file, "--name", "mine", "--json", "train.iters=150",
                  "train.learning_rate=0.02", "train.batch_size=8", "adapter.targets=all-linear")  # fmt: skip
    assert trained.code == 0, trained.err
    assert run("eval", "--adapter", "mine", "--data", file, "--exact", "--json").json["results"][1]["exact_match"] > 0.9
    answer = run("generate", "--adapter", "mine", "--prompt", "say 5 twice", "--json").json
    assert (answer["text"], answer["finish_reason"]) == ("55", "stop")
    monkeypatch.setattr("sys.stdin", io.StringIO("say 3 twice\n/think off\nsay 6 twice\n/bye\n"))
    chatted = run("chat", "--adapter", "mine")
    assert chatted.code == 0 and chatted.out.split() == ["33", "66"], (chatted.out, chatted.err)
