"""Secrets in a text: keys and tokens of well-known forms, private key blocks, and secrets given by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

BEFORE = r"(?<![A-Za-z0-9_-])"
AFTER = r"(?![A-Za-z0-9_-])"
# A literal that the text has to hold, and the pattern that is searched only then. The literal begins the match, or
# stands inside it; looking for it costs a fraction of what the pattern costs.
FORMS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (literal, re.compile(pattern))
    for literal, pattern in (
        ("PRIVATE KEY", r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
         r"(?:[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|[\sA-Za-z0-9+/=\\]*)"),
        ("AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[A-Z0-9]{20,}"),
        ("eyJ", BEFORE + r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
        ("sk-", BEFORE + r"sk-[A-Za-z0-9_-]{20,}"),
        ("sk_", BEFORE + r"sk_(?:live|test)_[A-Za-z0-9]{16,}" + AFTER),
        ("rk_", BEFORE + r"rk_(?:live|test)_[A-Za-z0-9]{16,}" + AFTER),
        ("whsec_", BEFORE + r"whsec_[A-Za-z0-9+/=]{24,}"),
        ("gsk_", BEFORE + r"gsk_[A-Za-z0-9]{32,}" + AFTER),
        ("ghp_", BEFORE + r"ghp_[A-Za-z0-9]{36,}" + AFTER),
        ("gho_", BEFORE + r"gho_[A-Za-z0-9]{36,}" + AFTER),
        ("ghu_", BEFORE + r"ghu_[A-Za-z0-9]{36,}" + AFTER),
        ("ghs_", BEFORE + r"ghs_[A-Za-z0-9]{36,}" + AFTER),
        ("ghr_", BEFORE + r"ghr_[A-Za-z0-9]{36,}" + AFTER),
        ("github_pat_", BEFORE + r"github_pat_[A-Za-z0-9_]{22,}" + AFTER),
        ("glpat-", BEFORE + r"glpat-[A-Za-z0-9_-]{20,}"),
        ("AKIA", BEFORE + r"AKIA[A-Z0-9]{16}" + AFTER),
        ("ASIA", BEFORE + r"ASIA[A-Z0-9]{16}" + AFTER),
        ("xox", BEFORE + r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("xapp-", BEFORE + r"xapp-[A-Za-z0-9-]{20,}"),
        ("hooks.slack.com", r"hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9_/]{20,}"),
        ("AIza", BEFORE + r"AIza[A-Za-z0-9_-]{35}" + AFTER),
        ("ya29.", BEFORE + r"ya29\.[A-Za-z0-9_-]{20,}"),
        ("hf_", BEFORE + r"hf_[A-Za-z0-9]{30,}" + AFTER),
        ("npm_", BEFORE + r"npm_[A-Za-z0-9]{36}" + AFTER),
        ("pypi-", BEFORE + r"pypi-[A-Za-z0-9_-]{50,}"),
        ("SG.", BEFORE + r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"),
        ("dop_v1_", BEFORE + r"dop_v1_[a-f0-9]{64}" + AFTER),
        ("shpat_", BEFORE + r"shpat_[a-fA-F0-9]{32}" + AFTER),
        ("dapi", BEFORE + r"dapi[a-f0-9]{32}(?:-[0-9])?" + AFTER),
        (":AA", r"(?<![A-Za-z0-9])[0-9]{8,10}:AA[A-Za-z0-9_-]{33}" + AFTER),  # Telegram's bots
    )
)  # fmt: skip
WITHOUT_UNDERSCORE = tuple(form for form in FORMS if "_" not in form[0])

# A name of a secret holds one of HINTS, which is looked for first: a pattern that begins with a choice of names is
# tried at every character.
HINTS = ("pass", "secret", "token", "key", "pwd", "kennwort")
FOLLOWED = re.compile(r"[a-z_-]{2,16}[\"'`]?\s{0,3}[:=]")
NAMES = (
    r"password|passwd|passphrase|passwort|kennwort|pwd|pass|secret|secret[_-]?key|client[_-]?secret|api[_-]?secret"
    r"|api[_ -]?key|access[_-]?key|auth[_-]?key|private[_-]?key|account[_-]?key|encryption[_-]?key|signing[_-]?key"
    r"|(?:access|auth|api|bearer|refresh|session|secret|bot)[_-]?token|token"
)
ASSIGNED = re.compile(
    rf"(?<![A-Za-z])(?:[A-Za-z0-9]{{1,20}}[_.-]){{0,3}}({NAMES})[\"'`]?\s{{0,3}}(=>|:=|[:=])\s{{0,3}}"
    r"(?:([\"'`])([^\"'`\s]{6,200})\3|([^\s\"'`,;)}\]<>&]{6,200}))",
    re.IGNORECASE,
)
BEARER = re.compile(r"(?<![A-Za-z])(?:bearer|basic)\s+([A-Za-z0-9._~+/-]{19,}[A-Za-z0-9_~+/-]={0,2})", re.IGNORECASE)
TOLD = re.compile(
    r"(?:password|passwort|passphrase|kennwort) (?:is|ist|lautet|was):? [\"'`]?([^\s\"'`]{4,100})", re.IGNORECASE
)
USER_INFO = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/:@\"'<>]{3,128})@")
# Values that only stand for a secret, are read from somewhere, or are the type of one.
PLACEHOLDERS = re.compile(
    r"[$<{%[(*]|#[0-9a-f]{6}\Z|(?:\*|x|\.|-|_){6,}\Z|(?:your|my|the|some|enter|insert|replace|change|example|sample|dummy|fake|test)[_-]"
    r"|change_?me|os\.|process\.|env[.\[(]|self\.|config|settings\.|args\.|get|\[?(?:key|redacted|hidden)\]?\Z"
    r"|(?:password|passwort|pass|passwd|pwd|secret|token|string|required|optional|none|null|true|false|str|undefined|hidden)\b",
    re.IGNORECASE,
)


def find(text: str) -> Iterator[tuple[int, int]]:
    """Places of secrets, in order. Of `password=…` and the like only the value is one."""
    forms = FORMS if "_" in text else WITHOUT_UNDERSCORE
    found = [span for literal, pattern in forms if literal in text for span in _of_form(pattern, text)]
    lower = text.lower()
    found += _named(text, lower if len(lower) == len(text) else text)  # İ becomes two characters
    if "earer" in text or "BEARER" in text:
        found += [match.span(1) for match in BEARER.finditer(text) if _mixed(match[1])]
    if "://" in text and "@" in text:
        found += [match.span(1) for match in USER_INFO.finditer(text) if not PLACEHOLDERS.match(match[1])]
    end = 0
    for start, stop in sorted(found, key=lambda span: (span[0], -span[1])):
        if start >= end:
            yield start, stop
            end = stop


def _of_form(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Matches that look drawn at random: a long name with hyphens (`sk-learn-…`) has no digits."""
    for match in pattern.finditer(text):
        if _mixed(match[0]):
            yield match.start(), match.end() - len(match[0]) + len(match[0].rstrip())


