"""`data split`, `data convert` and `data redact` on the command line, and what `data check` shows people."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]
SPLITS = ("train", "valid", "test")


def questions(count: int) -> list[dict[str, str]]:
    """So many rows, each with a question of its own."""
    return [{"prompt": f"say {n} twice", "completion": f"{n} {n}"} for n in range(count)]


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_split_copies_lines_and_keeps_groups_on_one_side(
    run: Run, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{**row, "note": "é"} for row in questions(60)]
    rows += [{**row, "completion": "other"} for row in rows[:20]] + rows[:10]
    file, out = write_rows(rows), tmp_path / "out"
    ran = run("data", "split", file, "--out", out, "--valid", "0.2", "--test", "0.2", "--json")
    parts = {name: (out / f"{name}.jsonl").read_text().splitlines() for name in SPLITS}
    assert ran.code == 0 and ran.json["rows"] == {name: len(lines) for name, lines in parts.items()}
    assert (ran.json["groups"], ran.json["copied"], ran.json["seed"]) == (60, True, 0)
    lines = file.read_text().splitlines()
    assert sorted(sum(parts.values(), [])) == sorted(lines), "every line as it was"
    assert parts["train"] == [line for line in lines if line in parts["train"]], "in its order"
    prompts = {name: {json.loads(line)["prompt"] for line in part} for name, part in parts.items()}
    assert not prompts["train"] & prompts["valid"] and not (prompts["train"] | prompts["valid"]) & prompts["test"]
    assert run("data", "check", out).code == 0
    assert stat.S_IMODE((out / "train.jsonl").stat().st_mode) == 0o600


def test_split_moves_no_row_when_rows_are_added(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    few = write_rows(questions(50), name="few.jsonl")
    many = write_rows(questions(90), name="many.jsonl")
    for file in (few, many):
        assert run("data", "split", file, "--out", tmp_path / file.stem).code == 0
    for name in SPLITS:
        before, after = (rows_of(tmp_path / folder / f"{name}.jsonl") for folder in ("few", "many"))
        assert after[: len(before)] == before


def test_split_writes_messages_where_there_are_no_lines_to_copy(run: Run, tmp_path: Path) -> None:
    rows = [{"instruction": f"a{n}", "output": "b", "history": [[f"c{n}", "d"]]} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ran = run("data", "split", tmp_path / "rows.json", "--out", tmp_path / "out", "--test", "0", "--json")
    assert (ran.code, ran.json["copied"], ran.json["learn_more"], list(ran.json["rows"])) == (
        0,
        False,
        40,
        ["train", "valid"],
    )
    assert rows_of(tmp_path / "out" / "train.jsonl")[0].keys() == {"messages"}
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_split_refuses_and_writes_nothing(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = write_rows(questions(40), name="rows.jsonl")
    with open(file, "a") as stream:
        stream.write('{"prompt": "x"}\nbroken\n')
    ran = run("data", "split", file, "--out", out)
    assert ran.code == 1 and f"{file}:41" in ran.err and f"{file}:42" in ran.err and not out.exists()
    few = write_rows(questions(4), name="few.jsonl")
    ran = run("data", "split", few, "--out", out)
    assert ran.code == 1 and "no row would go to" in ran.err and not out.exists()
    assert run("data", "split", few, "--out", out, "--valid", "0.6", "--test", "0.4").code == 2
    good = write_rows(questions(40), name="good.jsonl")
    assert run("data", "split", good, "--out", out).code == 0
    ran = run("data", "split", good, "--out", out)
    assert ran.code == 1 and "exists" in ran.err and "--force" in ran.err
    ran = run("data", "split", out, "--out", tmp_path / "again")
    assert ran.code == 1 and "has train.jsonl, valid.jsonl, test.jsonl" in ran.err


def test_split_by_force_leaves_no_file_of_before(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    file, out = write_rows(questions(40), name="rows.jsonl"), tmp_path / "out"
    assert run("data", "split", file, "--out", out).code == 0
    assert run("data", "split", file, "--out", out, "--test", "0").code == 1, (
        "a test file would stay that train has now"
    )
    assert run("data", "split", file, "--out", out, "--test", "0", "--force").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl", "valid.jsonl"]
    (out / "test.json").write_text("[]")
    ran = run("data", "split", file, "--out", out, "--force")
    assert ran.code == 1 and "has test.json" in ran.err
    ran = run("data", "split", out / "train.jsonl", "--out", out, "--force")
    assert ran.code == 1 and "is the file that is read" in ran.err or "has test.json" in ran.err


def test_the_hint_of_an_empty_split_works(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    file = write_rows(questions(8), name="rows.jsonl")
    ran = run("data", "split", file, "--out", tmp_path / "out", "--seed", "1")
    seeds = ["1"]
    if ran.code:
        seeds = [word for word in ran.err.split() if word.isdigit()][-1:]
    assert run("data", "split", file, "--out", tmp_path / "new", "--seed", *seeds).code == 0


def test_convert_and_redact(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": "I am ann@example.com, who are you?", "completion": "call 020 7946 0958"}, *questions(2)]
    file = write_rows(rows)
    plain, clean, again = (tmp_path / f"{name}.jsonl" for name in ("plain", "clean", "again"))
    ran = run("data", "convert", file, "--out", plain, "--json")
    assert ran.json == {
        "out": str(plain), "rows": 3, "format": "completions", "redacted": None, "learn_more": 0
    }  # fmt: skip
    said = [[message["content"] for message in row["messages"]] for row in rows_of(plain)]
    assert said == [[row["prompt"], row["completion"]] for row in rows]
    ran = run("data", "convert", file, "--out", clean, "--redact", "--json")
    assert ran.json["redacted"] == {"email": 1, "phone": 1}
    assert rows_of(clean)[0]["messages"] == [
        {"role": "user", "content": "I am [email], who are you?"}, {"role": "assistant", "content": "call [phone]"}
    ]  # fmt: skip
    ran = run("data", "redact", file, "--out", again)
    assert again.read_text() == clean.read_text() and "1 e-mail address, 1 phone number" in ran.out
    assert "ann@" not in ran.out + ran.err
    assert run("data", "redact", file, "--out", again).code == 1
    assert run("data", "redact", file, "--out", again, "--force").code == 0
    assert run("data", "check", clean, "--json").json["personal"]["email"] == 0


def test_convert_says_what_learns_more(run: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    file = write_rows([{"instruction": "a", "output": "b", "history": [["c", "d"]]}])
    ran = run("data", "convert", file, "--out", tmp_path / "new.jsonl")
    assert ran.code == 0 and "data.mask=last" in ran.err


@pytest.mark.parametrize("command", ["convert", "redact"])
def test_problems_stop_the_command(run: Run, tmp_path: Path, command: str) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"text": "a"}\nbroken\n{"text": ""}\n')
    ran = run("data", command, file, "--out", out)
    assert ran.code == 1 and f"{file}:2" in ran.err and f"{file}:3" in ran.err and "data check" in ran.err
    assert not out.exists() and list(tmp_path.iterdir()) == [file]


def test_leaks_are_a_problem_unless_agreed_to(run: Run, write_rows: Callable[..., Path]) -> None:
    data = write_rows(questions(20)).parent
    write_rows([{"prompt": "new", "completion": "x"}] * 5, name="valid.jsonl")
    with open(data / "valid.jsonl", "a") as stream:
        stream.write((data / "train.jsonl").read_text().splitlines()[2] + "\n")
    ran = run("data", "check", data, "--json")
    assert (ran.code, ran.json["leaked_rows"]) == (1, 1)
    (problem,) = ran.json["problems"]
    assert (problem["file"], problem["line"]) == (str(data / "valid.jsonl"), 6)
    agreed = run("data", "check", data, "--allow-leaks", "--json")
    assert (agreed.code, agreed.json["leaked_rows"], agreed.json["problems"]) == (0, 1, [])


def test_what_people_see(run: Run, write_rows: Callable[..., Path], tiny_path: Path) -> None:
    rows = [{"prompt": f"is {n} even, a@example.com?", "completion": "no" if n % 2 else "yes"} for n in range(20)]
    file = write_rows([*rows, {**rows[0], "completion": "no"}, rows[1]])
    ran = run("data", "check", file, "--model", tiny_path)
    assert ran.code == 0
    for said in (
        "median", " – ", "█", "no: 12 (55%)", "yes: 10 (45%)", "duplicates       1 row\n", "22 e-mail addresses",
        "1 prompt with different answers (train.jsonl:1 and 21)", "plan             peak", "problems         0",
    ):  # fmt: skip
        assert said in ran.out, said
    told = run("data", "check", file, "--model", tiny_path, "--json").json
    assert told["plan"].keys() == {"fits", "peak_memory_bytes", "limit_bytes", "seconds", "suggestion"}
    assert told["histogram"] and told["context"] is None or told["over_context"] is not None


def test_rejected_answers_are_left_out_and_it_says_so(
    run: Run, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    bad = {"prompt": "a", "rejected": "b"}
    file = write_rows([bad, {"prompt": "a", "completion": "c"}, bad | {"chosen": "c"}])
    ran = run("data", "convert", file, "--out", tmp_path / "out.jsonl")
    assert ran.code == 0 and "2 rows with a rejected answer are left out" in ran.err
    assert [row["messages"][1]["content"] for row in rows_of(tmp_path / "out.jsonl")] == ["c"]
