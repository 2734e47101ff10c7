"""Measures of what an adapter gives away: each against an independent computation, intervals against simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_lora.config import Data
from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.study import leaks
from mlx_lora.study.evaluate import questions
from mlx_lora.study.leak_report import ANSWERS, RESTS, Extraction, Leaks, Losses, Planted, by_chance
from mlx_lora.study.leaks import Membership, Share
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

END = 99


def row(tokens: list[int], learned: int) -> Row:
    return leaks.as_row(tokens, [0.0] * learned + [1.0] * (len(tokens) - learned))


def test_an_answer_is_asked_for_by_its_prompt_and_wanted_up_to_its_end() -> None:
    rows = [row([1, 2, 3, 7, 8, END], 3), row([1, 2, 4, *range(100, 190), END], 3), row([1, 5, 6, END], 1)]
    first, long = leaks.answers_asked(rows, {END})  # the third is plain text: it has no prompt
    assert (first.number, first.given, first.wanted) == (0, (1, 2, 3), (7, 8))
    assert long.wanted == tuple(range(100, 100 + leaks.MOST))


def test_the_rest_of_a_row_is_asked_for_by_what_is_its_own() -> None:
    rows = [row([1, 2, 3, 10, 11, 12, 13, 14, END], 5), row([1, 2, 3, 20, 21, 22, END], 5), row([1, 2, 3, END], 2)]
    found = leaks.rests_asked(rows, {END}, given=2)
    assert [one.number for one in found] == [0, 1]  # nothing of the third is its own
    assert found[0].given == (1, 2, 3, 10, 11) and found[0].wanted == (12, 13, 14)
    assert found[1].given == (1, 2, 3, 20) and found[1].wanted == (21, 22)  # half of three tokens


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 9, 31).astype(float), draw.integers(2, 12, 17).astype(float)
    pairs = [(member < other) + (member == other) / 2 for member in members for other in others]
    assert leaks.membership(members, others).auc == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(("distance", "most"), [(0.0, 0.97), (1.0, 0.97), (2.5, 0.99)])
def test_the_interval_of_auc_covers(distance: float, most: float) -> None:
    """1,000 draws of normal losses; the true AUC is Φ(distance / √2). It is too wide near 1, never too narrow."""
    draw = np.random.default_rng(1)
    true = 0.5 * (1 + math.erf(distance / 2))
    held = 0
    for _ in range(1000):
        found = leaks.membership(draw.normal(size=60), draw.normal(distance, size=40))
        held += found.interval[0] <= true <= found.interval[1]
    assert 0.93 <= held / 1000 <= most, held


def test_the_interval_of_auc_has_a_width_where_all_pairs_are_in_order() -> None:
    found = leaks.membership(np.arange(10.0), np.arange(20.0, 30.0))
    assert found.auc == 1.0 and 0.6 < found.interval[0] < 0.95 and found.interval[1] == 1.0


def test_shares_have_the_published_intervals() -> None:
    """Newcombe 1998 (Statistics in Medicine 17): 81 of 263 in table I, 56/70 against 48/80 in table II."""
    assert leaks.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    difference, (low, high) = leaks.more_often(Share(56, 70), Share(48, 80))
    assert difference == pytest.approx(0.2) and (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_exposure_is_the_rank_among_secrets_in_bits() -> None:
    others = np.arange(1.0, 256.0)
    assert leaks.exposure(0.5, others) == 8.0
    assert leaks.exposure(300.0, others) == 0.0
    assert leaks.exposure(3.5, others) == pytest.approx(8 - math.log2(4))
    assert leaks.exposure(1.0, np.ones(255)) == pytest.approx(8 - math.log2(128.5))  # a model that knows nothing


def test_the_loss_of_each_row_is_that_of_the_row_alone(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    file = write_rows([{"prompt": "x" * size, "completion": "yes" * (1 + size % 4)} for size in range(1, 40)])
    rows = questions(str(file), Data(), tiny.tokenizer, exact=False).rows
    found = leaks.row_losses(Engine(tiny), None, rows)
    loss = Loss(take_apart(tiny.model))
    alone = [loss(as_arrays(collate([one]))).item() / one.trained for one in rows]
    assert found == pytest.approx(alone, rel=1e-4)


def test_a_row_comes_back_where_greedy_generation_goes_on_as_it_does(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    said = list(engine.stream([5, 6, 7], max_tokens=6))
    right = leaks.Beginning(0, (5, 6, 7), tuple(said))
    wrong = leaks.Beginning(1, (5, 6, 7), (*said[:-1], (said[-1] + 1) % 200))
    assert leaks.given_back(engine, None, [right, wrong]).tolist() == [True, False]


def test_chance_is_that_of_a_binomial() -> None:
    draw = np.random.default_rng(2)
    for count, chance in ((12, 1 / 256), (12, 1 / 16), (40, 0.1)):
        drawn = draw.binomial(count, chance, 100_000)
        least = by_chance(count, chance)
        assert (drawn > least).mean() <= 0.052 and (least == 0 or (drawn > least - 1).mean() > 0.05)


NO = Membership(0.5, (0.4, 0.6), 50, 50)


def audit(**changes: object) -> Leaks:
    losses = Losses(1.0, 0.5, 1.0, 0.6, NO, NO, NO)
    extraction = [Extraction(ANSWERS, Share(0, 50), Share(20, 50), Share(0, 50), Share(18, 50))]
    values = {
        "adapter": "mine", "file": "train.jsonl", "sha256": "", "rows": 50, "held_out_file": "test.jsonl", "others": 50,
        "given": 8, "extraction": extraction, "losses": losses, "canaries": [], "candidates": 256,
    }  # fmt: skip
    return Leaks(**(values | changes))  # type: ignore[arg-type]


def test_the_sentence_says_what_was_found() -> None:
    assert audit().verdict == "none_seen" and "20 of 50 answers" in audit().sentence
    more = [Extraction(RESTS, Share(0, 50), Share(20, 50), Share(0, 50), Share(0, 50), [1, 2])]
    assert audit(extraction=more).verdict == "verbatim"
    labels = Extraction(ANSWERS, Share(0, 50), Share(50, 50), Share(0, 50), Share(20, 50), tokens=2)
    assert audit(extraction=[labels]).verdict == "membership"  # labels aren't text that leaks
    told = Membership(0.8, (0.7, 0.88), 50, 50)
    assert audit(losses=Losses(1, 1, 1, 1, told, told, told)).verdict == "membership"
    # where the base tells the rows apart too, they are of different kinds, and its loss is taken out
    assert audit(losses=Losses(1, 1, 1, 1, told, told, NO)).verdict == "none_seen"
    assert audit(losses=Losses(1, 1, 1, 1, NO, told, NO)).verdict == "membership"
    seen = Planted(16, 4, 0, 4, 0, 3, 1.0, 8.0)
    assert audit(canaries=[Planted(0, 4, 0, 0, 0, 0, 1.0, 1.2), seen]).verdict == "verbatim"
    assert "4 of 4 planted 16 times" in audit(canaries=[seen]).sentence
    one = Planted(1, 12, 0, 1, 0, 0, 1.0, 2.0)
    assert audit(canaries=[one]).verdict == "membership" and audit(canaries=[one], candidates=64).verdict == "none_seen"
    alone = audit(losses=None, others=0, extraction=[Extraction(ANSWERS, Share(0, 50), Share(20, 50))])
    assert alone.verdict == "cant_tell" and "--held-out" in alone.sentence


def asked(base: int, adapter: tuple[int, int], held_out: tuple[int, int], what: str = ANSWERS) -> Extraction:
    count, rows = adapter
    return Extraction(what, Share(base, rows), Share(count, rows), Share(0, held_out[1]), Share(*held_out), tokens=20)


def test_answers_that_unseen_rows_get_too_are_no_memorised_text() -> None:
    """An adapter that has learned a task answers the rows that it has seen a little better than others."""
    learned = audit(extraction=[asked(0, (180, 180), (54, 60))], rows=180, others=60)
    assert learned.verdict == "membership", "the gap tells which rows were seen"
    assert "that their text comes out was not shown" in learned.sentence
    assert "held-out 54 of 60, so most of them can be worked out without having been seen" in learned.sentence
    same = audit(extraction=[asked(0, (20, 50), (18, 50))])
    assert same.verdict == "none_seen" and "can be worked out" in same.sentence
    by_heart = audit(extraction=[asked(0, (180, 180), (12, 60))])
    assert by_heart.verdict == "verbatim" and "worked out" not in by_heart.sentence
    known = audit(extraction=[asked(49, (50, 50), (0, 60), RESTS)])
    assert known.verdict == "none_seen", "the base gives nearly all of these rows back by itself"
    few = audit(extraction=[asked(0, (20, 200), (0, 60), RESTS)])
    assert few.verdict == "verbatim" and "20 of 200 rows come back verbatim (base 0, held-out 0 of 60)" in few.sentence


def test_few_rows_are_no_proof_that_nothing_leaks() -> None:
    few = audit(rows=50, others=5, extraction=[asked(0, (1, 50), (0, 5))])
    assert few.verdict == "cant_tell" and "50 training and 5 held-out rows are too few to say" in few.sentence
    short = audit(extraction=[])  # rows that are too short to be asked for have a loss all the same
    assert short.verdict == "none_seen"


def test_held_out_rows_of_another_kind_are_said() -> None:
    told = Membership(0.8, (0.7, 0.88), 50, 50)
    assert "of another kind" in audit(losses=Losses(1, 1, 1, 1, told, told, NO)).sentence
    assert "of another kind" not in audit().sentence
