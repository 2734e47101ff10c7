"""IBANs and payment cards in a text: their form, then their checksum."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

# Characters of an IBAN by country, from the SWIFT registry.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
    "YE": 30,
}  # fmt: skip
SPACE = "\u00a0\u202f\u2009 "
# Two letters and two digits that begin a word. The pattern starts at a digit, which is rarer in a text than a letter.
IBAN_START = re.compile(r"[0-9](?<=[A-Za-z]{2}[0-9])(?<![A-Za-z0-9_][A-Za-z]{2}[0-9])[0-9]")

# Groups as they are printed on cards, with one separator throughout; or no groups.
CARD = re.compile(
    rf"[0-9](?<![\w#][0-9])(?<![0-9][.,-][0-9])(?:"
    rf"[0-9]{{3}}([{SPACE}.-])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}(?:\1[0-9]{{3}})?"
    rf"|[0-9]{{3}}([{SPACE}.-])[0-9]{{6}}\2[0-9]{{4,5}}"
    r"|[0-9]{11,18})(?![\w%])(?![.-][0-9])"
)
# First digits, from and to, and the lengths that go with them. Visa numbers of 13 digits are not issued any more, and
# a tenth of the bar codes that begin with 4 would pass for them.
CARDS = (
    ("4", "4", (16, 19)),  # Visa
    ("51", "55", (16,)), ("2221", "2720", (16,)),  # Mastercard
    ("34", "34", (15,)), ("37", "37", (15,)),  # American Express
    ("300", "305", (14, 16)), ("36", "36", (14, 16)), ("38", "39", (14, 16)),  # Diners Club
    ("6011", "6011", (16, 19)), ("644", "649", (16, 19)), ("65", "65", (16, 19)),  # Discover
    ("3528", "3589", (16, 19)),  # JCB
    ("62", "62", (16, 17, 18, 19)),  # UnionPay
    ("2200", "2204", (16,)),  # Mir
    ("5018", "5018", (12, 16, 19)), ("5020", "5020", (12, 16, 19)), ("5038", "5038", (12, 16, 19)),
    ("5893", "5893", (12, 16, 19)), ("6304", "6304", (12, 16, 19)), ("6759", "6763", (12, 16, 19)),  # Maestro
)  # fmt: skip


def ibans(text: str) -> Iterator[tuple[int, int]]:
    """IBANs of a country's length whose remainder by 97 is 1, in groups or without."""
    for match in IBAN_START.finditer(text):
        start = match.start() - 2
        length = IBAN_LENGTHS.get(text[start : start + 2].upper())
        rest = _rest(length - 4).match(text, start + 4) if length else None
        if rest and _remainder_is_one(re.sub(r"[\W_]", "", text[start : rest.end()])):
            yield start, rest.end()


def cards(text: str) -> Iterator[tuple[int, int]]:
    """Numbers of a card network's first digits and length whose last digit is right (Luhn)."""
    position = 0
    while match := CARD.search(text, position):
        digits = re.sub(r"[^0-9]", "", match[0])
        good = _is_of_a_network(digits) and luhn(digits)
        if good:
            yield match.span()
        # a number that is none may have a card's first group as its second
        position = match.end() if good else match.start() + 1


def luhn(digits: str) -> bool:
    """Whether a number's last digit is its Luhn check digit (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(doubled)) % 10 == 0


@cache
def _rest(length: int) -> re.Pattern[str]:
    """What follows country and check digits: so many letters and digits, a separator allowed before each."""
    return re.compile(rf"(?:[{SPACE}.-]?[A-Za-z0-9]){{{length}}}(?!\w)")


def _remainder_is_one(iban: str) -> bool:
    """ISO 13616: country and check digits to the end, letters as 10 to 35, the remainder by 97 is 1."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _is_of_a_network(digits: str) -> bool:
    if len(set(digits)) == 1:
        return False
    return any(low <= digits[: len(low)] <= high and len(digits) in lengths for low, high, lengths in CARDS)
