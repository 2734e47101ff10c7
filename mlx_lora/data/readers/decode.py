"""Bytes become text in one place: byte order marks, UTF-8, UTF-16, and the single-byte encodings of older programs.

A file is decoded once to its end before its first row is given, so no row comes from a file whose encoding is wrong.
Memory holds one chunk.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TextIO

from mlx_lora.data.readers.base import INSTALL, Note, Unreadable, library

CHUNK = 1 << 20
# Bytes around the first one that isn't UTF-8, by which another encoding is chosen.
SAMPLE = 1 << 16
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The encodings that are tried where a file isn't Unicode: nearly every old file of people's own is in one of these.
CANDIDATES = ("cp1252", "mac_roman", "cp1250", "cp1251", "shift_jis", "gb18030", "euc_kr", "big5")
# An encoding is preferred to cp1252 only if its text is less of a mess by this much (charset-normalizer's measure).
CLEARLY = 0.05
CONTROL = frozenset(range(9)) | frozenset(range(14, 27)) | frozenset(range(28, 32))


class Fault(NamedTuple):
    """The first byte that an encoding has no meaning for: its place, its line, and the bytes around it."""

    byte: int
    line: int
    sample: bytes


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its name ends in .gz. Raises Unreadable where it is cut or damaged."""
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
            yield stream  # type: ignore[misc]
    except EOFError:
        raise Unreadable("is cut off: the compressed data ends too early") from None
    except (gzip.BadGzipFile, zlib.error):
        raise Unreadable("is not a sound .gz file") from None


@contextmanager
def open_text(file: Path, note: Note) -> Iterator[TextIO]:
    """The text of a file, its line ends as they are. Raises Unreadable for what isn't text."""
    encoding = encoding_of(file, note)
    with open_bytes(file) as stream:
        text = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
        try:
            yield text
        finally:
            text.detach()  # closing is open_bytes' part


def lines(file: Path, note: Note) -> Iterator[tuple[int, str]]:
    """(number, line) for every line, counted from 1, its line end included."""
    with open_text(file, note) as text:
        yield from enumerate(text, start=1)


def whole(file: Path, note: Note) -> str:
    """All text of a file, its line ends as "\\n"."""
    with open_text(file, note) as text:
        return text.read().replace("\r\n", "\n").replace("\r", "\n")


def head(file: Path, size: int = SAMPLE) -> str:
    """About the first `size` bytes of a file as text, as far as they are text: for telling kinds of files apart."""
    with open_bytes(file) as stream:
        start = stream.read(size)
    return start.decode(_unicode(start) or "utf-8", errors="replace")


def encoding_of(file: Path, note: Note) -> str:
    """The encoding in which the whole file can be decoded. Raises Unreadable where there is none."""
    with open_bytes(file) as stream:
        start = stream.read(4096)
    encoding = _unicode(start)
    if encoding and encoding != "utf-8-sig":
        if fault := first_fault(file, encoding):
            raise Unreadable(f"is not {encoding.upper()} throughout (byte {fault.byte} of the file)", fault.line)
        note(f"read as {encoding.upper()}")
        return encoding
    fault = first_fault(file, "utf-8")
    if fault is None:
        return "utf-8-sig"
    if encoding or _more_utf8(fault.sample):
        raise Unreadable(f"is not UTF-8 (byte {fault.byte} of the file)", fault.line)
    encoding = _single_byte(fault)
    if first_fault(file, encoding):
        raise Unreadable(f"is not UTF-8 (byte {fault.byte} of the file), nor {encoding}", fault.line)
    note(f"read as {encoding}")
    return encoding


def _unicode(start: bytes) -> str | None:
    """UTF-8 with a mark, UTF-16 or UTF-32, by a file's first bytes; None for others. Raises Unreadable for no text."""
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    if b"\0" not in start:
        return None
    # Without a mark: text in our alphabets has a zero in every second byte, first or last.
    even, odd = start[::2].count(0) / len(start[::2]), start[1::2].count(0) / max(len(start[1::2]), 1)
    encoding = "utf-16-le" if odd > even else "utf-16-be"
    if max(odd, even) < 0.3 or min(odd, even) > 0.05 or _is_binary(start.decode(encoding, errors="replace").encode()):
        raise Unreadable("is not text")
    return encoding


def first_fault(file: Path, encoding: str) -> Fault | None:
    """Where a file can't be decoded, None if it can throughout."""
    decoder = codecs.getincrementaldecoder(encoding)()
    begin, line, last = 0, 1, b""
    with open_bytes(file) as stream:
        while True:
            chunk = stream.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = max(error.start - pending, 0)
                both = last[-SAMPLE:] + chunk
                at = len(both) - len(chunk) + place
                sample = both[max(at - SAMPLE, 0) : at + SAMPLE]
                return Fault(max(begin - pending + error.start, 0), line + chunk.count(b"\n", 0, place), sample)
            if not chunk:
                return None
            begin, line, last = begin + len(chunk), line + chunk.count(b"\n"), chunk


def _more_utf8(sample: bytes) -> bool:
    """Whether bytes are damaged UTF-8: no fewer characters of several bytes than bytes that fit nowhere."""
    text = sample.decode("utf-8", errors="replace")
    bad = text.count("\N{REPLACEMENT CHARACTER}")
    return sum(character > "\x7f" for character in text) - bad >= max(bad, 1)


def _single_byte(fault: Fault) -> str:
    """The likeliest of the CANDIDATES for bytes that aren't UTF-8. Raises Unreadable where they aren't text at all."""
    sample = fault.sample
    if _is_binary(sample):
        raise Unreadable("is not text")
    try:
        detector = library("charset_normalizer")
    except Unreadable:
        raise Unreadable(
            f"is not UTF-8 (byte {fault.byte} of the file); other encodings need {INSTALL}", fault.line
        ) from None
    matches = detector.from_bytes(sample, cp_isolation=list(CANDIDATES))
    found = {name: match.chaos for match in matches for name in match.could_be_from_charset if name in CANDIDATES}
    if not found:
        return "cp1252" if _decodes(sample, "cp1252") else "latin-1"
    best = min(found, key=lambda name: (found[name], CANDIDATES.index(name)))
    return "cp1252" if found.get("cp1252", 1) <= found[best] + CLEARLY else str(best)


def _is_binary(sample: bytes) -> bool:
    """Whether more than a hundredth are control characters that texts don't hold."""
    return sum(byte in CONTROL for byte in sample) > len(sample) / 100


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
