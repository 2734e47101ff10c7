"""A file of prompts is answered whole, whatever happens on the way, and each row as it is asked by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.data import prompts
from mlx_lora.errors import AdapterError, DataError, MlxLoraError, NameTaken, NoMemory
from mlx_lora.serve.room import Room
from mlx_lora.serve.service import open_service
from mlx_lora.tasks import answer_file as task
from mlx_lora.tasks.answer_file import AnsweredFile, Asking, answer_file
from tests.serve.test_service import save_adapter

Rows = list[dict[str, Any]]


@contextmanager
def no_bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    yield lambda count, text: None


def stopping(after: int) -> Any:
    """A progress bar at which Ctrl-C is pressed once so many rows have ended."""

    @contextmanager
    def bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        left = after

        def advance(count: int, text: str) -> None:
            nonlocal left
            left -= count
            if not left:
                raise KeyboardInterrupt

        yield advance

    return bar


@pytest.fixture
def adapters(home: Path, tiny_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_adapter(home / "adapters" / name, tiny_path, seed)


@pytest.fixture
def answer(tiny_path: Path, tmp_path: Path) -> Callable[..., AnsweredFile]:
    def call(rows: Rows | Path, adapter: str | None = None, *, bar: Any = no_bar, **options: Any) -> AnsweredFile:
        file = rows if isinstance(rows, Path) else tmp_path / "in.jsonl"
        if not isinstance(rows, Path):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        force = options.pop("force", False)
        asking = Asking(**{"max_tokens": 6, "rows": 3} | options)
        return answer_file(str(file), tmp_path / "out.jsonl", str(tiny_path), adapter, asking, bar=bar, force=force)

    return call


def written(tmp_path: Path) -> Rows:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def rows_of(count: int) -> Rows:
    return [{"prompt": f"say {index} " * (1 + index * 7 % 5), "id": f"row {index}"} for index in range(count)]


def test_every_row_has_the_answer_of_its_own_adapter_in_input_order(
    answer: Callable[..., AnsweredFile], adapters: None, tiny_path: Path, tmp_path: Path
) -> None:
    rows = rows_of(11)
    for index, row in enumerate(rows):
        if index % 3:
            row["adapter"] = "two" if index % 3 == 1 else None
    rows[4]["max_tokens"] = 2
    done = answer(rows, "one")
    found = written(tmp_path)
    assert [row["index"] for row in found] == list(range(11)) and done.failed == 0 and done.rows == 11
    with open_service(str(tiny_path)) as service:
        for row, line in zip(rows, found, strict=True):
            adapter = row.get("adapter", "one")
            messages = [{"role": "user", "content": row["prompt"]}]
            reply = service.ask(service.prompt(messages, adapter), adapter, max_tokens=row.get("max_tokens", 6))
            assert line["answer"] == reply.whole(), row
            assert {key: line[key] for key in row} == row
            assert reply.finished is not None and line["generated_tokens"] == reply.finished.generated_tokens
    assert done.generated_tokens == sum(row["generated_tokens"] for row in found)
    assert not list(tmp_path.glob("out.jsonl.*")) and not list(tmp_path.glob(".out*"))


def test_an_interrupted_file_goes_on_and_asks_no_row_twice(
    answer: Callable[..., AnsweredFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(12)
    answer(rows)
    whole = written(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        answer(rows, bar=stopping(5), force=True)
    kept = written(tmp_path)
    assert len(kept) == 5 and all(line in whole for line in kept)
    with open(tmp_path / "out.jsonl", "a") as out:
        out.write('{"index": 7, "answer": "half a li')  # as a process that was killed leaves it
    asked: list[int] = []
    request = task._Filling._request

    def noted(self: Any, row: prompts.PromptRow) -> Any:
        asked.append(row.index)
        return request(self, row)

    monkeypatch.setattr(task._Filling, "_request", noted)
    done = answer(rows)
    assert sorted([*asked, *(line["index"] for line in kept)]) == list(range(12))
    assert written(tmp_path) == whole and done.before == 5 and not (tmp_path / "out.jsonl.unfinished").exists()


def test_answers_to_other_questions_are_never_mixed_in(
    answer: Callable[..., AnsweredFile], adapters: None, home: Path, tiny_path: Path, tmp_path: Path
) -> None:
    rows = rows_of(6)
    with pytest.raises(KeyboardInterrupt):
        answer(rows, "one", bar=stopping(2))
    with pytest.raises(MlxLoraError, match="the input file changed") as refused:
        answer([*rows, {"prompt": "one more"}], "one")
    assert "--force" in str(refused.value.hint)
    with pytest.raises(MlxLoraError, match="the options changed"):
        answer(rows, "one", max_tokens=7)
    with pytest.raises(MlxLoraError, match="--adapter, adapter two, adapter one changed"):
        answer(rows, "two")
    shutil.rmtree(home / "adapters/one")
    save_adapter(home / "adapters/one", tiny_path, 9)
    with pytest.raises(MlxLoraError, match="adapter one changed"):
        answer(rows, "one")
    assert len(written(tmp_path)) == 2
    assert answer(rows, "one", force=True).before == 0 and len(written(tmp_path)) == 6
    with pytest.raises(NameTaken):
        answer(rows, "one")


def test_rows_that_cant_be_answered_say_why_in_their_place(
    answer: Callable[..., AnsweredFile], adapters: None, tmp_path: Path
) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        '{"prompt": "good", "answer": "mine", "index": 7}\n'
        "not json\n\n"
        '{"prompt": " "}\n'
        '{"prompt": "x", "adapter": "three"}\n'
        '{"prompt": "x", "adapter": "../one"}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"prompt": "x", "max_tokens": 0}\n' + json.dumps({"prompt": "long " * 200}) + "\n"
    )
    done = answer(file)
    found = written(tmp_path)
    assert done.rows == 8 and done.failed == 7
    assert found[0]["input_answer"] == "mine" and found[0]["input_index"] == 7 and found[0]["index"] == 0
    reasons = ["line 2: not valid JSON", "'prompt' is empty", "no adapter 'three'", "../one", "nothing to answer"]
    reasons += ["'max_tokens' is 0", "this model's context is 512"]
    for line, reason in zip(found[1:], reasons, strict=True):
        assert reason in line["error"] and "answer" not in line


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [("a.txt", "say 1\n\n  say 2\r\n", 2), ("a.csv", "prompt,id\nsay 1,5\nsay 2,6\n", 2), ("a", "say 1", 1)],
)
def test_other_files_of_prompts(
    answer: Callable[..., AnsweredFile], tmp_path: Path, name: str, text: str, count: int
) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert answer(file).rows == count
    assert [line["prompt"].strip() for line in written(tmp_path)] == ["say 1", "say 2"][:count]


def test_what_can_never_work_is_refused_before_anything_is_written(
    answer: Callable[..., AnsweredFile], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="'prompt' is missing"):
        answer([{"text": "x"}])
    with pytest.raises(MlxLoraError, match="no such file"):
        answer(tmp_path / "absent.jsonl")
    with pytest.raises(AdapterError, match="no adapter 'one'"):
        answer(rows_of(1), "one")
    (tmp_path / "out.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(MlxLoraError, match="holds the prompts"):
        answer(tmp_path / "out.jsonl", force=True)
    assert (tmp_path / "out.jsonl").read_text() == '{"prompt": "x"}'


def test_what_raw_prompts_have_no_place_for_is_refused(answer: Callable[..., AnsweredFile], tmp_path: Path) -> None:
    with pytest.raises(MlxLoraError, match="no system message"):
        answer(rows_of(1), raw=True, system="Be brief.")
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    assert answer([{"messages": talk}, {"prompt": "x"}], raw=True).failed == 1
    assert "one text, without earlier messages" in written(tmp_path)[0]["error"]


def test_a_row_that_lost_its_memory_is_asked_again(
    answer: Callable[..., AnsweredFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(rows_of(6))
    expected = written(tmp_path)
    taken = iter([None, NoMemory("the machine was about to swap")])
    monkeypatch.setattr(Room, "fault", lambda room: next(taken, None))
    assert answer(rows_of(6), force=True).failed == 0
    assert written(tmp_path) == expected and next(taken, None) is None


def test_a_long_file_is_read_a_window_at_a_time(
    answer: Callable[..., AnsweredFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ended, ahead = 0, 0, list[int]()

    def counted(file: Path) -> Iterator[prompts.PromptRow]:
        nonlocal read
        read = 0
        for index in range(60):
            read += 1
            yield prompts.PromptRow(index, index, {}, ({"role": "user", "content": f"say {index}"},))

    @contextmanager
    def bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        def advance(count: int, text: str) -> None:
            nonlocal ended
            ended += count
            ahead.append(read - ended)

        yield advance

    monkeypatch.setattr(prompts, "rows", counted)
    answer(rows_of(60), bar=bar, max_tokens=1)
    assert ended == 60 and max(ahead) <= (task.WINDOW + task.AHEAD) * 3
