"""A synthetic set for `data/personal.py`: texts with personal data of each kind, and texts that only look like it.

Everything is drawn by a seeded generator; no number or address is taken from anywhere. The common set has the forms
that the patterns are made for,
and what is found beside them in files. The hard set has forms that are written seldom, or
can't be told by their form,
and texts that have the very form of something else. Both are ours: their shares say how the
patterns do on forms that we thought of, not on anybody's files.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from mlx_lora.data.personal import FINDERS, find

COUNT = 400
NAMES = (
    "ada",
    "björn",
    "chen.li",
    "d_okafor",
    "e-mail",
    "farah.x",
    "gil",
    "hanna.lee",
    "ivo99",
    "j.kowalski",
    "o'neil",
)
HOSTS = ("example", "mail.example", "post-amt", "tellmar", "uni-ost", "müller", "k8s.internal", "a1b2")
TLDS = ("com", "org", "net", "de", "co.uk", "io", "fr", "info", "museum", "cloud", "com.br", "ch", "dev", "xyz")
FRAMES = (
    "Please write to {} before Friday.",
    "{}",
    "My contact: {}, thank you!",
    "Is {} still right?",
    "(see {})",
    "first line\n{}\nlast line",
    '"{}"',
    "We used {}. Then we left.",
    "Kontakt – {} – ab 9 Uhr",
    "| a | {} | b |",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`value` is what is to be found in `text`; a hard negative has none."""

    kind: str
    text: str
    value: str | None


@dataclass(frozen=True)
class Score:
    """A positive counts when it is found from its first to its last character, a negative when anything is found."""

    positives: int
    negatives: int
    missed: list[Case]
    alarms: list[Case]

    @property
    def recall(self) -> float:
        return 1 - len(self.missed) / self.positives

    @property
    def false_alarms(self) -> float:
        return len(self.alarms) / self.negatives


def cases(seed: int = 0, count: int = COUNT, *, hard: bool = False) -> list[Case]:
    """`count` positives and as many negatives of each kind, in sentences."""
    made = []
    positives, negatives = (UNUSUAL, ALIKE) if hard else (POSITIVES, NEGATIVES)
    for kind in FINDERS:
        draw = random.Random(f"{seed} {kind}")
        for _ in range(count):
            value, text = positives[kind](draw), draw.choice(FRAMES)
            before, value = value if isinstance(value, tuple) else ("", value)
            made.append(Case(kind, text.format(before + value), value))
            made.append(Case(kind, draw.choice(FRAMES).format(negatives[kind](draw)), None))
    return made


def scores(seed: int = 0, count: int = COUNT, *, hard: bool = False) -> dict[str, Score]:
    """How the patterns do on a set, by kind."""
    found = {kind: Score(count, count, [], []) for kind in FINDERS}
    for case in cases(seed, count, hard=hard):
        spans = find(case.text)
        score = found[case.kind]
        if case.value is None:
            score.alarms.extend([case] if spans else [])
        elif (case.kind, case.value) not in [(span.kind, case.text[span.start : span.end]) for span in spans]:
            score.missed.append(case)
    return found


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def shaped(draw: random.Random, shape: str) -> str:
    """`shape` with each `?` drawn from 0-9 and each `N` from 2-9; anything else stays."""
    return "".join(
        draw.choice(string.digits) if c == "?" else draw.choice("23456789") if c == "N" else c for c in shape
    )


