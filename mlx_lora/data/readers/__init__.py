"""One module for each kind of file: `rows(file, settings, note)` gives its raw rows one at a time.

A file's ending says which. Where one ending stands for several kinds (.txt, .json), the first lines decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mlx_lora import files
from mlx_lora.config import Data
from mlx_lora.data.readers.base import Note, Raw, Unreadable

# By ending: the module that reads it. Those of DOCUMENTS are texts, and may come as a folder.
ROWS = {
    ".jsonl": "json_lines", ".ndjson": "json_lines", ".json": "json_file", ".csv": "table", ".tsv": "table",
    ".xlsx": "excel", ".parquet": "parquet", ".sqlite": "database", ".sqlite3": "database", ".db": "database",
    ".mbox": "mail",
}  # fmt: skip
DOCUMENTS = {
    ".txt": "document", ".md": "document", ".html": "document", ".htm": "document", ".pdf": "document",
    ".docx": "document", ".eml": "mail",
}  # fmt: skip
COMPRESSED = (".jsonl.gz", ".ndjson.gz", ".json.gz", ".csv.gz", ".tsv.gz")
ENDINGS = (*ROWS, *DOCUMENTS, *COMPRESSED)
# Kinds of files that are zip archives.
ARCHIVES = (".xlsx", ".docx")


def ending(file: Path) -> str:
    """What a file's name ends in, in lower case, `.jsonl.gz` as a whole."""
    suffix = file.suffix.lower()
    return file.with_suffix("").suffix.lower() + suffix if suffix == ".gz" else suffix


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    """The raw rows of a file or of a folder of documents; what can't be read is a row with a problem."""
    if file.is_dir() and documents(file):
        yield from _folder(file, settings, note)
        return
    try:
        if found := files.fault(file, archive=ending(file) in ARCHIVES):
            raise Unreadable(found)
        yield from import_module(f"{__name__}.{kind(file, settings)}").rows(file, settings, note)
    except Unreadable as error:
        yield Raw(error.line, None, str(error))
    except OSError as error:
        yield Raw(0, None, f"can't be read ({error.strerror or type(error).__name__})")


def kind(file: Path, settings: Data) -> str:
    """The name of the module that reads a file. Raises Unreadable for an ending that none reads."""
    suffix = ending(file)
    known = ROWS | DOCUMENTS | {name: ROWS[name.removesuffix(".gz")] for name in COMPRESSED}
    if suffix not in known:
        raise Unreadable(f"is not a kind of file that is read here; known: {', '.join(ENDINGS)}")
    if suffix == ".txt" and settings.format in ("auto", "messages"):
        return "whatsapp" if import_module(f"{__name__}.whatsapp").matches(file) else "document"
    if suffix == ".json":
        return next((name for name in ("telegram", "chatgpt", "claude") if _matches(name, file)), "json_file")
    return known[suffix]


def documents(folder: Path) -> list[Path]:
    """The documents below a folder, by path; hidden files and folders left out."""
    found = []
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if ending(file) in DOCUMENTS and not hidden and file.is_file():
            found.append(file)
    return sorted(found)


def _folder(folder: Path, settings: Data, note: Note) -> Iterator[Raw]:
    found = documents(folder)
    for file in found:
        if ending(file) == ".eml":
            continue
        for raw in rows(file, settings, note):
            yield raw._replace(file=file)
    if mails := [file for file in found if ending(file) == ".eml"]:
        try:
            yield from import_module(f"{__name__}.mail").of_files(mails, settings, note)
        except Unreadable as error:
            yield Raw(error.line, None, str(error))


def _matches(name: str, file: Path) -> bool:
    return bool(import_module(f"{__name__}.{name}").matches(file))
