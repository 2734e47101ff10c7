"""A report as a file: well-formed, self-contained, with words for every figure, and harmless whatever data says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlx_lora.config import Recipe
from mlx_lora.report import page
from mlx_lora.report.run import Report, html
from mlx_lora.report.sample import Sample
from mlx_lora.report.svg import Curve, Figures, Interval, log_ticks, thinned, ticks_of
from mlx_lora.store.manifest import Manifest
from mlx_lora.store.run import Evaluation, FinishedLine, RunRecord, Started, StepLine
from mlx_lora.store.verdict import Judged

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=y>&amp;\x1b[2J\x00\u202e"
RESULT = {
    "adapter": "mine", "verdict": "helped", "sentence": "it helped", "metric": "accuracy", "base": 0.1, "tuned": 0.8,
    "difference": 0.7, "interval": [0.6, 0.8], "p_value": 0.01, "test": "McNemar", "detectable": 0.1, "rows": 40,
    "fixed": 2, "broken": 1, "fixed_rows": [0, 3], "broken_rows": [5],
    "loss": {"base": 2.0, "tuned": 1.0, "difference": -1.0, "interval": [-1.2, -0.8]},
    "behaviour": {"general": {"base": {"refused": 0.0, "loops": 0.1}, "tuned": {"refused": 0.5, "loops": 0.1}}},
    "drift": {"kl_task": 1.5, "kl_general": 0.1, "loss_general_base": 2.0, "loss_general_tuned": 2.1},
}  # fmt: skip


def report(name: str = "mine", **changes: Any) -> Report:
    record = RunRecord(
        name=name,
        path=Path("mine"),
        state="finished",
        recipe=Recipe.model_validate({"model": "/somewhere/private/base", "data": {"path": "/somewhere/rows"}}),
        first=Started(
            time="t", mlx_lora="0", rows=80, valid_rows=20, predicted_memory_bytes=10**9, memory_limit_bytes=2 * 10**9
        ),
        steps=[
            StepLine(step=n, steps=40, loss=4 / n, learning_rate=1e-3, gradient_norm=1.0, tokens_per_second=9.0)
            for n in range(1, 41)
        ],
        evaluations=[Evaluation(step=0, loss=4.0), Evaluation(step=40, loss=0.2, best=True)],
        notes=["a note"],
        finished=FinishedLine(iters=40, epochs=2.0, train_loss=0.1, peak_memory_bytes=9 * 10**8, stopped_by="epochs"),
    )
    manifest = Manifest(
        method="lora", adapter={}, modules=["m"], scales={"m": 1.0},
        data=[{"file": "train.jsonl", "rows": 80, "tokens": 900, "trained_tokens": 300, "sha256": "a" * 64}],
    )  # fmt: skip
    whole: dict[str, Any] = {
        "name": name, "record": record, "manifest": manifest, "results": [Judged.model_validate(RESULT)],
        "samples": [Sample("asked this", "right", {None: "wrong", "mine": "right"})],
        "changed": [Sample("row asked", "yes", {None: "no", "mine": "yes"}, row=3)],
    }  # fmt: skip
    return Report(**(whole | changes))


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.partition("<html")[1] + text.partition("<html")[2])


REPORTS = {
    "a run with a verdict": report(),
    "a verdict alone": report(record=None, samples=()),
    "a run of an older version": report(
        record=report().record.model_copy(update={"first": None, "finished": None, "recipe": None}),  # type: ignore[union-attr]
        manifest=None, results=(), samples=(), changed=(),
    ),
    "a run that only began": report(
        record=RunRecord(name="mine", path=Path("mine"), state="abandoned"), manifest=None, results=(), samples=()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_well_formed_and_loads_nothing(name: str) -> None:
    text = html(REPORTS[name])
    assert text.startswith(f"<!DOCTYPE html>\n{page.MARK}")
    root = parsed(text)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object"), element.tag
        assert not {"src", "href", "style"} & set(element.keys()) and not any(
            key.startswith("on") for key in element.keys()
        )
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    policy = root.find("head/meta[@http-equiv]")
    assert policy is not None and policy.get("content") == page.POLICY


@pytest.mark.parametrize("name", REPORTS)
def test_figures_have_words_and_tables_have_headers(name: str) -> None:
    root = parsed(html(REPORTS[name]))
    for svg in root.iter("svg"):
        title, description = svg.find("title"), svg.find("desc")
        assert title is not None and title.text and description is not None and description.text
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}" and svg.get("role") == "img"
    for table in root.iter("table"):
        caption, rows = table.find("caption"), table.findall("tbody/tr")
        assert caption is not None and caption.text and rows
        headers = table.findall("thead/tr/th[@scope='col']")
        assert all(len(row) == len(headers) and row[0].get("scope") == "row" for row in rows)
    levels = [int(element.tag[1]) for element in root.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_whatever_data_says_is_text() -> None:
    hostile = Sample(HOSTILE, HOSTILE, {None: HOSTILE, HOSTILE: HOSTILE}, row=0)
    results = [Judged.model_validate(RESULT | dict.fromkeys(("adapter", "sentence"), HOSTILE))]
    made = report(HOSTILE, samples=[hostile], changed=[hostile], results=results, note=HOSTILE)
    assert made.record is not None and made.manifest is not None
    record = made.record.model_copy(update={"notes": [HOSTILE], "name": HOSTILE, "started": HOSTILE})
    manifest = made.manifest.model_copy(update={"data": [{"file": HOSTILE, "sha256": HOSTILE}]})
    text = html(
        report(HOSTILE, record=record, manifest=manifest, samples=[hostile], changed=[hostile], results=results)
    )
    tags = {element.tag for element in parsed(text).iter()}
    assert not tags & {"script", "img"} and "<script" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert text.count(page.text(HOSTILE)) >= 10


def test_an_answer_that_was_cut_is_not_called_wrong_for_what_it_lacks() -> None:
    long = Sample("q", "one two three", {None: "one two…", "mine": "one too…", "none": "…", "full": "one two three"})
    text = long.html()
    assert "base: as wanted until it was cut" in text and "mine: different" in text and "none: different" in text
    assert [line.split(None, 1)[1] for line in long.lines()[2:]] == [
        "the same, until it was cut", "one too…", "…", "the same",
    ]  # fmt: skip
    whole = Sample("q", "one…", {None: "one…"})
    assert "base: as wanted<" in whole.html()


def test_paths_of_this_machine_stay_here() -> None:
    text = html(report())
    assert "somewhere" not in text and "<td>base</td>" in text and "<td>rows</td>" in text


def test_a_verdict_shows_what_its_record_has() -> None:
    text = html(report())
    assert "mine, general prompts: refused" in text and "-1.2 to -0.8" in text and "Fixed by mine: 2 rows" in text
    poor = RESULT | {"loss": None, "behaviour": {}, "drift": {"kl_task": 0.5}, "interval": [float("nan")] * 2}
    text = html(report(results=[Judged.model_validate(poor)]))
    assert "KL from the base on the task" in text and "general text" not in text and "nan," not in text
    assert parsed(text) is not None


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours `#rrggbb`."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_the_paper() -> None:
    """Text by WCAG's 4.5, lines of figures by its 3, in light, dark and print."""
    style = (Path(page.__file__).with_name("page.css")).read_text()
    blocks = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(blocks) == 3
    for colours in blocks:
        whole = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
            for name, value in colours.items()
        }
        for ground in ("paper", "panel"):
            assert all(contrast(whole[name], whole[ground]) >= 4.5 for name in ("ink", "soft", "good", "bad"))
        assert all(contrast(whole[name], whole["paper"]) >= 3 for name in ("c1", "c2"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.3, 0.9, [0, 0.5]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks_of(low, high) == pytest.approx(expected)


def test_logarithmic_ticks() -> None:
    assert log_ticks(0.03, 4.0) == [0.1, 1.0] and log_ticks(0.5, 4.0) == [0.5, 1, 2]


def test_thinning_keeps_means() -> None:
    points = [(float(x), float(x % 7)) for x in range(1001)]
    thin = thinned(points, 100)
    assert len(thin) <= 100 and thin[0] == (5.0, sum(x % 7 for x in range(11)) / 11) and thinned([]) == []


def test_a_long_name_fits_its_figure_and_is_whole_in_words() -> None:
    name = "support-questions-of-last-year-8-epochs"
    drawn = Figures().intervals([Interval(name, 0.1, 0.2, 0.3)], title="t", across="x")
    (shown,) = re.findall('class="name">([^<]*)<', drawn)
    assert shown == "support-qu…-8-epochs" and name in drawn


def test_a_figure_of_nothing_is_nothing() -> None:
    assert Figures().chart([Curve("loss", [(1.0, float("nan"))])], title="t", across="x", up="y") == ""
    assert "NaN" not in Figures().chart([Curve("loss", [(1.0, 2.0)])], title="t", across="x", up="y")
