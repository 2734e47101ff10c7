"""The gate of exports: what it counts as kept, and that its divergence is that of whole distributions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.errors import CannotFuse, NotFinite
from mlx_lora.interop.gate import (
    TopTokens,
    check,
    divergence,
    most_likely,
    prompts,
    questions,
    refuse_lost,
    top_tokens,
)
from mlx_lora.measure import rows_of_tokens
from tests.adapters.zoo import network

VOCABULARY, POSITIONS = 400, 48
draw = np.random.default_rng(0)
BASE = 3 * draw.standard_normal((POSITIONS, VOCABULARY))
EFFECT = draw.standard_normal((POSITIONS, VOCABULARY))
NOISE = draw.standard_normal((POSITIONS, VOCABULARY))


def listed(logits: np.ndarray, count: int = VOCABULARY) -> TopTokens:
    return most_likely(logits, count=count)


def kept(artefact: np.ndarray, strength: float = 1.0) -> float:
    live = listed(BASE + strength * EFFECT, 100)
    return check("a program", live, listed(BASE), listed(artefact)).kept


def test_the_divergence_is_that_of_the_whole_distributions_where_all_tokens_are_listed() -> None:
    def softmax(row: np.ndarray) -> np.ndarray:
        return np.exp(row - row.max()) / np.exp(row - row.max()).sum()

    for before, after in zip(BASE, BASE + EFFECT, strict=True):
        p, q = softmax(before), softmax(after)
        (one,), (other,) = listed(before[None]), listed(after[None])
        assert divergence(one, other, most=VOCABULARY) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6)
        (top,) = listed(before[None], 100)  # the rest as one token says no more than the whole does
        assert 0 <= divergence(top, other) <= (p * np.log(p / q)).sum() + 1e-9
        assert divergence(one, one) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_kept_is_the_share_of_the_effect_that_is_there(share: float) -> None:
    assert kept(BASE + share * EFFECT) == pytest.approx(share, abs=1e-6)


def test_tokens_that_only_one_side_lists_count_as_the_rest() -> None:
    """A base lists more tokens than another program tells: what isn't told must not pass for nearly impossible."""
    before, after = BASE[:1], BASE[:1] + 0.1 * NOISE[:1]
    (whole,), (told,) = listed(before), listed(after, 50)
    (all_told,) = listed(after)
    assert 0 < divergence(whole, told) < 2 * divergence(whole, all_told) < 0.05
    (apart,) = listed(-BASE[:1], 50)
    assert divergence(whole, apart) > 1


def test_noise_that_has_nothing_to_do_with_the_adapter_leaves_it_kept() -> None:
    """Quantizing moves the base further than a short training does, and the adapter is in it all the same."""
    live = listed(BASE + 0.3 * EFFECT, 100)
    checked = check("a program", live, listed(BASE), listed(BASE + 0.3 * EFFECT + 0.5 * NOISE))
    assert checked.kl > checked.adapter_kl and checked.kept == pytest.approx(1.0, abs=0.35) and not checked.lost
    gone = check("a program", live, listed(BASE), listed(BASE + 0.5 * NOISE))
    assert gone.kept == pytest.approx(0.0, abs=0.35) and gone.lost


def test_a_weak_adapter_in_a_coarse_format_is_measured_beside_that_format_alone() -> None:
    """Requantizing moves far more than the adapter did: beside the base, nothing is sure; beside the format, all is."""
    live, noisy = listed(BASE + 0.05 * EFFECT, 100), BASE + 0.8 * NOISE
    beside_base = check("llama.cpp", live, listed(BASE), listed(noisy + 0.05 * EFFECT))
    assert beside_base.kept_error > 0.5 and not beside_base.lost
    beside_format = check("llama.cpp", live, listed(BASE), listed(noisy + 0.05 * EFFECT), plain=listed(noisy))
    assert beside_format.kept == pytest.approx(1, abs=0.02) and beside_format.kept_error < 0.02
    assert check("llama.cpp", live, listed(BASE), listed(noisy), plain=listed(noisy)).lost


def test_text_without_positions_is_refused() -> None:
    with pytest.raises(CannotFuse, match="no text to compare"):
        check("llama.cpp", [], [], [])


def test_an_artefact_without_the_adapter_is_refused_with_its_figures() -> None:
    checked = check(
        "llama.cpp", listed(BASE + EFFECT, 100), listed(BASE), listed(BASE + NOISE), plain=listed(BASE + NOISE)
    )
    assert checked.quantization_kl is not None and checked.quantization_kl > 0.1
    with pytest.raises(CannotFuse, match="llama.cpp says that 0% of the adapter's effect"):
        refuse_lost(checked)
    refuse_lost(check("llama.cpp", listed(BASE + EFFECT, 100), listed(BASE), listed(BASE + EFFECT)))


@pytest.mark.parametrize("times", [3.0, 10.0])
def test_an_adapter_that_is_there_too_strongly_is_refused(times: float) -> None:
    """A wrong alpha in a converter."""
    checked = check("llama.cpp", listed(BASE + EFFECT, 100), listed(BASE), listed(BASE + times * EFFECT))
    with pytest.raises(CannotFuse, match=f"{times:.0%} of the adapter's effect"):
        refuse_lost(checked)
    refuse_lost(checked, force=True)


def test_a_model_that_says_other_things_altogether_is_refused_though_nothing_is_sure_of_the_adapter() -> None:
    live, damaged = listed(BASE + 0.3 * EFFECT, 100), listed(3 * NOISE)
    checked = check("llama.cpp", live, listed(BASE), damaged)
    assert checked.kl > 1 and checked.kept_error > 1 and checked.lost


def test_numbers_that_are_none_are_refused_whatever_is_forced() -> None:
    checked = check("llama.cpp", listed(BASE + EFFECT, 100), listed(BASE), listed(BASE * np.nan))
    with pytest.raises(NotFinite, match="isn't finite"):
        refuse_lost(checked, force=True)


def test_an_adapter_without_any_effect_is_not_called_lost() -> None:
    assert not check("a program", listed(BASE, 100), listed(BASE), listed(BASE + NOISE)).lost


def test_positions_are_spread_over_the_rows_and_asked_of_the_tokens_before_them() -> None:
    rows = rows_of_tokens([list(range(3, 30)), list(range(40, 90))])
    asked = questions(rows, most=16)
    assert sum(len(each.positions) for each in asked) == 16
    assert asked[0].positions[0] == 1 and asked[1].positions[-1] == 49
    assert prompts(asked)[0] == [3] and prompts(asked)[-1] == list(range(40, 89))


def test_a_model_says_at_each_position_what_it_says_after_the_prompt() -> None:
    model = network("llama")
    asked = questions(rows_of_tokens([list(range(3, 30)), list(range(40, 60))]), most=9)
    for found, prompt in zip(top_tokens(model, asked, count=5), prompts(asked), strict=True):
        logits = np.array(model(mx.array([prompt]))[0, -1])
        expected = most_likely(logits[None], count=5)[0]
        assert found.keys() == expected.keys()
        assert all(found[token] == pytest.approx(expected[token], abs=1e-4) for token in found)
