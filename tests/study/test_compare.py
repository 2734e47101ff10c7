"""What a comparison is made of: ready tables, one budget for all, the best of several rates, a verdict, a plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_lora.errors import RecipeError
from mlx_lora.study import compare
from mlx_lora.study.compare import Line, best, draw, read, verdict

ROOT = Path(__file__).parents[2]
RECIPE = "model: base\ndata: {path: rows}\ntrain: {iters: 3}\nadapter: {rank: %d}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recipes that differ in their ranks."""
    for name, rank in (("wide", 8), ("narrow", 2)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE % rank)
    return tmp_path


def test_the_recipes_of_a_folder_come_by_name_after_their_base(folder: Path) -> None:
    runs = read([str(folder)], ["adapter.alpha=4"])
    assert [(run.name, run.bare) for run in runs] == [("(base)", True), ("narrow", False), ("wide", False)]
    assert [(run.recipe.adapter.rank, run.recipe.adapter.alpha) for run in runs[1:]] == [(2, 4), (8, 4)]


def test_every_learning_rate_is_a_run_of_its_own(folder: Path) -> None:
    runs = read([str(folder / "wide.yaml")], rates=[1e-3, 5e-5])[1:]
    assert [(run.name, run.label) for run in runs] == [("wide-lr0.001", "wide"), ("wide-lr5e-05", "wide")]
    assert [run.recipe.train.learning_rate for run in runs] == [1e-3, 5e-5]


def test_every_form_of_the_base_is_measured_alone(folder: Path) -> None:
    (folder / "packed.yaml").write_text(RECIPE % 4 + "quantize: {mode: affine, bits: 3}\n")
    bases = [run for run in read([str(folder)]) if run.bare]
    assert [run.recipe.quantize is None for run in bases] == [True, False]
    assert [run.label for run in bases] == ["(base)", "(base, affine, 3 bits, group 64)"]


@pytest.mark.parametrize(
    "change", ["train: {iters: 4}", "data: {path: other}", "data: {path: rows, mask: all}", "seed: 1", "model: other"]
)
def test_recipes_with_other_data_or_another_budget_dont_compare(folder: Path, change: str) -> None:
    values = yaml.safe_load(RECIPE % 4) | yaml.safe_load(change)
    (folder / "other.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="don't compare") as raised:
        read([str(folder)])
    assert next(iter(yaml.safe_load(change))) in raised.value.message and "key=value" in str(raised.value.hint)


def test_two_recipes_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="two recipes are called wide"):
        read([str(folder / "wide.yaml"), str(folder / "wide.yaml")])


def test_a_folder_without_recipes_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no recipes") as raised:
        read([str(tmp_path)])
    assert "methods, matrices, ranks" in str(raised.value.hint)


def test_the_recipes_of_methods_differ_only_in_adapter_and_quantize() -> None:
    read_all = {file.name: yaml.safe_load(file.read_text()) for file in (ROOT / "recipes/compare").glob("*.yaml")}
    assert len(read_all) > 15
    rest = [{key: values[key] for key in values if key not in ("adapter", "quantize")} for values in read_all.values()]
    assert all(part == rest[0] for part in rest)
    alike = [str((values["adapter"], values["quantize"])) for values in read_all.values()]
    assert len(set(alike)) == len(alike)


def test_every_method_and_every_start_is_compared() -> None:
    from mlx_lora.methods import COMBINATIONS, INITIALISATIONS, METHODS

    adapters = [run.recipe.adapter for run in read(["methods"])]
    assert {*METHODS, COMBINATIONS[0]} <= {adapter.method for adapter in adapters}
    assert {*INITIALISATIONS} - {"gaussian"} <= {adapter.init for adapter in adapters}


def test_matrices_have_the_same_number_of_parameters_each() -> None:
    """Table 5 of the LoRA paper: rank 8 for one matrix of a layer, 4 for two, 2 for four."""
    runs = read(["matrices"])[1:]
    budgets = {run.recipe.adapter.rank * len(run.recipe.adapter.targets) for run in runs}
    assert len(runs) == 7 and budgets == {8}


def test_ranks_are_those_of_the_paper() -> None:
    """Table 6: ranks 1 to 64 on queries and values, and on all four."""
    runs = read(["ranks"], ["seed=3"])[1:]
    assert {(len(run.recipe.adapter.targets), run.recipe.adapter.rank) for run in runs} == {
        (count, rank) for count in (2, 4) for rank in (1, 2, 4, 8, 64)
    }
    assert {run.recipe.seed for run in runs} == {3}


LINES = [
    Line("(base)", loss=2.0, exact_match=0.0),
    Line("big", "full", parameters=100_000, valid_loss=0.2, loss=0.30, exact_match=0.9),
    Line("small", "lora", parameters=1_000, valid_loss=0.3, loss=0.31, exact_match=0.8),
    Line("tiny", "ia3", parameters=10, valid_loss=0.9, loss=0.8, exact_match=0.1),
    Line("broken", "dora", error="it broke"),
]


def test_validation_rows_choose_between_rates_and_test_rows_have_no_say() -> None:
    rates = [replace(LINES[1], learning_rate=rate) for rate in (1.0, 2.0, 3.0)]
    rates[1] = replace(rates[1], valid_loss=0.1, loss=0.5)
    rates[2] = replace(rates[2], valid_loss=None, loss=None, error="not finite")
    assert best([LINES[0], *rates]) == [LINES[0], rates[1]]


def test_what_won_is_said_plainly() -> None:
    assert verdict(LINES) == [
        "lowest loss: big (0.3000 nats, 100,000 parameters)",
        "fewest parameters within 0.02 nats of it: small (0.3100 nats, 1,000 parameters), 0.01 of the parameters",
        "most exact matches: big (0.9)",
    ]


def test_a_winner_without_rivals_is_called_that() -> None:
    lines = [replace(LINES[1], exact_match=None), LINES[3]]
    assert verdict([*lines])[1] == "nothing with fewer parameters comes within 0.02 nats of it"
    assert verdict(LINES[:2]) == []


def test_the_plot_is_a_png_whose_labels_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    boxes: list[Any] = []
    places = compare._label

    def label(figure, axes, trained):  # type: ignore[no-untyped-def]
        places(figure, axes, trained)
        figure.canvas.draw()
        boxes.extend(Text.get_window_extent(text) for text in axes.texts)  # an annotation's own includes its line

    monkeypatch.setattr(compare, "_label", label)
    lines = [Line(f"method {index}", "lora", parameters=1000 + index, loss=0.3) for index in range(12)]
    draw([LINES[0], *lines, LINES[4]], "twelve at one place", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[index + 1 :])
