"""Evaluate a base and adapters by name: one load, each adapter with the data settings it was trained with.

Which rows were used is part of the result: a score on rows that an adapter was trained on says nothing about new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import sha256
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.unpack import unpack_once
from mlx_lora.serve.conversation import trained
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.study.evaluate import TEST_FIRST, Questions, Result, chosen_file, evaluate_each, questions
from mlx_lora.study.scores.base import Score
from mlx_lora.study.scores.choose import Given, check, choose
from mlx_lora.study.scores.labels import answered
from mlx_lora.study.scores.scorer import Scorer

Settings = Callable[[dict[str, Any] | None], Data]


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
    names = list(dict.fromkeys([*scores, *given.names]))
    opened = open_adapters(model, adapters, data, settings, stage=stage, warn=warn)
    engine, file, chosen = opened.engine, opened.file, opened.chosen
    tokenizer, ask = engine.loaded.tokenizer, exact or bool(names)
    asked = {
        key: own.questions(file, tokenizer, ask, progress) for key, own in {o.key: o for o in chosen.values()}.items()
    }
    each = {name: asked[own.key] for name, own in chosen.items()}
    found = _scores(each[None].answers, names, given, stage)
    times = answered(found, exact)
    results = evaluate_each(
        engine, each,
        score=found[0] if found else None, more=found[1:], exact=exact, max_tokens=max_tokens,
        on_row=progress("evaluating", sum(len(one.rows) + times * len(one.prompts) for one in each.values())),
    )  # fmt: skip
    return Evaluation(file, results)


@dataclass(frozen=True)
class Opened:
    """A base and adapters in one engine; `chosen` has each one's data settings, the base's (None) being the first's.

    `file` is the file of rows, `stored` the adapters by the names that the engine has for them.
    """

    engine: Engine
    file: Path
    stored: dict[str, StoredAdapter]
    chosen: dict[str | None, _Chosen]


def open_adapters(
    model: str | None,
    adapters: Sequence[str],
    data: str,
    settings: Settings,
    *,
    prefer: tuple[str, ...] = TEST_FIRST,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Load the base of some adapters, once, with all of them, for the rows of `data`; as `evaluate_adapters` says."""
    stored = [read(registry.find(adapter)) for adapter in adapters]
    opened = base_for(model, stored)
    file = chosen_file(data, prefer)
    stage(f"evaluating on {file}")
    if warning := _trained_on(file, data, stored):
        warn(warning)
    stage(f"loading {model or registry.base_name(opened.path)}")
    loaded = registry.open_base(opened, stored)
    unpack_once(loaded)
    engine = Engine(loaded)
    tokenizer = engine.loaded.tokenizer
    chosen: dict[str | None, _Chosen] = {None: _chosen(stored[0] if stored else None, settings, tokenizer)}
    named = dict(zip(_names(stored), stored, strict=True))
    for name, adapter in named.items():
        chosen[name] = _chosen(adapter, settings, tokenizer)
        engine.add(name, wrappers_for(engine.loaded.model, adapter), end=chosen[name].format.own_end)
    return Opened(engine, file, named, chosen)


def _scores(wanted: Sequence[str], names: Sequence[str], given: Given, stage: Callable[[str], None]) -> list[Score]:
    """The scores of these names, each once; it is said which `auto` is, and why."""
    found: dict[str, Score] = {}
    for name in names:
        chosen = choose(wanted, name, given)
        if name == "auto":
            stage(f"score: {chosen.score.name}, since {chosen.why}")
        if isinstance(chosen.score, Scorer):
            stage(f"running {chosen.score.file}: it is code, and may do what you may, apart from the network")
        found.setdefault(chosen.score.name, chosen.score)
    return list(found.values())


@dataclass(frozen=True)
class _Chosen:
    """The data settings for an adapter and its chats; those with one `key` have the same rows."""

    settings: Data
    format: ChatFormat
    thinking: bool | None

    @property
    def key(self) -> str:
        return f"{self.settings.model_dump_json()} {self.thinking} {self.format.template}"

    def with_settings(self, settings: Data) -> _Chosen:
        """The same chats with other settings for the rows."""
        return replace(self, settings=settings)

    def questions(self, file: Path, tokenizer: Any, exact: bool, progress: OnFile) -> Questions:
        """The rows of a file, and with `exact` their prompts and answers."""
        return questions(
            str(file), self.settings, tokenizer,
            exact=exact, format=self.format, thinking=self.thinking, progress=progress,
        )  # fmt: skip


def _chosen(adapter: StoredAdapter | None, settings: Settings, tokenizer: Any) -> _Chosen:
    """The settings to use for an adapter, with the template that lies beside it unless another one was asked for."""
    own = _own(adapter) if adapter else None
    chosen = settings(own)
    asked = {"on": True, "off": False}.get(chosen.thinking)
    thinking = asked if asked is not None or adapter is None else adapter.manifest.thinking
    if adapter is None or adapter.chat_template is None or chosen.template != (own or {}).get("template"):
        return _Chosen(chosen, ChatFormat.of(tokenizer, chosen), thinking)
    return _Chosen(chosen, replace(trained(adapter).format(tokenizer), arguments=chosen.template_args), thinking)


def _trained_on(file: Path, data: str, stored: Sequence[StoredAdapter]) -> str | None:
    """What to say where `file` holds training rows: those of an adapter, by their hash, or a folder's train file."""
    digest = sha256(file)
    names = [
        name
        for name, adapter in zip(_names(stored), stored, strict=True)
        for entry in adapter.manifest.data
        if entry.get("sha256") == digest and Path(str(entry.get("file"))).stem != "valid"
    ]
    nothing = "the score says nothing about new ones; keep rows aside in a test.jsonl, or name another file"
    if names:
        return f"{file} holds the rows that {', '.join(dict.fromkeys(names))} learned: {nothing}"
    if file != paths.existing(data) and file.stem == "train":
        return f"{data} has no test or valid file, so its training rows are used: {nothing}"
    return None


def _own(adapter: StoredAdapter) -> dict[str, Any] | None:
    return adapter.manifest.recipe["data"] if adapter.manifest.recipe else None


def _names(stored: Sequence[StoredAdapter]) -> list[str]:
    """Names, or paths where two adapters have the same name."""
    names = [adapter.name for adapter in stored]
    return [name if names.count(name) == 1 else str(adapter.path) for name, adapter in zip(names, stored, strict=True)]
