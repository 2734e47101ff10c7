"""Phone numbers in a text: international ones by calling code and length, national ones by their common forms.

A run of digits and separators has to be a number as a whole, so that rows of a table, dates and versions are none.
Numbers that could be anything (ten digits in a row, three groups of three) count where a word before says phone, and
none does where a word before says order, invoice or the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

RUN = re.compile("[0-9](?:[ \u00a0\u202f\u2009.()/\u2010-\u2013-]{0,3}[0-9]){6,}")
PLAIN = str.maketrans(
    {"\u00a0": " ", "\u202f": " ", "\u2009": " ", **{chr(code): "-" for code in range(0x2010, 0x2014)}}
)
MOST = 40
BREAK = re.compile(r" [-/] |  +")

CODES = (
    r"1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2(?:1[12368]|[2-6]\d|9[01789])|3[578]\d|42\d|5[09]\d|6[789]\d"
    r"|8[0578]\d|9[679]\d"
)
CODE = re.compile(CODES)
WITH_DOT = re.compile(rf"\+(?:{CODES})\.\d{{6,12}}")  # as registries of domains write them
NANP_DIGITS = re.compile(r"1[2-9]\d\d[2-9]\d{6}")

FORMS = tuple(
    re.compile(form)
    for form in (
        # North America
        r"(?:1[ .-])?(?:\([2-9]\d\d\) ?-? ?[2-9]\d\d[ .-]|[2-9]\d\d([ .-])[2-9]\d\d\1|[2-9]\d\d/[2-9]\d\d-)\d{4}",
        # with the 0 of national calls, as in Europe, Australia and Japan; one dot alone would be a decimal number
        r"\(0[1-9]\d{0,4}\)(?:(?: ?[-./] ?| )?\d{2,8})(?:(?: ?[-./] ?| )\d{2,8}){0,4}",
        r"0[1-9]\d{0,4}(?: ?[-/] ?| )\d{2,8}(?:(?: ?[-./] ?| )\d{2,8}){0,4}",
        r"0[1-9]\d{0,4}(?:\.\d{2,8}){2,4}",
        r"0(?:1[567]\d{8,9}|[67]\d{8}|7\d{9}|4\d{8}|[789]0\d{8})",
        r"[6-9]\d{4}[ -]\d{5}",  # India
        r"1[3-9]\d[ -]\d{4}[ -]\d{4}",  # China
        r"(?:\([1-9]\d\) ?|[1-9]\d )9?\d{4}-\d{4}",  # Brazil
        r"3[2-9]\d[ ./-]\d{3}[ .-]?\d{4}",  # Italy
        r"[6-9]\d\d \d\d \d\d \d\d|[5-9]\d\d-\d{3}-\d{3}",  # Spain, Poland
        r"8[ -]?\(?[3-9]\d\d\)?[ -]\d{3}[ -]\d\d[ -]\d\d",  # Russia
    )
)
DATE = re.compile(
    r"\d{1,2}[./-]\d{1,2}[./-](?:(?:19|20)\d\d(?!\d)|\d\d(?=$| ))|(?:19|20)\d\d[./-]\d{1,2}[./-]\d{1,2}(?!\d)"
)
HOURS = re.compile(r"[0-2]?\d\.[0-5]\d ?- ?[0-2]?\d\.[0-5]\d")
ZIP = re.compile(r"0\d{4}-\d{4}")  # of the United States
DECIMAL = re.compile(r"\d+\.\d+")
NAMED = re.compile(
    r"(?<![^\W_])(?:tele?(?:phone|fon|foon|f|ph)?|phone|mobile?|mob|cell(?:phone|ular)?|fax|handy|handynummer|whatsapp"
    r"|telefonnummer|rufnummer|festnetz|durchwahl|t[ée]l[ée]phone|t[ée]l[ée]fono|tél|portable|m[óo]vil|celular"
    r"|cellulare|telefoonnummer|call (?:me|us|him|her)|phone_number|contact_number|ring me|text me)"
    r"(?:[\s:.=#\"'(/_-]|numbers?|nummer|numéro|número|no\b|nr\b|is\b|ist\b|est\b|es\b|at\b|on\b|under\b|unter\b"
    r"|direct|home|work|private|office|\(m\)){0,8}\Z",
    re.IGNORECASE,
)
OTHERWISE = re.compile(
    r"(?:(?<![^\W_])(?:order|po|bestell\w*|auftrag\w*|rechnung\w*|invoice|kunden\w*|customer|case|ticket|ref|reference"
    r"|referenz|id|isbn|issn|ean|gtin|sku|serial|article|artikel\w*|part|tracking|sendung\w*|vorgang\w*|aktenzeichen"
    r"|account|konto\w*|batch|lot|version|doi|imei|vin|vat|ssn|steuer\w*|policy|contract|vertrag\w*|build|nr\.|no\.)"
    r"|[#№$€£§])[\s:.=#\"'(_-]{0,3}(?:(?:number|nummer|nr|no|id|is)(?![a-z])[\s:.=#\"'(-]{0,3}){0,2}\Z",
    re.IGNORECASE,
)


def find(text: str) -> Iterator[tuple[int, int]]:
    """Places of phone numbers, in order."""
    for match in RUN.finditer(text):
        start, end = match.span()
        while start and text[start - 1] in "+(" and match.start() - start < 2:
            start -= 1
        if start and not _may_begin(text, start, match[0]) or not _may_end(text, end):
            continue
        yield from _in_run(text, start, end)


def _in_run(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The run as a whole, or else what its wide gaps part it into."""
    run = text[start:end].translate(PLAIN)
    if len(run) <= MOST and (found := _number(text, start, run)):
        yield found
        return
    begin = 0
    gaps = [gap.span() for gap in BREAK.finditer(run)]
    for gap, after in [*gaps, (len(run), 0)] if gaps else []:
        if 7 <= gap - begin <= MOST and (found := _number(text, start + begin, run[begin:gap])):
            yield found
        begin = after


