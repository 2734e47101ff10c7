""".txt, .md, .html, .pdf, .docx: one row of plain text for a document, however long; tokens cut it later."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Note, Raw, Unreadable, library

# What a browser shows apart from the rest, and what it shows on lines of its own.
APART = "blockquote dl figure h1 h2 h3 h4 h5 h6 hr ol p pre table ul".split()
LINES = "address article aside dd div dt figcaption footer form header li main nav section tr".split()
UNSEEN = ("head", "title", "script", "style", "noscript", "template", "svg")


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    readers = {".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx}
    text = readers.get(file.suffix.lower(), decode.whole)(file, note)
    if text.strip():
        yield Raw(1, {"text": text.strip("\n")})
    elif file.stat().st_size:
        raise Unreadable("has no text")
    else:
        raise Unreadable("is empty")


def html_text(html: str | bytes) -> str:
    """What a browser would show of a page, its blocks on lines of their own."""
    soup = _soup(html)
    for element in soup.find_all(UNSEEN):
        element.decompose()
    for element in soup.find_all("pre"):
        for string in element.find_all(string=True):
            string.replace_with(string.replace("\n", "\v"))  # kept, where other line breaks are only spaces
    for string in soup.find_all(string=True):
        string.replace_with(re.sub(r"[ \t\r\n]+", " ", string) if "\v" not in string else string)
    for names, gap in ((APART, "\n\n"), (LINES, "\n")):
        for element in soup.find_all(names):
            element.insert_before(gap)
            element.insert_after(gap)
    for element in soup.find_all(["br", "td", "th"]):
        element.insert_after("\n" if element.name == "br" else "\t")
    text = re.sub(r"[ \t]*\n\s*", _gap, soup.get_text())
    return text.replace("\v", "\n").strip()


def _gap(found: re.Match[str]) -> str:
    return "\n\n" if found[0].count("\n") > 2 else "\n"


def _soup(html: str | bytes) -> Any:
    library("bs4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pages that look like something else
        return library("bs4").BeautifulSoup(html, "html.parser")


def _html(file: Path, note: Note) -> str:
    """A page says its encoding itself, or is decoded as other texts are."""
    content = file.read_bytes()
    named = re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w-]+)", content[:4096], re.IGNORECASE)
    if named:
        try:
            return html_text(content.decode(named[1].decode()))
        except (LookupError, UnicodeDecodeError):
            pass
    return html_text(decode.whole(file, note))


def _pdf(file: Path, note: Note) -> str:
    pdf = library("pypdf")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of small damage that it gets over
    try:
        reader = pdf.PdfReader(file)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
    except Exception as error:  # whatever a broken page makes of the library
        if type(error).__name__ == "DependencyError":
            raise Unreadable("is encrypted in a way that needs the library cryptography") from None
        raise Unreadable(f"is damaged, or not a .pdf file ({type(error).__name__})") from None
    if locked:
        raise Unreadable("is encrypted, save it without a password")
    if not any(map(str.strip, pages)):
        raise Unreadable("has no text; it may be scanned")
    # half a character, which some fonts give, is none
    return "\n\n".join(pages).encode(errors="replace").decode()


def _docx(file: Path, note: Note) -> str:
    docx = library("docx")
    try:
        parts = [_part(part) for part in docx.Document(str(file)).iter_inner_content()]
    except Exception as error:  # the library lets zip's and XML's errors through
        raise Unreadable(f"is damaged, or not a .docx file ({type(error).__name__})") from None
    return "\n".join(parts)


def _part(part: Any) -> str:
    """A paragraph, or a table with a line for each row and tabs between cells."""
    if hasattr(part, "rows"):
        return "\n".join("\t".join(cell.text for cell in row.cells) for row in part.rows)
    return str(part.text)
