"""eval."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapters, Json, MaxTokens, Model, Overrides, data_settings, progress

# Labels up to which a table has a column for each.
MOST_COLUMNS = 8
Scores = Annotated[
    list[str] | None,
    typer.Option("--score", metavar="NAME", help="A score, or auto for the one that suits; repeatable."),
]
Database = Annotated[
    Path | None, typer.Option("--database", metavar="FILE", help="SQLite, to run answers and compare results.")
]
Pattern = Annotated[
    str | None, typer.Option("--pattern", metavar="REGEX", help="What answers must hold; its groups are compared.")
]
OwnScorer = Annotated[
    Path | None, typer.Option("--scorer", metavar="FILE.py", help="Your code: score(wanted, answer) -> 0 to 1.")
]
Tolerance = Annotated[
    str | None, typer.Option("--tolerance", metavar="X", help="Of numbers: 0.5, or 5% of the wanted one; 0 by default.")
]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    data: Annotated[str, typer.Option("--data", help="A file, or a folder whose test file is used.")],
    settings: Overrides = None,
    model: Model = None,
    adapter: Adapters = None,
    exact: Annotated[bool, typer.Option("--exact", help="Also generate answers and count exact matches.")] = False,
    score: Scores = None,
    database: Database = None,
    pattern: Pattern = None,
    scorer: OwnScorer = None,
    tolerance: Tolerance = None,
    max_tokens: MaxTokens = 256,
    json: Json = False,
) -> None:
    """Loss, perplexity, exact match and scores of the base and of each adapter, in one load.

    Scores: exact, normalised, accuracy, json, token-f1, rouge-l, chrf, pattern, numbers, sql, scorer.
    """
    from mlx_lora.study.scores.choose import Given
    from mlx_lora.tasks.evaluate import evaluate_adapters

    with ExitStack() as stack:
        evaluation = evaluate_adapters(
            model,
            adapter or [],
            data,
            lambda stored: data_settings(settings, stored),
            exact=exact,
            scores=score or [],
            given=Given(database, pattern, scorer, tolerance),
            max_tokens=max_tokens,
            progress=progress(stack),
            stage=ui.note,
            warn=ui.warning,
        )
    if json:
        ui.as_json(evaluation.as_dict())
    else:
        _show(evaluation.results)


def _show(results: list[Any]) -> None:
    """A line for each adapter, then what its scores have to say."""
    names = [name for name, _, _ in _scores(results[0])]
    rows = []
    for result in results:
        row = [result.adapter or "(base)", result.loss, result.perplexity, result.tokens, result.rows]
        rows.append([*row, result.exact_match, *(value for _, value, _ in _scores(result))])
    ui.table(["adapter", "loss", "perplexity", "tokens", "rows", "exact match", *names], rows)
    for result in results:
        for name, _, details in _scores(result):
            _show_details(f"{result.adapter or '(base)'}, {name}", details)


def _scores(result: Any) -> list[tuple[str, float, dict[str, Any]]]:
    """Name, mean and details of each score of a result."""
    if result.score is None:
        return []
    first = (result.score_name, result.score, result.details)
    return [first, *((name, one["score"], one) for name, one in result.details.get("more", {}).items())]


def _show_details(title: str, details: dict[str, Any]) -> None:
    """Numbers in a line, and labels in a table: a row for each that is wanted, a column for each that was answered."""
    numbers = {key: value for key, value in details.items() if isinstance(value, int | float) and key != "score"}
    if numbers:
        said = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
        ui.result(f"{title}: {said}")
    if not (classes := details.get("classes")):
        return
    answered = list(next(iter(details["confusion"].values())))
    answered = answered if len(answered) <= MOST_COLUMNS else []
    ui.result()
    ui.table(
        [f"{title}: wanted", *answered, "precision", "recall", "F1"],
        [
            [label, *(details["confusion"][label][one] for one in answered), own["precision"], own["recall"], own["f1"]]
            for label, own in classes.items()
        ],
    )
