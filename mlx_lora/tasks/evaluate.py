"""Evaluate a base and adapters by name: one load, each adapter with the data settings it was trained with.

Which rows were used is part of the result: a score on rows that an adapter was trained on says nothing about new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import sha256
from mlx_lora.data.splits import TEST_FIRST, chosen_file
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read
from mlx_lora.study.evaluate import Result, evaluate_each
from mlx_lora.study.scores.base import Score
from mlx_lora.study.scores.choose import Given, check, choose
from mlx_lora.study.scores.labels import answered
from mlx_lora.study.scores.scorer import Scorer
from mlx_lora.tasks.opened import Opened, Settings, names, open_adapters


@dataclass(frozen=True)
class Evaluation:
    """Results of the base and of each adapter on the rows of `file`."""

    file: Path
    results: list[Result]

    def as_dict(self) -> dict[str, Any]:
        return {"results": [result.as_dict() for result in self.results], "file": str(self.file)}


def evaluate_adapters(
    model: str | None,
    adapters: Sequence[str],
    data: str,
    settings: Settings,
    *,
    exact: bool = False,
    scores: Sequence[str] = (),
    given: Given | None = None,
    max_tokens: int = 256,
    progress: OnFile = silent,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Results of the base, by default the adapters' own, then of each adapter. `settings` turns an adapter's own data
    settings (None: it has none) into those to use; the base follows the first adapter. `scores` are names, `auto` for
    the one that suits the wanted answers. `warn` is told where the rows are training rows. Raises before loading for
    adapters that don't belong, and for scores that can't be computed."""
    given = given or Given()
    check(scores, given)
    wanted = list(dict.fromkeys([*scores, *given.names]))
    opened = open_on_rows(model, adapters, data, settings, stage=stage, warn=warn)
    engine, file, chosen = opened.engine, opened.file, opened.chosen
    tokenizer, ask = engine.loaded.tokenizer, exact or bool(wanted)
    asked = {
        key: own.questions(file, tokenizer, ask, progress) for key, own in {o.key: o for o in chosen.values()}.items()
    }
    each = {name: asked[own.key] for name, own in chosen.items()}
    found = _scores(each[None].answers, wanted, given, stage)
    times = answered(found, exact)
    results = evaluate_each(
        engine, each,
        score=found[0] if found else None, more=found[1:], exact=exact, max_tokens=max_tokens,
        on_row=progress("evaluating", sum(len(one.rows) + times * len(one.prompts) for one in each.values())),
    )  # fmt: skip
    return Evaluation(file, results)


@dataclass(frozen=True)
class OnRows(Opened):
    """A base and adapters, and the file of rows that they are put to; `learned` names those trained on these rows."""

    file: Path
    learned: frozenset[str]


def open_on_rows(
    model: str | None,
    adapters: Sequence[str],
    data: str,
    settings: Settings,
    *,
    prefer: tuple[str, ...] = TEST_FIRST,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> OnRows:
    """Load the base of some adapters, once, with all of them, for the rows of `data`; as `evaluate_adapters` says."""
    stored = [read(registry.find(adapter)) for adapter in adapters]
    file = chosen_file(data, prefer)
    stage(f"evaluating on {file}")
    learned = _learned(file, stored)
    nothing = "the score says nothing about new ones; `mlx-lora data split` keeps rows aside before training"
    if learned:
        warn(f"{file} holds the rows that {', '.join(dict.fromkeys(learned))} learned: {nothing}")
    elif file != paths.existing(data) and file.stem == "train":
        warn(f"{data} has no test or valid file, so its training rows are used: {nothing}")
    opened = open_adapters(model, stored, settings, stage=stage)
    return OnRows(opened.engine, opened.stored, opened.chosen, file, frozenset(learned))


def _scores(answers: Sequence[str], wanted: Sequence[str], given: Given, stage: Callable[[str], None]) -> list[Score]:
    """The scores of these names, each once; it is said which `auto` is, and why."""
    found: dict[str, Score] = {}
    for name in wanted:
        chosen = choose(answers, name, given)
        if name == "auto":
            stage(f"score: {chosen.score.name}, since {chosen.why}")
        if isinstance(chosen.score, Scorer):
            stage(f"running {chosen.score.file}: it is code, and may do what you may, apart from the network")
        found.setdefault(chosen.score.name, chosen.score)
    return list(found.values())


def _learned(file: Path, stored: Sequence[StoredAdapter]) -> list[str]:
    """The adapters that were trained on the rows of a file, by its hash, in any of their files but validation's."""
    digest = sha256(file)
    return [
        name
        for name, adapter in zip(names(stored), stored, strict=True)
        if any(
            entry.get("sha256") == digest and Path(str(entry.get("file"))).stem != "valid"
            for entry in adapter.manifest.data
        )
    ]