def _mixed(value: str) -> bool:
    return value.startswith("-----") or (any(map(str.isdigit, value)) and any(map(str.isalpha, value)))


def _named(text: str, lower: str) -> Iterator[tuple[int, int]]:
    """Values that are given to the names of secrets, by `=`, `:`, `is` and the like."""
    for hint in HINTS:
        at = lower.find(hint)
        while at >= 0:
            if FOLLOWED.match(lower, at) and (match := _around(text, at)):
                quoted = match[4] is not None
                start = match.start(4 if quoted else 5)
                value = match[4] or match[5].rstrip(".,?")
                if _is_secret(match[1].lower(), match[2], value, quoted=quoted):
                    yield start, start + len(value)
            elif (told := TOLD.match(text, at)) and _mixed(told[1]):
                yield told.start(1), told.start(1) + len(told[1].rstrip(".,?!)"))
            at = lower.find(hint, at + len(hint))


def _around(text: str, at: int) -> re.Match[str] | None:
    """The assignment whose name has the place `at` in it."""
    matches = ASSIGNED.finditer(text, max(0, at - 40), at + 260)
    return next((match for match in matches if match.start() <= at < match.end(1)), None)


def _is_secret(name: str, sign: str, value: str, *, quoted: bool) -> bool:
    """Whether a value that was given to a secret's name is a secret itself.

    `password: str`, `token=token`, `api_key = get_key()` and `password: at least 8 characters` are none.
    """
    if PLACEHOLDERS.match(value) or "(" in value or (not quoted and "[" in value) or value.lower().strip("_") == name:
        return False
    digits, letters = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    if not letters:  # 128256 is a token's number; a password may have digits alone
        return digits and name.startswith(("pass", "pwd", "kenn"))
    if not quoted and re.fullmatch(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+", value):
        return False  # a variable
    if digits or (not value.isascii() and sign == "="):
        return not re.fullmatch(r"[0-9.]+[a-z]{1,3}", value) and (quoted or not re.match(r"[a-z_]+\.[a-z_]+", value))
    # letters alone: a word in a sentence, or a variable
    odd = bool(re.search(r"[!#$%^&*?~+]", value.rstrip(".,!?")))
    return odd or (quoted and sign != ":" and not re.search("[-_.]", value))
