"""One mail: who wrote it, to which thread it belongs, and what its writer added to what was quoted."""

from __future__ import annotations

import re
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr, parsedate_to_datetime

from mlx_lora.data.readers.document import html_text

IDS = re.compile(r"<[^<>\s]+>")
REPLY = re.compile(r"^((re|aw|sv|vs|antw|fw|fwd|wg|tr|rv|res|r|i)(\[\d+\])?\s*:\s*)+", re.IGNORECASE)
# A line that introduces what is quoted: "On …, Ana wrote:" in some languages, broken into two lines at most.
INTRODUCTION = re.compile(
    r"^[ \t]*(?:On|Am|Le|El|Il|Em|Op|Den|Dnia|W dniu)\b[^\n]{0,200}(?:\n[^\n]{0,200})?(?:wrote|writes|schrieb[^\n:]*"
    r"|a écrit|escribió|ha scritto|escreveu|schreef[^\n:]*|skrev[^\n:]*|napisała?)\s?:[ \t]*$(?=\s*(?:>|\Z))",
    re.MULTILINE,
)
# Outlook quotes a whole mail under a line, or under a block of header lines.
WHOLE = re.compile(
    r"^[ \t]*-{3,}[ \t]*(?:Original Message|Original-Nachricht|Ursprüngliche Nachricht|Forwarded message"
    r"|Message d'origine|Mensaje original)[ \t]*-{3,}[ \t]*$"
    r"|^[ \t]*\*?(?:From|Von|De|Da|Van|Från|Od):\*? [^\n]+\n(?:[^\n]*\n){0,2}?[ \t]*\*?(?:Sent|Date|Gesendet|Datum"
    r"|Envoyé|Enviado|Fecha|Inviato|Verzonden|Skickat|Wysłano|To|An|À|Para|A|Aan|Till|Do):\*? ",
    re.MULTILINE,
)
LINE = re.compile(r"^_{10,}\s*\Z", re.MULTILINE)
SIGNATURE = re.compile(
    r"^-- ?$|^(?:Sent from my|Get Outlook for|Von meinem|Envoyé de mon|Enviado desde mi) [^\n]{1,60}$", re.MULTILINE
)


class Letter:
    """A mail's headers; `headers_only` leaves its body alone."""

    def __init__(self, content: bytes):
        self.message = message_from_bytes(content)
        name, address = parseaddr(self._header("From"))
        self.address = address.lower() or name or "unknown"
        self.name = name or self.address

    def _header(self, name: str) -> str:
        """A header decoded, on one line."""
        value = self.message.get(name)
        if value is None:
            return ""
        try:
            text = str(make_header(decode_header(str(value))))
        except (LookupError, ValueError):
            text = str(value)
        return " ".join(text.split())

    @property
    def own_id(self) -> str | None:
        return next(iter(IDS.findall(self._header("Message-ID"))), None)

    @property
    def references(self) -> list[str]:
        """Ids of the mails that this one answers, and of the thread where a mail service gives it one."""
        found = IDS.findall(f"{self._header('References')} {self._header('In-Reply-To')}")
        thread = self._header("X-GM-THRID")
        return [*found, f"thread {thread}"] if thread else found

    @property
    def subject(self) -> tuple[str, bool]:
        """(subject without "Re:" in lower case, whether it had one)."""
        subject = self._header("Subject")
        plain = REPLY.sub("", subject).strip().lower()
        return plain, plain != subject.lower()

    @property
    def time(self) -> float:
        try:
            return parsedate_to_datetime(self._header("Date")).timestamp()
        except (TypeError, ValueError, OverflowError, IndexError):
            return 0.0

    @property
    def text(self) -> str:
        """What the writer wrote, without quotes, signature and attachments."""
        parts = [part for part in self.message.walk() if _is_text(part)]
        plain = [part for part in parts if part.get_content_type() == "text/plain"]
        if plain:
            return own_text("\n".join(map(_decoded, plain)))
        pages = [html_text(_without_quotes(_decoded(part))) for part in parts]
        return own_text("\n".join(pages))


def own_text(text: str) -> str:
    """A mail's text without quoted lines, the lines that introduce them, and the signature."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    # a line that begins with "From " was written with a > in front of it in mailboxes, and isn't a quote
    text = re.sub(r"^>From ", "From ", text, flags=re.MULTILINE)
    for whole in (WHOLE, SIGNATURE):
        if found := whole.search(text):
            text = text[: found.start()]
    text = INTRODUCTION.sub("", LINE.sub("", text))
    lines = [line.rstrip() for line in text.split("\n") if not line.lstrip().startswith(">")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _is_text(part: Message) -> bool:
    return part.get_content_type() in ("text/plain", "text/html") and part.get_content_disposition() != "attachment"


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    text = ""
    for charset in (part.get_content_charset() or "utf-8", "utf-8", "latin-1"):
        try:
            text = content.decode(charset)
            break
        except (LookupError, UnicodeDecodeError):
            continue
    if str(part.get_param("format") or "").lower() == "flowed":  # a space before a line's end joins it to the next
        text = re.sub(r"(?m)^(?!-- \r?$)(>*)(.*[^\s]) \r?\n(?!>)(?=\S)", r"\1\2 ", text)
    return text


def _without_quotes(html: str) -> str:
    """Pages mark quotes themselves."""
    return re.sub(
        r"<blockquote\b.*</blockquote>|<div[^>]{0,200}\bgmail_quote\b.*", "", html, flags=re.DOTALL | re.IGNORECASE
    )