def letters(draw: random.Random, count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    drawn = "".join(draw.choices(alphabet, k=count - 2))
    return drawn + "a7" if "7" in alphabet and "a" in alphabet else drawn + draw.choice("ABC") + draw.choice("234")


# -- e-mail


def an_email(draw: random.Random) -> str:
    local = draw.choice(NAMES) + draw.choice(
        ("", "", "+news", str(draw.randint(1, 99)), "." + draw.choice("abc") + "x")
    )
    return f"{local}@{draw.choice(HOSTS)}.{draw.choice(TLDS)}"


def no_email(draw: random.Random) -> str:
    name, number = draw.choice(("ada", "core", "left_pad", "model")), draw.randint(1, 30)
    return draw.choice((
        f"@{name}", f"hello @{name} and @{name}{number}", f"{name}@{number}.{number}.0",
        f"icon@{draw.randint(2, 3)}x.png",
        f"@{name}.route('/x')", "q @ k.T", "x@self.weight", f"{name}@localhost", f"git@{name}.example.com:a/b.git",
        "3 apples @ 2.50 each", f"npm install {name}@^{number}.2", f"@{name}/core@{number}.0.1",
        "w@x.transpose(0, 1)",
        "user@[host]", "a@b", f"ssh://git@{name}.example.org/x", f"{name} at example dot com", "@media.screen",
        "logo@2x.js", f"{name}@.com",
    ))  # fmt: skip


# -- phone

INTERNATIONAL = (
    "+1 N??-N??-????", "+1 (N??) N??-????", "+1N??N??????", "+44 20 7??? ????", "+44 (0)20 7??? ????",
    "+447?????????",
    "+49 17? ???????", "+49 (0) 30 N?????", "+49-89-N?????", "+33 6 ?? ?? ?? ??", "+39 347 ??? ????",
    "+34 6?? ??? ???",
    "+91 9???? ?????", "+86 138 ???? ????", "+81 90-????-????", "+55 11 9????-????", "+41 44 N?? ?? ??",
    "+61 4?? ??? ???",
    "0049 17? ???????", "0044 20 7??? ????", "+31 6 ????????", "+46 70-??? ?? ??", "+48 50? ??? ???",
    "+353 87 ??? ????",
    "+7 916 ???-??-??", "+358.40N?????", "+90 53? ??? ?? ??", "+234 803 ??? ????", "+971 50 ??? ????",
    "(+49) 17? ???????",
)  # fmt: skip
NATIONAL = (
    "(N??) N??-????", "N??-N??-????", "N??.N??.????", "1-800-N??-????", "N?? N?? ????", "1 (N??) N??-????",
    "020 7??? ????", "077?? N?????", "0163N N?????", "(020) 7??? ????", "077??N?????", "030 N??????", "0170 N??????",
    "0170/N??????", "(089) N??????", "089/N???-??", "0151 1???????", "0151N???????", "02151 N?? ???",
    "06 N? ?? ?? ??",
    "06.N?.??.??.??", "06N???????", "06-N???????", "020-N??????", "04?? ??? ???", "(02) 9??? ????", "03-N???-????",
    "090-N???-????", "044 N?? ?? ??", "0664 N??????", "070-N?? ?? ??", "0470 N? ?? ??", "010-N???-????",
    "053? N?? ?? ??",
    "9???? N????", "138 ???? ????", "(11) 9????-????", "347 N?? ????", "912 ?? ?? ??", "8 (495) ???-??-??",
    "0170 - N??????", "089 / N??????", "0170 N?? ?? ??",
)  # fmt: skip
LABELS = (
    "Tel.: ",
    "phone: ",
    "Mobile ",
    "fax: ",
    "WhatsApp ",
    "Telefon ",
    "call me at ",
    '"phone": ',
    "cell: ",
    "Tel ",
)
BARE = ("N??N??????", "N??????", "6?? ??? ???", "17????????", "N? ?? ?? ??", "N??-????", "55 ???? ????")


def a_phone(draw: random.Random) -> str | tuple[str, str]:
    sort = draw.random()
    if sort < 0.4:
        return shaped(draw, draw.choice(INTERNATIONAL))
    if sort < 0.85:
        return shaped(draw, draw.choice(NATIONAL))
    return draw.choice(LABELS), shaped(draw, draw.choice(BARE))


def no_phone(draw: random.Random) -> str:
    day, month, year = draw.randint(1, 27), draw.randint(1, 12), draw.randint(1950, 2030)
    date = draw.choice((
        f"{day:02}.{month:02}.{year}", f"{year}-{month:02}-{day:02}", f"{month:02}/{day:02}/{year}",
        f"{year}-{month:02}-{day:02} 10:30:00", f"{day:02}.{month:02}.{year} 08:15", f"{year}{month:02}{day:02}",
        f"{day:02}.{month:02}.{year}-{day + 1:02}.{month:02}.{year}", f"{day:02}-{month:02}-{year} 14",
        f"{day}.{month}.{year} - {day + 1}.{month}.{year}", "09.30-17.45", f"{year}-{month:02}-{day:02}T00:00:00",
    ))  # fmt: skip
    return date if draw.random() < 0.2 else shaped(draw, draw.choice(NO_PHONES))


NO_PHONES = (
    "192.168.1.?", "10?.10?.N0.??", "10.0.19045.N???", "N.??.???", "0.????????", "N??????.??", "52.N???????",
    "3.14159N???",
    "order N??-N??-????", "order no. 0170 N??????", "Bestellnummer 0151 1???????", "Invoice #020 1??? ????",
    "#??????????",
    "INV-020-7???-????", "N?????????", "N???????", "1??????????", "N ??? ???", "N?? ??? ??? people", "N,???,???.??",
    "$N?? ??? ???", "ISBN 978-3-16-1N???0-0", "ISBN 0-306-40N?5-0", "SSN N??-1?-1???", "ref=N??????????",
    "0x00N?????N?",
    "a1b2c3e4-00N0-4???-8???-1234567890ab", "1N 1N 1N 1N 1N 1N 1N", "1?? 2?? 3?? 4?? 5?? 6??", "17N??????????",
    "https://example.com/items/N?????????", "v0.1N.0-????????", "tracking 01?? 1??? ????", "0.N??? 0.N??? 0.N???",
    "batch 0123-1????", "???????0-????-N???", "1+4917?N??????", "+0.N????????", "pages 1???-1???, 2???-2???",
    "epoch 1N 0.N?????", "2???? 3???? 4????", "N.N??????e-05", "N?????? rows", "ticket 0800-N??????",
    "account 020 7??? ????",
    "N???????? bytes", "0.0?? 0.1?? 0.2??", "1????????????", "12:34:56.??????", "-0.????????", "0001??????",
    "N?? N?? N??",
    "Boston, MA 02110-????", "0x00?? -- 010? 000?", "U+0621 0652",
    "Clause 25N.2N7-70??", "+2147483647", "20N.76N 989?",
    "2001:db8:0:0:1:0:????:N???", "lat 5N.??????, 1N.??????", "N??.???.???",
)  # fmt: skip


# -- card


def luhn_digit(body: str) -> str:
    """The digit that makes a number's Luhn sum a multiple of ten; written apart from what is tested."""
    total = 0
    for index, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if index % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


NETWORKS = (
    ("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("2720", 16), ("34", 15), ("37", 15), ("36", 14), ("305", 14),
    ("6011", 16), ("65", 16), ("3528", 16), ("62", 16), ("62", 19), ("2202", 16), ("6759", 16), ("4", 19),
)  # fmt: skip
GROUPS = {14: (4, 6, 4), 15: (4, 6, 5), 16: (4, 4, 4, 4), 19: (4, 4, 4, 4, 3)}


def grouped(number: str, groups: tuple[int, ...], separator: str) -> str:
    parts, start = [], 0
    for size in groups:
        parts.append(number[start : start + size])
        start += size
    return separator.join(parts)


def a_card(draw: random.Random) -> str:
    prefix, length = draw.choice(NETWORKS)
    body = prefix + digits(draw, length - 1 - len(prefix))
    number = body + luhn_digit(body)
    return grouped(number, GROUPS[length], draw.choice(("", " ", "-", "\u00a0")))


def no_card(draw: random.Random) -> str:
    prefix, length = draw.choice(NETWORKS)
    body = prefix + digits(draw, length - 1 - len(prefix))
    right = luhn_digit(body)
    wrong = body + str((int(right) + draw.randint(1, 9)) % 10)
    return draw.choice((
        grouped(wrong, GROUPS[length], draw.choice(("", " ", "-"))), f"0.{body}{right}", f"17{digits(draw, 11)}",
        f"17{digits(draw, 14)}", f"{body}{right}{digits(draw, 5)}", f"x{body}{right}", f"1{digits(draw, 18)}",
        f"{body[:5]} {body[5:]}{right}", f"978{digits(draw, 10)}", f"40{digits(draw, 11)}", "0000 0000 0000 0000",
        f"order_{body}{right}", f"9{digits(draw, 15)}", "4444444444444444", f"{body[:7]}, {body[7:]}{right}",
    ))  # fmt: skip


# -- IBAN: the account parts of some countries, n for digits, a for letters

ACCOUNTS = {
    "DE": "n" * 18, "GB": "aaaa" + "n" * 14, "FR": "n" * 23, "NL": "aaaa" + "n" * 10, "ES": "n" * 20,
    "IT": "a" + "n" * 22,
    "AT": "n" * 16, "CH": "n" * 17, "BE": "n" * 12, "PL": "n" * 24, "NO": "n" * 11, "MT": "aaaa" + "n" * 23,
    "SE": "n" * 20,
    "IE": "aaaa" + "n" * 14, "TR": "n" * 22, "SA": "n" * 20, "LU": "n" * 16, "DK": "n" * 14, "CZ": "n" * 20,
    "PT": "n" * 21,
}  # fmt: skip


def iban_of(draw: random.Random) -> tuple[str, str, str]:
    """(country, right check digits, account)"""
    country, shape = draw.choice(list(ACCOUNTS.items()))
    account = "".join(draw.choice(string.digits if c == "n" else string.ascii_uppercase) for c in shape)
    remainder = 0
    for character in account + country + "00":
        value = int(character) if character.isdigit() else ord(character) - 55
        remainder = (remainder * (100 if value > 9 else 10) + value) % 97
    return country, f"{98 - remainder:02}", account


def written(draw: random.Random, iban: str) -> str:
    form = draw.random()
    if form < 0.4:
        return iban
    if form < 0.9:
        return " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))
    return iban.lower() if form < 0.95 else "-".join(iban[i : i + 4] for i in range(0, len(iban), 4))


def an_iban(draw: random.Random) -> str:
    return written(draw, "".join(iban_of(draw)))


def no_iban(draw: random.Random) -> str:
    country, check, account = iban_of(draw)
    other = f"{(int(check) - 2 + draw.randint(1, 96)) % 97 + 2:02}"
    return draw.choice((
        written(draw, country + other + account), f"QQ{check}{account}", country + check + account[:-1],
        f"X{country}{check}{account}",
        country + check + account + "AB1", f"{country} {draw.randint(10, 99)} Berlin",
        f"AB12CD{draw.randint(10, 99)} EF",
        f"SE{draw.randint(10, 99)} is a part", f"{country}{check}_{account}",
        f"MK{digits(draw, 2)} {digits(draw, 3)}",
    ))  # fmt: skip


# -- keys


def a_key(draw: random.Random) -> str | tuple[str, str]:
    hexadecimal, upper = "0123456789abcdef", string.ascii_uppercase + string.digits
    part = base64.urlsafe_b64encode(f'{{"sub":"{digits(draw, 9)}"}}'.encode()).decode().rstrip("=")
    pem = "\n".join(letters(draw, 64) for _ in range(4))
    secret = letters(draw, draw.randint(8, 20))
    return draw.choice((
        f"sk-{letters(draw, 48)}", f"sk-proj-{letters(draw, 60)}", f"sk-ant-api03-{letters(draw, 80)}",
        f"ghp_{letters(draw, 36)}",
        f"github_pat_{letters(draw, 22)}_{letters(draw, 59)}", f"glpat-{letters(draw, 20)}",
        f"AKIA{letters(draw, 16, upper)}",
        f"xoxb-{digits(draw, 11)}-{letters(draw, 24)}", f"AIza{letters(draw, 35)}", f"hf_{letters(draw, 34)}",
        f"sk_live_{letters(draw, 24)}", f"npm_{letters(draw, 36)}", f"SG.{letters(draw, 22)}.{letters(draw, 43)}",
        f"eyJhbGciOiJIUzI1NiJ9.{part}.{letters(draw, 43)}", f"dop_v1_{letters(draw, 64, hexadecimal)}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{pem}\n-----END RSA PRIVATE KEY-----", f"gho_{letters(draw, 36)}",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{pem}\n-----END OPENSSH PRIVATE KEY-----", f"gsk_{letters(draw, 52)}",
        ("password=", secret), ("DB_PASSWORD=", secret), ("api_key: ", letters(draw, 32)),
        ("client_secret = ", letters(draw, 24)),
        ("Password: ", f"{letters(draw, 8)}!"), ("auth_token=", letters(draw, 30)),
        ("aws_secret_access_key = ", letters(draw, 40)),
        ("Authorization: Bearer ", letters(draw, 40)), ("passwort: ", secret), ("pwd=", secret),
        ("secret: ", letters(draw, 16)),
        ("password=", "correct!horse"), ("API-Key: ", letters(draw, 32)),
    ))  # fmt: skip


def no_key(draw: random.Random) -> str:
    number = draw.randint(2, 60000)
    return draw.choice((
        "pip install sk-learn-contrib-extra-tools", "the task-oriented-long-hyphenated-name-here",
        "password: required",
        "password=os.environ['DB']", "token = get_token()", "password: str", "secret: bool = False",
        "password = None",
        "Password: ********", "password=<your password>", "api_key=$API_KEY", "password: at least 8 characters",
        f"max_tokens={number}", f"eos_token: {number * 7}", "api_key: string", "the secret: nobody knew",
        "the key: practice",
        "a bearer of bad news", "Bearer authentication is needed", "token={{ secrets.TOKEN }}",
        "keyboard: mechanical",
        "xoxo-hugs-and-kisses", "ghp_short", "AKIARA", f"eyJ{number}", "password=password", "token=token",
        "passenger: 12B45678",
        f"commit {letters(draw, 40, '0123456789abcdef')}", f"sha256:{letters(draw, 64, '0123456789abcdef')}",
        "primary_key=user_identifier", "-----BEGIN PUBLIC KEY-----\nMFww\n-----END PUBLIC KEY-----",
        "secret_name=my-secret-name", "password=your_password_1", "Your password: it must be changed",
        "token: <|im_end|>",
        "https://example.com:8080/a@b", "the token: str | None", "password = config.db.pass1",
        "api_key = settings.API_KEY_2",
        "key: valuable", "secret=changeme", "basic: understanding", "basic internationalization",
        "https://user:pass@host:80",
        "password=info[2]", "Token: '#ddd0c0'", "access_key, secret_key = s3_connection",
        'ACCESS_TOKEN = "X-Access-Token"',
        "-----BEGIN CERTIFICATE-----", f"token {number} of the vocabulary", "password policy: 12 letters",
        "AKIA is a Georgian name",
    ))  # fmt: skip


POSITIVES: dict[str, Callable[[random.Random], str | tuple[str, str]]] = {
    "key": a_key, "email": an_email, "iban": an_iban, "card": a_card, "phone": a_phone,
}  # fmt: skip
NEGATIVES: dict[str, Callable[[random.Random], str]] = {
    "key": no_key, "email": no_email, "iban": no_iban, "card": no_card, "phone": no_phone,
}  # fmt: skip


# -- forms that are found seldom or never, and those that are taken for what they only resemble


def an_unusual_key(draw: random.Random) -> tuple[str, str]:
    return draw.choice((
        ("my password is ", letters(draw, 10)), ("the pin: ", digits(draw, 4)), ("PW ", letters(draw, 12)),
        ("token: ", "correcthorsebattery"), ("", letters(draw, 32, "0123456789abcdef")), ("password=", "hunter"),
    ))  # fmt: skip


def an_unusual_email(draw: random.Random) -> str:
    name = draw.choice(("ada", "chen", "gil"))
    return draw.choice((
        f"{name} at example dot com", f"{name}[at]example.org", f"{name}@example.plumbing", f'"{name} b"@example.com',
        f"{name}@[192.0.2.{draw.randint(1, 9)}]", f"{name}@example.ninja", f"{name}@EXAMPLE.COM",
        f"{name}@mail.example.co.jp",
    ))  # fmt: skip


def an_unusual_iban(draw: random.Random) -> str:
    country, check, account = iban_of(draw)
    return draw.choice((
        f"{country} {check} {account}", f"{country}{check}\n{account}", f"{country}{check}  {account}",
        f"{country.lower()}{check} {account.lower()}", f"{country}{check}/{account}",
    ))  # fmt: skip


def an_unusual_card(draw: random.Random) -> str:
    number = "".join(filter(str.isdigit, a_card(draw)))
    return draw.choice((
        f"{number[:6]} {number[6:]}", " ".join(number), f"{number[:8]} {number[8:]}", f"{number[:4]}  {number[4:]}",
        grouped(number, (4, 4, 4, len(number) - 12), "."),
    ))  # fmt: skip


def an_unusual_phone(draw: random.Random) -> str:
    return shaped(draw, draw.choice((
        "6?? ??? ???", "N? ?? ?? ??", "N??-????", "N??N??????", "+49 (0)17?/??-??-???", "0 17? ??? ?? ??",
        "17? ???????",
        "9? ??? ?? ??", "+1 N??N??-????", "(0)20 7??? ????", "030/N???-?",
    )))  # fmt: skip


def like_a_key(draw: random.Random) -> str:
    return draw.choice((
        f"password={draw.choice(('form', 'user'))}1.value", f"token = tokens{draw.randint(10, 99)}",
        "secret='v2-default'",
        f"api_key: see page {draw.randint(10, 99)}", f"password: {draw.randint(8, 12)}-64 letters",
        "token: B-PER1234",
    ))  # fmt: skip


def like_an_email(draw: random.Random) -> str:
    return draw.choice((
        f"<{digits(draw, 8)}.1@mail.example.com>", "https://user@example.com/x", "build@v2.io", "x@y.if",
        "cell@row.no",
        "me@here.please",
    ))  # fmt: skip


def like_an_iban(draw: random.Random) -> str:
    country, _, account = iban_of(draw)
    return country + digits(draw, 2) + account


def like_a_card(draw: random.Random) -> str:
    return f"{draw.choice('45')}{digits(draw, 15)}"


def like_a_phone(draw: random.Random) -> str:
    return shaped(draw, draw.choice((
        "part N??-N??-????", "lot 0N?-N??-???", "row N?? N?? ????", "model N??.N??.????", "room 0N?? N?? ??",
        "set 13? 1??? 2???",
        "scores 98??? 97???", "0N N? N? N? N?", "size N?? ?? ?? ??", "figure +N? ??? ??? ??",
    )))  # fmt: skip


UNUSUAL: dict[str, Callable[[random.Random], str | tuple[str, str]]] = {
    "key": an_unusual_key, "email": an_unusual_email, "iban": an_unusual_iban, "card": an_unusual_card,
    "phone": an_unusual_phone,
}  # fmt: skip
ALIKE: dict[str, Callable[[random.Random], str]] = {
    "key": like_a_key, "email": like_an_email, "iban": like_an_iban, "card": like_a_card, "phone": like_a_phone,
}  # fmt: skip
