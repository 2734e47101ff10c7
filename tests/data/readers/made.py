"""Files as people have them, made here: each function writes one and gives its path."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TABLE = [["Question", "Answer"], ["two and two", "four"], ["three, or\nthree", 'a "pair"']]
PAIRS = [{"question": question, "answer": answer} for question, answer in TABLE[1:]]
Write = Callable[[Path], None]


def content(data: bytes | str, encoding: str = "utf-8") -> Write:
    return lambda file: void(file.write_bytes(data if isinstance(data, bytes) else data.encode(encoding)))


def void(_: Any) -> None:
    return None


def json_lines(rows: Sequence[Any] = PAIRS, encoding: str = "utf-8", end: str = "\n") -> Write:
    return content("".join(json.dumps(row, ensure_ascii=False) + end for row in rows), encoding)


def compressed(write: Write, keep: int | None = None) -> Write:
    """Another file's content in gzip, cut to `keep` bytes."""

    def make(file: Path) -> None:
        write(file)
        file.write_bytes(gzip.compress(file.read_bytes())[:keep])

    return make


def cut(write: Write, keep: float) -> Write:
    """A part of another file."""

    def make(file: Path) -> None:
        write(file)
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])

    return make


def table(
    rows: Sequence[Sequence[str]] = TABLE, delimiter: str = ",", encoding: str = "utf-8", start: str = ""
) -> Write:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return content(start + text.getvalue(), encoding)


def excel(rows: Sequence[Sequence[Any]] = TABLE, more: Sequence[Sequence[Any]] = ()) -> Write:
    def make(file: Path) -> None:
        from openpyxl import Workbook

        book = Workbook()
        book.active.title = "cover"
        sheet = book.create_sheet("rows")
        for row in rows:
            sheet.append(row)
        if more:
            for row in [*more]:
                book.create_sheet("second").append(row)
        book.save(file)

    return make


def parquet(columns: dict[str, list[Any]]) -> Write:
    def make(file: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), file)

    return make


def database(log: bool = False) -> Write:
    def make(file: Path) -> None:
        connection = sqlite3.connect(file)
        if log:
            connection.execute("pragma journal_mode=wal")
        connection.execute("create table notes (title text, body text, year integer)")
        connection.executemany("insert into notes values (?, ?, ?)", [("a", "b", 1), ("c", "d", 2)])
        connection.commit()
        connection.close()

    return make


def pdf(text: str = "Hello from a page", password: str | None = None) -> Write:
    """The smallest file of one page with one line of text, or with none."""

    def make(file: Path) -> None:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode() if text else b"0 0 100 100 re f"
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R "
            b"/Resources << /Font << /F1 5 0 R >> >> >>",
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        ]
        data, places = b"%PDF-1.4\n", []
        for number, each in enumerate(objects, start=1):
            places.append(len(data))
            data += b"%d 0 obj\n%s\nendobj\n" % (number, each)
        begin = len(data)
        data += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
        data += b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % begin
        file.write_bytes(data)
        if password is not None:
            from pypdf import PdfReader, PdfWriter

            writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data)))
            writer.encrypt(password, algorithm="RC4-128")
            writer.write(file)

    return make


def docx(file: Path) -> None:
    from docx import Document

    document = Document()
    document.add_heading("Title")
    document.add_paragraph("One paragraph.")
    cells = document.add_table(1, 2).rows[0].cells
    cells[0].text, cells[1].text = "left", "right"
    document.add_paragraph("Last one.")
    document.save(str(file))


def archive(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("data.pkl", "x")


def folder(files: dict[str, bytes | Write]) -> Write:
    def make(path: Path) -> None:
        for name, made in files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (content(made) if isinstance(made, bytes) else made)(file)

    return make


def mail(sender: str, text: str, subject: str = "walk", at: int = 0, own: str = "", answers: str = "") -> str:
    lines = [f"From: {sender}", f"Subject: {subject}", f"Date: Mon, 06 Jan 2025 {at:02}:00:00 +0000"]
    lines += [f"Message-ID: <{own}@x>"] if own else []
    lines += [f"In-Reply-To: <{answers}@x>"] if answers else []
    return "\n".join([*lines, "Content-Type: text/plain; charset=utf-8", "", text, ""])


def mbox(*mails: str) -> Write:
    return content("".join(f"From x Mon Jan  6 00:00:00 2025\n{each}\n" for each in mails))


def telegram(*messages: dict[str, Any], kind: str = "personal_chat") -> dict[str, Any]:
    return {"name": "Ana", "type": kind, "id": 1, "messages": [{"type": "message", **each} for each in messages]}


def node(role: str, text: Any, parent: str | None, **more: Any) -> dict[str, Any]:
    """A message of ChatGPT's export in its place in the tree; its children aren't needed."""
    kind = {"content_type": "text", "parts": text if isinstance(text, list) else [text]}
    return {"message": {"author": {"role": role}, "content": kind, **more}, "parent": parent, "children": []}


GPT = {
    "title": "t", "create_time": 1.0, "current_node": "d",
    "mapping": {
        "root": {"message": None, "parent": None, "children": ["s"]},
        "s": node("system", "", "root", weight=0),
        "a": node("user", "first try", "s"),
        "b": node("assistant", "unwanted", "a"),
        "c": node("user", ["edited", {"content_type": "image_asset_pointer"}], "s"),
        "t": node("assistant", "search()", "c", recipient="browser"),
        "d": node("assistant", "wanted", "t"),
    },
}  # fmt: skip
CLAUDE = {
    "uuid": "u", "name": "n", "chat_messages": [
        {"uuid": "1", "sender": "human", "text": "old form", "content": [], "attachments": [{"file_name": "f"}]},
        {"uuid": "2", "sender": "assistant", "text": "x", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "new form"}]},
    ],
}  # fmt: skip
WHATSAPP = (
    "[31.12.24, 09:00:00] \u200eMessages and calls are end-to-end encrypted.\n"
    "[31.12.24, 10:00:00] Ana: are you coming?\n"
    "[31.12.24, 10:01:00] Ana: we start at 8\nand bring\n\nsnacks\n"
    "\u200e[31.12.24, 10:02:00] Ana: \u200eimage omitted\n"
    "[31.12.24, 10:09:00] Ben: on my way\n"
    "[01.01.25, 11:00:00] Ben: happy new year\n"
)
