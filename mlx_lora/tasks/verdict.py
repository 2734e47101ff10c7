"""Judge adapters against their base: on the task's rows, on general text, and by how their answers look. One load.

The base and an adapter are asked the very same tokens: those that the adapter's own settings make of the rows. Adapters
with different settings each have the base beside them as they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import sha256, stream
from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store import verdict as store
from mlx_lora.study import behaviour
from mlx_lora.study.behaviour import Looked
from mlx_lora.study.drift import Drift, Moved, spaced
from mlx_lora.study.evaluate import Questions, Result, evaluate_each
from mlx_lora.study.scores.choose import OPTIONS, Given, check, choose
from mlx_lora.study.scores.labels import answered
from mlx_lora.study.scores.scorer import Scorer
from mlx_lora.study.verdict import LOSS, Compared, Elsewhere, Word, compare, judge
from mlx_lora.tasks.evaluate import OnRows, open_on_rows
from mlx_lora.tasks.opened import Settings

GENERAL = ("data", "general", "general.jsonl")
NOTHING = "none"
# Prompts whose answers are looked at, evenly spaced, and the most tokens of an answer to a general one.
TASK_PROMPTS, GENERAL_PROMPTS, GENERAL_TOKENS = 40, 24, 128
MOST_NAME = 100


@dataclass(frozen=True)
class Judging:
    """How to judge: the score by name (auto: what suits the answers) with what it needs, and the general text.

    `forget` is a file of general text, None for the one that comes with the package, "none" for none.
    """

    score: str = "auto"
    given: Given = field(default_factory=Given)
    forget: str | None = None
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Judgement:
    """One adapter's verdict, with the rows that it comes from: those hold text, and stay in memory."""

    adapter: str
    word: Word
    sentence: str
    learned: bool
    compared: Compared
    task: Moved
    general: Moved | None
    looked: dict[str, Looked]

    @property
    def forgot(self) -> bool:
        """Whether general text is surely worse, as the sentence then says."""
        return Elsewhere(self.general).forgot


@dataclass(frozen=True)
class Judgements:
    """All that `verdict` found, and the record of it without text. `settings` read the rows of
    `file`, `why` says how the score was chosen."""

    file: Path
    settings: Data
    why: str
    each: list[Judgement]
    record: store.Verdict