def _number(text: str, start: int, run: str) -> tuple[int, int] | None:
    """The place of a run that is a phone number, without a parenthesis that belongs to the sentence."""
    if run.startswith("(") and ")" not in run:
        start, run = start + 1, run[1:]
    digits = "".join(filter(str.isdigit, run))
    place = (start, start + len(run))
    if "+" in run:
        return place if _is_international(run, digits) else None
    if DATE.match(run) or HOURS.fullmatch(run) or ZIP.fullmatch(run):
        return None
    before = text[max(0, start - 40) : start]
    if NAMED.search(before):
        return place if 6 <= len(digits) <= 15 and not DECIMAL.fullmatch(run) else None
    if OTHERWISE.search(before):
        return None
    if digits.startswith("00"):
        known = CODE.match(digits, 2) and 12 <= len(digits) <= 16 and run.startswith("00")
        return place if known and not DECIMAL.fullmatch(run) else None
    zero = digits[0] == "0"
    good = (not zero or 9 <= len(digits) <= 12) and any(form.fullmatch(run) for form in FORMS)
    return place if good else None


def _is_international(run: str, digits: str) -> bool:
    """`+`, a calling code, and as many digits as a number has; `(0)` is said to be left out by callers from abroad."""
    if "(0)" in run:
        digits = "".join(filter(str.isdigit, run.replace("(0)", "", 1)))
    if not 8 <= len(digits) <= 15 or not CODE.match(digits) or "000 000" in run:
        return False
    if DECIMAL.fullmatch(run[1:]) and not WITH_DOT.fullmatch(run):
        return False
    return digits[0] != "1" or bool(NANP_DIGITS.fullmatch(digits))


def _may_begin(text: str, start: int, run: str) -> bool:
    """Not inside a word, a path, a decimal number or a time."""
    before, further = text[start - 1], text[start - 2 : start - 1] if start > 1 else ""
    if before.isalnum() or before in "_#@\\":
        return False
    if before in "./-:" and further.isalnum() and (before != ":" or further.isdigit()):
        return False
    return not (before == "," and further.isdigit() and run.isdigit())


def _may_end(text: str, end: int) -> bool:
    """Not inside a word, a time or an amount; an extension (x12) may follow."""
    after = text[end : end + 4]
    if re.match(r"[^\W\d]|[%€$£@=]| ?[€$£]|[:/\\-][\w]|,\d{1,2}(?!\d)", after):
        return bool(re.match(r"x\d|ext", after))
    return True
