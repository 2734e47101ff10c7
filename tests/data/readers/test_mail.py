"""Mail: only what its writer wrote, in the order of its thread."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import read
from mlx_lora.data.readers.letters import Letter, own_text
from tests.data.readers.made import mail, mbox

QUOTED = "Yes, at six.\n\n{}\n> Are you coming?\n> Ana\n"


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (QUOTED.format("On Mon, 6 Jan 2025 at 10:00, Ana <ana@x.org> wrote:"), "Yes, at six."),
        (QUOTED.format("On Mon, 6 Jan 2025 at 10:00, Ana\n<ana@x.org> wrote:"), "Yes, at six."),
        (QUOTED.format("Am 06.01.2025 um 10:00 schrieb Ana:"), "Yes, at six."),
        (QUOTED.format("Le lun. 6 janv. 2025 à 10:00, Ana a écrit :"), "Yes, at six."),
        ("Yes.\n\n-----Original Message-----\nFrom: Ana\nAre you coming?\n", "Yes."),
        (
            "Yes.\n\n________________________________\nFrom: Ana <a@x>\nSent: Monday\nTo: Ben\nSubject: x\n\nCome?",
            "Yes.",
        ),
        ("Ja.\n\nVon: Ana <a@x>\nGesendet: Montag\nAn: Ben\n\nKommst du?", "Ja."),
        ("> Are you coming?\n\nYes.\n\n> When?\n\nAt six.\n", "Yes.\n\nAt six."),
        ("Yes.\n-- \nBen\nphone 1\n", "Yes."),
        ("Yes.\n\nSent from my iPhone\n", "Yes."),
        (">From here it is far.\n", "From here it is far."),
        ("On Monday I read what Ana wrote:\nit was good.\n", "On Monday I read what Ana wrote:\nit was good."),
        ("a\n\n\n\n\nb\r\n", "a\n\nb"),
        ("> only quoted\n", ""),
    ],
)
def test_quotes_and_signatures_are_no_words_of_the_writer(text: str, own: str) -> None:
    assert own_text(text) == own


def test_a_mail_of_many_parts() -> None:
    message = EmailMessage()
    message["From"] = "Zoë Test <Zoe@X.org>"
    message["Subject"] = "AW: Re: Grüße"
    message.set_content("plain words\n", cte="quoted-printable")
    message.add_alternative("<p>html words</p>", subtype="html")
    message.add_attachment("attached words", filename="a.txt")
    letter = Letter(message.as_bytes())
    assert (letter.name, letter.address, letter.subject) == ("Zoë Test", "zoe@x.org", ("grüße", True))
    assert letter.text == "plain words"


def test_a_mail_of_html_alone() -> None:
    message = EmailMessage()
    message.set_content("<p>Yes,<br>at six.</p><blockquote>Are you coming?</blockquote>", subtype="html")
    assert Letter(message.as_bytes()).text == "Yes,\nat six."


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\n\n\xff", b"From: =?nope?q?=ff?= <a@x>\nDate: never\n\nx", b"Content-Type: multipart/mixed\n\nx",
     b"Content-Type: text/plain; charset=nope\n\n\xe9"],
)  # fmt: skip
def test_broken_mails_are_read_as_far_as_they_go(content: bytes) -> None:
    letter = Letter(content)
    assert isinstance(letter.text, str) and letter.address and letter.time == 0.0 and letter.own_id is None


def test_threads_follow_references_then_subjects_in_order_of_time(tmp_path: Path) -> None:
    ana, ben, cem = "Ana <ana@x.org>", "Ben <ben@x.org>", "Cem <cem@x.org>"
    mails = [
        mail(ben, "I can.", "Re: walk", 12, "3", "1"),  # before what it answers
        mail(ana, "Who can walk?", "walk", 9, "1"),
        mail(cem, "Not I.", "other words", 10, "2", "1"),
        mail(ana, "Lunch?", "lunch", 1, "4"),
        mail(ben, "Gladly.", "Re: lunch", 2, "5"),  # no reference
        mail(ana, "Lunch again?", "lunch", 20, "6"),  # the same subject, and no reply
        mail(ben, "To myself.", "notes", 3, "7"),
    ]
    file = tmp_path / "all.mbox"
    mbox(*mails)(file)
    source = read(file, Data(me="ben"))
    assert source.problems == []
    assert [[message["content"] for message in example.messages] for example in source.examples] == [
        ["Lunch?", "Gladly."],
        ["Ana: Who can walk?\nCem: Not I.", "I can."],
    ]
    assert source.lines == [4, 2]


def test_what_is_no_mailbox(tmp_path: Path) -> None:
    file = tmp_path / "x.mbox"
    for content, said in ((b"", "is empty"), (b"hello\n", "is not a mailbox")):
        file.write_bytes(content)
        (problem,) = read(file, Data(me="ben")).problems
        assert said in problem.problem