def judge_adapters(
    model: str | None,
    adapters: Sequence[str],
    data: str,
    settings: Settings,
    judging: Judging,
    *,
    name: str | None = None,
    progress: OnFile = silent,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Judgements:
    """Judge each adapter against the base, and keep the record in the home under `name` (by default the adapters').

    Raises before loading for adapters that don't belong, and DataError for rows that can't be used.
    """
    forget = general_file(judging.forget)
    check([judging.score] if judging.score != LOSS else [], judging.given)
    _check_used(judging)
    if name is not None:
        paths.check_name(name)
    opened = open_on_rows(model, adapters, data, settings, stage=stage, warn=warn)
    name = paths.check_name(name or "-".join(Path(each).name for each in opened.stored)[:MOST_NAME].rstrip(".-"))
    groups: dict[str, list[str]] = {}
    for adapter in opened.stored:
        groups.setdefault(opened.chosen[adapter].key, []).append(adapter)
    found: dict[str, Judgement] = {}
    why, rows, general_rows = "", 0, 0
    for own in groups.values():
        group = _Group(opened, own, judging, forget, progress)
        why = group.choose(stage if not why else lambda text: None)
        found |= group.judged()
        rows, general_rows = len(group.task.rows), len(group.general.rows) if group.general else 0
    each = [found[adapter] for adapter in opened.stored]
    record = _verdict(opened, name, each, rows, (forget, general_rows) if forget else None)
    _keep(record, warn)
    return Judgements(opened.file, opened.chosen[None].settings, why, each, record)


def _keep(record: store.Verdict, warn: Callable[[str], None]) -> None:
    """Write the record; where that can't be, it is said, and what was found is shown all the same."""
    try:
        store.write(record)
    except (MlxLoraError, OSError) as fault:
        why = paths.unusable(fault).message if isinstance(fault, OSError) else fault.message
        warn(f"the verdict isn't kept in the home: {why}")


def _check_used(judging: Judging) -> None:
    """Raise MlxLoraError for what was given for another score than the one that the verdict goes by."""
    named = judging.given.names
    score = judging.score if judging.score != "auto" or not named else named[0]
    if others := [f"--{OPTIONS[name].split()[0]}" for name in named if name != score]:
        raise MlxLoraError(
            f"a verdict goes by one score, here {score}, and {' and '.join(others)} would change nothing",
            hint="one verdict for each score; `eval` shows several",
        )


def general_file(forget: str | None) -> Path | None:
    """The file of general text that `--forget` means. Raises MlxLoraError where there is none of that name."""
    if forget == NOTHING:
        return None
    file = paths.bundled(*GENERAL) if forget is None else paths.existing(forget)
    if file is None or not file.is_file():
        why = "no such file" if file is None else "not a file"
        raise MlxLoraError(f"{forget}: {why}", hint="--forget takes a file of general text, or none to leave it out")
    return file


def general_settings(own: Data) -> Data:
    """How general text becomes tokens: through the template of the task, and otherwise as it stands."""
    return Data(
        template=own.template, template_args=own.template_args, thinking=own.thinking,
        max_seq_length=own.max_seq_length, too_long="truncate-end",
    )  # fmt: skip


def asks(file: Path, settings: Data) -> bool:
    """Whether the rows of a file are prompts with answers, which their first one tells."""
    return next((item.example.text is None for item in stream(file, settings) if item.example), False)


class _Group:
    """Adapters whose settings make the same tokens of the rows, with the base beside them."""

    def __init__(
        self, opened: OnRows, adapters: list[str], judging: Judging, forget: Path | None, progress: OnFile
    ) -> None:
        self.engine: Engine = opened.engine
        self.adapters, self.judging, self.progress = adapters, judging, progress
        self.learned = opened.learned
        chosen, tokenizer = opened.chosen[adapters[0]], self.engine.loaded.tokenizer
        self.task = chosen.questions(opened.file, tokenizer, asks(opened.file, chosen.settings), progress)
        self.general: Questions | None = None
        if forget is not None:
            general = chosen.with_settings(general_settings(chosen.settings))
            self.general = general.questions(forget, tokenizer, asks(forget, general.settings), progress)
        self.score: Any = None
        self.said: dict[tuple[str | None, int], list[int]] = {}  # answers to the task's prompts, once they are scored

    def choose(self, stage: Callable[[str], None]) -> str:
        """Choose the score, and say which it is and why."""
        if not self.task.prompts:
            if self.judging.score not in ("auto", LOSS):
                raise MlxLoraError(f"--score {self.judging.score}: these rows are plain text, without an answer")
            return "the loss, since plain text has no answer to score"
        if self.judging.score == LOSS:
            return "the loss, as asked"
        chosen = choose(self.task.answers, self.judging.score, self.judging.given)
        self.score = chosen.score
        stage(f"judging by {chosen.score.name}: {chosen.why}")
        if isinstance(chosen.score, Scorer):
            stage(f"running {chosen.score.file}: it is code, and may do what you may, apart from the network")
        return f"{chosen.score.name}: {chosen.why}"

    def judged(self) -> dict[str, Judgement]:
        """The judgement of each adapter."""
        results = self._results()
        task, general = self._drift("comparing on the task's rows", self.task), {}
        if self.general is not None:
            general = self._drift("comparing on general text", self.general)
        looked = {"task": self._looked(self.task, TASK_PROMPTS, self.judging.max_tokens, self.said)}
        if self.general is not None:
            looked["general"] = self._looked(self.general, GENERAL_PROMPTS, GENERAL_TOKENS, {})
        found = {}
        for name in self.adapters:
            compared = compare(results[None], results[name], seed=self.judging.seed)
            seen = {where: sides[name] for where, sides in looked.items() if sides}
            changes = {where: sides.changes for where, sides in seen.items()}
            elsewhere = Elsewhere(general.get(name), changes.get("task", []), changes.get("general", []))
            learned = name in self.learned
            word, sentence = judge(compared.measured, elsewhere, learned=learned)
            found[name] = Judgement(name, word, sentence, learned, compared, task[name], general.get(name), seen)
        return found

    def _results(self) -> dict[str | None, Result]:
        sides: list[str | None] = [None, *self.adapters]
        asked = self.task if self.score is not None else Questions(self.task.rows, [], [], [], self.task.examples)
        times = answered([self.score], False) if self.score is not None else 0
        advance = self.progress("evaluating", len(sides) * (len(asked.rows) + times * len(asked.prompts)))
        results = evaluate_each(
            self.engine, dict.fromkeys(sides, asked), score=self.score, exact=False,
            max_tokens=self.judging.max_tokens, on_row=advance,
            heard=lambda name, number, tokens: self.said.update({(name, number): tokens}),
        )  # fmt: skip
        return dict(zip(sides, results, strict=True))

    def _drift(self, label: str, asked: Questions) -> dict[str, Moved]:
        rows = spaced(asked.rows)
        advance = self.progress(label, len(rows) * (1 + len(self.adapters)))
        drift = Drift(self.engine, rows, advance)
        return {name: drift.of(name, seed=self.judging.seed) for name in self.adapters}

    def _looked(
        self, asked: Questions, most: int, tokens: int, said: dict[tuple[str | None, int], list[int]]
    ) -> dict[str, Looked]:
        """How both sides answer some of the prompts; what was `said` isn't asked again."""
        if not asked.prompts:
            return {}
        places = spaced(range(len(asked.prompts)), most)
        sides: list[str | None] = [None, *self.adapters]
        left = sum((side, place) not in said for side in sides for place in places)
        advance = self.progress("looking at answers", left) if left else lambda: None
        found = behaviour.answers(
            self.engine, dict.fromkeys(sides, asked), places, most=tokens, said=said, on_answer=advance
        )
        return {name: Looked(found[None], found[name]) for name in self.adapters}


def _verdict(
    opened: OnRows, name: str, each: list[Judgement], rows: int, general: tuple[Path, int] | None
) -> store.Verdict:
    """The record of all judgements: on so many rows of the file, and of general text with its number of rows."""
    return store.Verdict(
        created=store.now(), name=name, model=registry.base_name(opened.engine.loaded.path),
        base=next((a.manifest.base.fingerprint for a in opened.stored.values() if a.manifest.base), None),
        data=store.Rows(file=opened.file.name, sha256=sha256(opened.file), rows=rows),
        general=store.Rows(file=general[0].name, sha256=sha256(general[0]), rows=general[1]) if general else None,
        results=[_record(one) for one in each],
    )  # fmt: skip


def _record(one: Judgement) -> store.Judged:
    """A judgement without text."""
    measured, general = one.compared.measured, one.general
    loss = None
    if measured.loss is not None and measured.losses is not None:
        loss = store.SecondOpinion(
            base=measured.losses[0], tuned=measured.losses[1], difference=measured.loss.estimate,
            interval=measured.loss.interval,
        )  # fmt: skip
    drift = store.Drift(kl_task=one.task.kl)
    if general is not None:
        drift = store.Drift(
            kl_task=one.task.kl, kl_general=general.kl, loss_general_base=general.loss_base,
            loss_general_tuned=general.loss_tuned, loss_general_interval=general.difference.interval,
        )  # fmt: skip
    found = measured.difference
    return store.Judged.model_validate({
        "adapter": one.adapter, "verdict": one.word, "sentence": one.sentence, "learned": one.learned,
        "metric": measured.metric, "base": measured.base, "tuned": measured.tuned, "difference": found.estimate,
        "interval": found.interval, "p_value": found.p_value, "test": found.test, "detectable": found.detectable,
        "rows": found.rows, "fixed": len(one.compared.fixed), "broken": len(one.compared.broken),
        "fixed_rows": one.compared.fixed, "broken_rows": one.compared.broken, "loss": loss, "drift": drift,
        "behaviour": {where: looked.as_dict() for where, looked in one.looked.items()},
    })  # fmt: skip
