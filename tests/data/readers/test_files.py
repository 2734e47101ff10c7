"""Forty files as people have them, one of each kind, good and bad: right rows, or a problem with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlx_lora.config import Data
from mlx_lora.data.example import Example
from mlx_lora.data.read import Source, find_splits, read
from mlx_lora.errors import DataError
from tests.data.readers.made import (
    CLAUDE,
    GPT,
    PAIRS,
    TABLE,
    WHATSAPP,
    Write,
    archive,
    compressed,
    content,
    cut,
    database,
    docx,
    excel,
    folder,
    json_lines,
    mail,
    mbox,
    parquet,
    pdf,
    table,
    telegram,
)  # fmt: skip

# What the two rows of TABLE are, however they are stored.
TWO = [["two and two", "four"], ["three, or\nthree", 'a "pair"']]
CAFE = [{"question": "où est le café ?", "answer": "à côté, très près"}] * 3
CAFES = [["où est le café ?", "à côté, très près"]] * 3
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]
QUERY = {"query": "select title as prompt, body as completion from notes where year = 1"}
CHAT = [["are you coming?\nwe start at 8\nand bring\n\nsnacks", "on my way"]]
MAILS = [
    mail("Ana <ana@x.org>", "Shall we walk?", own="1"),
    mail("Ben <ben@x.org>", "Yes.\n\nOn Monday, Ana wrote:\n> Shall we walk?\n-- \nBen", "Re: walk", 1, "2", "1"),
]
TWO_SAID = [
    {"from": "Ana", "date_unixtime": "100", "text": "here?"},
    {"from": "Ben", "date_unixtime": "200", "text": ["y", {"type": "bold", "text": "es"}]},
]
# Telegram's export of everything.
ALL_CHATS = {"contacts": {"list": []}, "chats": {"list": [telegram(*TWO_SAID), telegram(*TWO_SAID[::-1])]}}


class Kind(NamedTuple):
    """A file: its rows as lists of texts, or (line, part of the problem), and what is noted."""

    name: str
    write: Write
    rows: list[list[str]] = []
    problem: tuple[int, str] | None = None
    notes: list[str] = []
    settings: dict[str, Any] = {}


KINDS = [
    Kind("lines.jsonl", json_lines(), TWO),
    Kind("utf16.jsonl", json_lines(CAFE, "utf-16", "\r\n"), CAFES, notes=["read as UTF-16"]),
    Kind("utf16-no-mark.jsonl", json_lines(CAFE, "utf-16-le"), CAFES, notes=["read as UTF-16-LE"]),
    Kind("mark.jsonl", json_lines(CAFE, "utf-8-sig"), CAFES),
    Kind("old.jsonl", json_lines(CAFE, "cp1252"), CAFES, notes=["read as cp1252"]),
    Kind("list.jsonl", content(json.dumps(PAIRS, indent=1)), TWO, notes=["holds one JSON list, not a row a line"]),
    Kind("packed.jsonl.gz", compressed(json_lines()), TWO),
    Kind("cut.jsonl.gz", compressed(json_lines(), 40), problem=(0, "is cut off")),
    Kind("no.jsonl.gz", json_lines(), problem=(0, "is not a sound .gz file")),
    Kind("list.json", content(json.dumps(PAIRS)), TWO),
    Kind("data.json", content(json.dumps({"version": 1, "data": PAIRS, "more": [1]})), TWO),
    Kind("lines.json", json_lines(), TWO, notes=["holds a row a line, read like .jsonl"]),
    Kind("broken.json", content('{"data": [\n{"text": "a"},\n{"text" "b"}]}'), [["a"]], (3, "not valid JSON")),
    Kind("excel.csv", table(delimiter=";", encoding="utf-8-sig"), TWO, notes=["columns are parted by a semicolon"]),
    Kind("said.csv", table(delimiter=";", start="sep=;\r\n"), TWO, notes=["columns are parted by a semicolon"]),
    Kind("comma.csv", table(), TWO),
    Kind("bar.csv", table(delimiter="|"), TWO, notes=["columns are parted by a bar"]),
    Kind("one.csv", content("text\nno comma\n\n"), [["no comma"]]),
    Kind("old.csv", table([TABLE[0], ["naïve?", "déjà vu"]], encoding="cp1252"), [["naïve?", "déjà vu"]],
         notes=["read as cp1252"]),
    Kind("tabs.tsv", table(delimiter="\t"), TWO),
    Kind("holes.csv", table([*TABLE, ["alone", ""], ["q", "a"]]), [*TWO, ["q", "a"]], (5, "'Answer' is empty")),
    Kind("wide.csv", table([*TABLE, ["a", "b", "c"]]), TWO, (5, "has 3 cells, and the first line names 2 columns")),
    Kind("quote.csv", content('question,answer\na,b\nc,"d\ne,f\n'), [["a", "b"]], (3, "a quote that begins here")),
    Kind("twice.csv", content("a,b,a\n1,2,3\n"), problem=(1, "has two columns with the name 'a'")),
    Kind("no-header.csv", content("what is it?,a cat\nand this?,a dog\n"),
         problem=(2, "no format has the keys 'what is it?', 'a cat'")),
    Kind("sheet.xlsx", excel(), TWO),
    Kind("sheets.xlsx", excel([["Text", "Label"], [], ["t", 1.0]], [["x"]]), [["t", "1"]],
         notes=["sheet rows is read, not second"]),
    Kind("hole.xlsx", excel([["Text", "Label"], [], ["t", "l"], ["t", None]]), [["t", "l"]], (4, "'Label' is empty")),
    Kind("cut.xlsx", cut(excel(), 0.5), problem=(0, "is damaged, or not an .xlsx file")),
    Kind("table.parquet", parquet({"question": ["a", None], "answer": ["b", "c"], "id": [1, 2]}), [["a", "b"]],
         (2, "'question' is empty")),
    Kind("talk.parquet", parquet({"messages": [TALK]}), [["q", "a"]]),
    Kind("talk-text.parquet", parquet({"messages": [json.dumps(TALK)]}), [["q", "a"]]),
    Kind("cut.parquet", cut(parquet({"text": ["a"] * 1000}), 0.5), problem=(0, "is damaged, or not a .parquet file")),
    Kind("notes.sqlite", database(), [["a", "b"]], settings=QUERY),
    Kind("log.db", database(log=True), [["a", "b"]], settings=QUERY),
    Kind("ask.sqlite3", database(), problem=(0, "tables: notes (title, body, year); for example")),
    Kind("write.db", database(), problem=(0, "not authorized"), settings={"query": "delete from notes"}),
    Kind("odd.db", database(), problem=(0, "no such column: titel"), settings={"query": "select titel from notes"}),
    Kind("no.db", content(b"not a database at all" * 99), problem=(0, "not an SQLite database"), settings=QUERY),
    Kind("note.txt", content("One.\r\nTwo.\r\n"), [["One.\nTwo."]]),
    Kind("note.md", content("# Title\n\ntext\n"), [["# Title\n\ntext"]]),
    Kind("binary.txt", content(bytes(range(256)) * 9), problem=(0, "is not text")),
    Kind("empty.txt", content(""), problem=(0, "is empty")),
    Kind("page.html", content("<html><title>no</title><body><h1>T</h1><p>one <b>two</b><br>three<script>x</script>"),
         [["T\n\none two\nthree"]]),
    Kind("old.htm", content("<meta charset='iso-8859-1'><p>caf\xe9 &amp; more", "latin-1"), [["café & more"]]),
    Kind("page.pdf", pdf(), [["Hello from a page"]]),
    Kind("scan.pdf", pdf(""), problem=(0, "has no text; it may be scanned")),
    Kind("locked.pdf", pdf(password="secret"), problem=(0, "is encrypted, save it without a password")),
    Kind("cut.pdf", content(b"%PDF-1.4\nnothing"), problem=(0, "is damaged, or not a .pdf file")),
    Kind("letter.docx", docx, [["Title\nOne paragraph.\nleft\tright\nLast one."]]),
    Kind("cut.docx", cut(docx, 0.5), problem=(0, "is damaged, or not a .docx file")),
    Kind("notes", folder({"b.md": b"two", "a/x.txt": b"one", ".hidden.txt": b"no", ".git/x.md": b"no"}),
         [["one"], ["two"]]),
    Kind("mails.mbox", mbox(*MAILS), [["Shall we walk?", "Yes."]], settings={"me": "ben@x.org"}),
    Kind("ask.mbox", mbox(*MAILS), problem=(0, "whose messages are the answers: ana@x.org (1)")),
    Kind("one.eml", content(MAILS[0]), problem=(0, "data.me=NAME")),
    Kind("mails", folder({"2.eml": MAILS[1].encode(), "1.eml": MAILS[0].encode()}), [["Shall we walk?", "Yes."]],
         settings={"me": "Ben"}),
    Kind("_chat.txt", content(WHATSAPP), CHAT, settings={"me": "ben"},
         notes=["2 system lines and media left out", "1 of your own messages that answer nothing left out"]),
    Kind("ask.txt", content(WHATSAPP), problem=(0, "whose messages are the answers: Ana (2), Ben (2)")),
    Kind("wrong.txt", content(WHATSAPP), problem=(0, "has no messages of data.me=Bem; did you mean 'Ben'?"),
         settings={"me": "Bem"}),
    Kind("result.json", content(json.dumps(telegram(*TWO_SAID))), [["here?", "yes"]], settings={"me": "Ben"}),
    Kind("conversations.json", content(json.dumps([GPT])), [["edited", "wanted"]],
         notes=["1 pictures and files left out", "2 messages of tools, system and hidden ones left out"]),
    Kind("claude.json", content(json.dumps([CLAUDE])), [["old form", "new form"]], notes=["1 attachments left out"]),
]  # fmt: skip


def texts(example: Example) -> list[str]:
    return [example.text] if example.text is not None else [message["content"] for message in example.messages]


def made(kind: Kind, folder: Path) -> tuple[Path, Source]:
    path = folder / kind.name
    kind.write(path)
    return path, read(path, Data(**kind.settings))


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_file_gives_its_rows_or_a_problem(kind: Kind, tmp_path: Path) -> None:
    path, source = made(kind, tmp_path)
    assert [texts(example) for example in source.examples] == kind.rows
    if kind.problem is None:
        assert source.problems == []
    else:
        (problem,) = source.problems
        line, said = kind.problem
        assert (problem.file, problem.line) == (str(path), line) and said in problem.problem
    assert sorted(source.notes) == sorted(kind.notes)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_nothing_is_written_beside_a_file(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    kind.write(path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    read(path, Data(**kind.settings))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_kind_is_a_path_of_data(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    kind.write(path)
    assert find_splits(path) == {"train": path}


@pytest.mark.parametrize("name", ["model.txt", "model.csv", "model.jsonl"])
def test_an_archive_under_another_name_is_refused(name: str, tmp_path: Path) -> None:
    archive(tmp_path / name)
    with pytest.raises(DataError, match="is a zip archive"):
        find_splits(tmp_path / name)
