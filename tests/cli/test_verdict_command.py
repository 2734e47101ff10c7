"""`verdict` as a user runs it, on a tiny model: the contract's keys, no text in the home, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora.store import verdict as record_store
from tests.cli.conftest import Ran
from tests.conftest import questions
from tests.store.test_verdict_record import DRIFT, KEYS

Run = Callable[..., Ran]
SECRET = "Marzipanschwein"


def general(folder: Path) -> Path:
    file = folder / "general.jsonl"
    rows = [{"prompt": f"what is {n}", "completion": f"{SECRET} {n}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_record_has_numbers_and_no_text(
    run: Run, trained: Ran, home: Path, tiny_path: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [*questions(10), *({"prompt": f"{SECRET}? {n}", "completion": SECRET} for n in range(2))]
    test, out = write_rows(rows, name="mine.jsonl"), tmp_path / "rows.json"
    words = (
        "verdict", "--model", tiny_path, "--adapter", "mine", "--data", test, "--forget", general(tmp_path),
        "--max-tokens", 3, "--score", "exact",
    )  # fmt: skip
    ran = run(*words, "--out", out, "--json")
    assert ran.code == 0, ran.err
    (result,) = ran.json["results"]
    assert result.keys() >= KEYS and result["drift"].keys() >= DRIFT
    assert result["rows"] == 12 and result["metric"] == "exact" and result["drift"]["kl_general"] > 0
    assert result["fixed"] == len(result["fixed_rows"]) and result["verdict"] in ("no_difference", "too_few_rows")
    assert ran.json["data"]["file"] == "mine.jsonl" and ran.json["general"]["rows"] == 4
    kept = home / "verdicts" / "mine" / "verdict.json"
    assert json.loads(kept.read_text()) == ran.json
    for file in [path for path in home.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in file.read_bytes(), file
    written = json.loads(out.read_text())
    each = written["results"][0]["each"]
    assert [row["wanted"] for row in each] == [row["completion"] for row in rows]
    assert [row["prompt"] for row in each] == [row["prompt"] for row in rows]
    assert out.stat().st_mode & 0o777 == 0o600
    again = run(*words, "--out", out)
    assert again.code == 1 and "exists" in again.err


JSON_ANSWERS = [f'{{"{SECRET}": 1}}', f'{{"{SECRET}": 2}}']


@pytest.mark.parametrize(
    ("score", "answers"),
    [("accuracy", [SECRET, f"{SECRET}e"]), pytest.param("json", JSON_ANSWERS, marks=pytest.mark.real)],
)
def test_no_label_and_no_field_name_is_kept(
    score: str, answers: list[str], run: Run, trained: Ran, home: Path, tiny_path: Path,
    write_rows: Callable[..., Path],
) -> None:  # fmt: skip
    file = write_rows([{"prompt": f"row {n}", "completion": answers[n % 2]} for n in range(10)], name="mine.jsonl")
    ran = run(
        "verdict", "--model", tiny_path, "--adapter", "mine", "--data", file, "--forget", "none", "--max-tokens", 2,
        "--json",
    )  # fmt: skip
    assert ran.code == 0 and ran.json["results"][0]["metric"] == score, ran.err
    assert (home / "verdicts" / "mine" / "verdict.json").is_file()
    for path in [path for path in home.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in path.read_bytes(), path


def test_what_it_says_and_what_it_refuses(
    run: Run, trained: Ran, tiny_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("\n\n".join(f"A line of plain text, number {n}." for n in range(3)))
    ran = run(
        "verdict", "--model", tiny_path, "--adapter", "mine", "--data", text, "--forget", "none", "--name", "texts"
    )
    assert ran.code == 0, ran.err
    first, _, header, *table = ran.out.splitlines()
    assert first.startswith("mine too few rows to say: loss ") and "was not measured" in first
    assert header.split()[:2] == ["base", "mine"] and table[0].startswith("loss")
    assert "KL from the base on the task" in ran.out and "general" not in "".join(table)

    def full(record: object) -> Path:
        raise OSError(28, "No space left on device", "verdict.json")

    monkeypatch.setattr(record_store, "write", full)
    learned = run(
        "verdict", "--model", tiny_path, "--adapter", "mine", "--data", data / "train.jsonl", "--forget", "none",
        "--score", "loss", "--max-tokens", 2, "--json",
    )  # fmt: skip
    assert learned.code == 0 and "holds the rows that mine learned" in learned.err
    assert "isn't kept in the home" in learned.err, "the home can't be written to, and the verdict is said all the same"
    (judged,) = learned.json["results"]
    assert judged["learned"] and "that it was trained on" in judged["sentence"]
    base = ("verdict", "--model", tiny_path, "--data", data)
    for words, said in (
        ((), "there is no adapter to judge"),
        (("--adapter", "mine", "--forget", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--adapter", "mine", "--forget", tmp_path), "not a file"),
        (("--adapter", "mine", "--out", data / "train.jsonl", "--force"), "is a file that is read"),
        (("--adapter", "mine", "--forget", text, "--out", text, "--force"), "is a file that is read"),
        (("--adapter", "mine", "--out", tmp_path), "is a directory"),
        (("--adapter", "mine", "--score", "accurate"), "did you mean 'accuracy'"),
        (("--adapter", "mine", "--name", "a/b"), "is not a name"),
        (("--adapter", "mine", "--score", "loss", "--tolerance", "5%"), "--tolerance would change nothing"),
        (("--adapter", "mine", "--pattern", "a", "--tolerance", "1"), "here pattern, and --tolerance would change"),
    ):
        ran = run(*base, *words)
        assert ran.code == 1 and said in ran.err, (words, ran.err)
