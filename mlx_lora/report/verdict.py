"""What a verdict's record says, as sections of a report: the sentence, differences with intervals, drift, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.report import page
from mlx_lora.report.sample import Sample
from mlx_lora.report.svg import Figures, Interval

WORDS = {
    "helped": "it helped.",
    "hurt": "it hurt.",
    "no_difference": "it made no difference that these rows can show.",
    "too_few_rows": "there are too few rows to say.",
}
ANEW = "Answers here were generated anew; a verdict on labels goes by their likelihood, and may differ."
DRIFT = {
    "kl_task": "KL from the base on the task's rows, nats a token",
    "kl_general": "KL from the base on general text, nats a token",
    "loss_general_base": "loss of the base on general text, nats",
    "loss_general_tuned": "loss of the adapter on general text, nats",
}


@dataclass(frozen=True)
class Judged:
    """One adapter against its base. `fixed` and `broken` are numbers of rows in the file, from 0."""

    adapter: str
    verdict: str
    metric: str
    base: float | None
    tuned: float | None
    difference: float | None
    interval: tuple[float, float] | None
    rows: int | None
    sentence: str = ""
    fixed: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    drift: Mapping[str, float | None] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    behaviour: Mapping[str, Any] = field(default_factory=dict)


def judged(record: Mapping[str, Any]) -> list[Judged]:
    """The results of a verdict's record, as `verdict --json` has them; what is missing or of another kind is None.

    This is the only place that knows the record's keys.
    """
    found = []
    for result in record.get("results") or []:
        drift = result.get("drift") or {}
        found.append(
            Judged(
                adapter=str(result.get("adapter")),
                verdict=str(result.get("verdict")),
                metric=str(result.get("metric")),
                base=_number(result.get("base")),
                tuned=_number(result.get("tuned")),
                difference=_number(result.get("difference")),
                interval=_pair(result),
                rows=result.get("rows"),
                sentence=str(result.get("sentence") or ""),
                fixed=_rows(result.get("fixed_rows", result.get("fixed"))),
                broken=_rows(result.get("broken_rows", result.get("broken"))),
                loss=result.get("loss") or {},
                behaviour=result.get("behaviour") or {},
                drift={key: _number(drift.get(key)) for key in DRIFT},
            )
        )
    return found


def _pair(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a result, where both its ends are known."""
    interval = values.get("interval")
    return (float(interval[0]), float(interval[1])) if interval and None not in interval else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rows(value: Any) -> tuple[int, ...]:
    return tuple(row for row in value if isinstance(row, int)) if isinstance(value, list | tuple) else ()


def sections(results: Sequence[Judged], samples: Sequence[Sample], figures: Figures, note: str = "") -> str:
    """The part of a report that is about a verdict. `samples` are rows that were fixed or broken."""
    if not results:
        return ""
    said = [f"{each.adapter}: {each.sentence or WORDS.get(each.verdict, each.verdict)}" for each in results]
    sentences = [page.paragraph(sentence, "lead") for sentence in said]
    rows = [
        (r.adapter, r.metric, r.base, r.tuned, r.difference, _span(r.interval), r.rows, len(r.fixed), len(r.broken))
        for r in results
    ]
    headers = ["adapter", "metric", "base", "adapter's", "difference", "95 % interval", "rows", "fixed", "broken"]
    table = page.table(headers, rows, "Base and adapter")
    anew = ANEW if samples else ""
    return (
        page.section("Verdict", *sentences, _intervals(results, figures), table, _losses(results))
        + page.section("What changed elsewhere", _drift(results), _behaviour(results))
        + page.section("Rows that changed", page.paragraph(note or anew, "soft"), *_examples(results, samples))
    )


def _count(rows: int) -> str:
    return f"{rows} row{'s' if rows != 1 else ''}"


def _span(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _intervals(results: Sequence[Judged], figures: Figures) -> str:
    """A figure for each metric: differences of different units have no common axis."""
    drawn = []
    for metric in dict.fromkeys(result.metric for result in results):
        intervals = [
            Interval(r.adapter, r.interval[0], r.difference, r.interval[1])
            for r in results
            if r.metric == metric and r.interval is not None and r.difference is not None
        ]
        if intervals:
            title = f"Difference of {metric} between adapter and base"
            svg = figures.intervals(intervals, title=title, across=f"adapter − base, {metric}, 95 % interval")
            drawn.append(page.figure(svg, "An interval on one side of zero tells helped and hurt apart."))
    return "".join(drawn)


def _losses(results: Sequence[Judged]) -> str:
    """The losses beside the score that a verdict went by."""
    found = [(r.adapter, r.loss) for r in results if r.loss]
    rows = [
        (
            name,
            _number(loss.get("base")),
            _number(loss.get("tuned")),
            _number(loss.get("difference")),
            _span(_pair(loss)),
        )
        for name, loss in found
    ]
    headers = ["adapter", "base", "adapter's", "difference", "95 % interval"]
    return page.table(headers, rows, "A second opinion: loss on the same rows, nats a token")


def _behaviour(results: Sequence[Judged]) -> str:
    """Shares of answers that do something, of base and adapter, on the task's prompts and on general ones."""
    rows = []
    for result in results:
        for prompts, sides in result.behaviour.items():
            base, tuned = sides.get("base") or {}, sides.get("tuned") or {}
            for what in dict.fromkeys([*base, *tuned]):
                name = f"{result.adapter}, {prompts} prompts: {what.replace('_', ' ')}"
                rows.append((name, _number(base.get(what)), _number(tuned.get(what))))
    return page.table(["answers", "base", "adapter"], rows, "How answers are")


def _drift(results: Sequence[Judged]) -> str:
    known = [key for key in DRIFT if any(result.drift.get(key) is not None for result in results)]
    rows = [(DRIFT[key], *(result.drift.get(key) for result in results)) for key in known]
    return page.table(["measure", *(result.adapter for result in results)], rows, "Drift from the base")


def _examples(results: Sequence[Judged], samples: Sequence[Sample]) -> list[str]:
    """Samples of fixed rows, then of broken ones, and the numbers of all of them."""
    parts = []
    for result in results:
        for name, numbers in (("Fixed", result.fixed), ("Broken", result.broken)):
            if not numbers:
                continue
            shown = [sample.html() for sample in samples if sample.row in numbers and result.adapter in sample.answers]
            parts.append(f"<h3>{page.text(f'{name} by {result.adapter}: {_count(len(numbers))}')}</h3>")
            parts += shown
            listed = page.paragraph(", ".join(map(str, numbers)))
            parts.append(page.folded("numbers of these rows in the file, from 0", listed))
    return parts
