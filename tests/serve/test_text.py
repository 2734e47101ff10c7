"""Tokens become text in pieces; stop strings and halves of characters are held back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.requests import Token
from mlx_lora.serve.text import TextStream


def pieces_of(tokenizer: Any, text: str, *stops: str) -> tuple[list[str], TextStream]:
    """The pieces of a text that comes a token at a time."""
    stream = TextStream(tokenizer, stops)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = [*(stream.push(Token(token)) for token in tokens), stream.finish()]
    return [piece.text for piece in found if piece is not None], stream


def test_the_pieces_are_the_text(tokenizer: Any) -> None:
    pieces, stream = pieces_of(tokenizer, "naïve 日本 text 🙂!")
    assert "".join(pieces) == "naïve 日本 text 🙂!"
    assert len(pieces) > 5 and stream.stopped is None


def test_a_stop_string_ends_the_text_before_it_wherever_it_begins(tokenizer: Any) -> None:
    pieces, stream = pieces_of(tokenizer, "one two END three", "END", "three")
    assert ("".join(pieces), stream.stopped) == ("one two ", "END")
    pieces, stream = pieces_of(tokenizer, "END", "END")
    assert ("".join(pieces), stream.stopped) == ("", "END")


def test_of_two_that_begin_together_the_longer_counts(tokenizer: Any) -> None:
    _, stream = pieces_of(tokenizer, "a||b", "||", "||b")
    assert stream.stopped == "||"  # it is complete a token earlier


def test_what_only_looked_like_a_stop_string_is_given(tokenizer: Any) -> None:
    pieces, stream = pieces_of(tokenizer, "EN route, EEND", "ENDING")
    assert ("".join(pieces), stream.stopped) == ("EN route, EEND", None)
    assert "E" not in pieces[:1]  # it was held back until the next letters came


def test_half_a_character_waits_for_its_other_half(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    first, *rest = tokenizer.encode("é", add_special_tokens=False)
    assert stream.push(Token(first)) is None or not rest
    assert [stream.push(Token(token)) for token in rest][-1].text == "é"  # type: ignore[union-attr]


def test_every_token_is_given_once_with_the_text_that_it_completes(tokenizer: Any) -> None:
    tokens = [Token(token) for token in tokenizer.encode("abcXYabc", add_special_tokens=False)]
    stream = TextStream(tokenizer, ["XYZ"])
    given = [piece for piece in [*(stream.push(token) for token in tokens), stream.finish()] if piece]
    assert [token for piece in given for token in piece.tokens] == tokens
    assert {piece.text: len(piece.tokens) for piece in given}["XYa"] == 3


@pytest.mark.parametrize("seed", range(20))
def test_the_text_is_cut_where_the_first_stop_string_is(tokenizer: Any, seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab", k=40))
    stops = ["".join(draw.choices("ab", k=draw.randint(2, 6))) for _ in range(2)]
    pieces, stream = pieces_of(tokenizer, text, *stops)
    # the stop string that is complete first, and of those that are complete together the one that begins first
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == expected
    assert (stream.stopped is None) == (not ends)


def test_an_empty_stop_string_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MlxLoraError, match="empty"):
        TextStream(tokenizer, [""])
