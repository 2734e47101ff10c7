"""A base and adapters by name in one engine, each with the data settings and the chats that it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.unpack import unpack_once
from mlx_lora.serve.conversation import trained
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.study.evaluate import Questions, questions

# Turns an adapter's own data settings (None: it has none) into those to use.
Settings = Callable[[dict[str, Any] | None], Data]


@dataclass(frozen=True)
class Chosen:
    """The data settings for an adapter and its chats; those with one `key` have the same rows."""

    settings: Data
    format: ChatFormat
    thinking: bool | None

    @property
    def key(self) -> str:
        return f"{self.settings.model_dump_json()} {self.thinking} {self.format.template}"

    def with_settings(self, settings: Data) -> Chosen:
        """The same chats with other settings for the rows."""
        return replace(self, settings=settings)

    def questions(self, file: Path, tokenizer: Any, exact: bool, progress: OnFile) -> Questions:
        """The rows of a file, and with `exact` their prompts and answers."""
        return questions(
            str(file), self.settings, tokenizer,
            exact=exact, format=self.format, thinking=self.thinking, progress=progress,
        )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A base and adapters in one engine, which has them by the names of `stored`.

    `chosen` has each one's data settings, the base's (None) being the first's.
    """

    engine: Engine
    stored: dict[str, StoredAdapter]
    chosen: dict[str | None, Chosen]


def open_adapters(
    model: str | None,
    adapters: Sequence[StoredAdapter],
    settings: Settings,
    *,
    stage: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Load a base, by default that of the adapters, once, with all of them.

    Raises before loading for adapters that don't belong.
    """
    opened = base_for(model, adapters)
    stage(f"loading {model or registry.base_name(opened.path)}")
    loaded = registry.open_base(opened, adapters)
    unpack_once(loaded)
    engine = Engine(loaded)
    chosen: dict[str | None, Chosen] = {None: _chosen(adapters[0] if adapters else None, settings, loaded.tokenizer)}
    named = dict(zip(names(adapters), adapters, strict=True))
    for name, adapter in named.items():
        chosen[name] = _chosen(adapter, settings, loaded.tokenizer)
        engine.add(name, wrappers_for(loaded.model, adapter), end=chosen[name].format.own_end)
    return Opened(engine, named, chosen)


def names(adapters: Sequence[StoredAdapter]) -> list[str]:
    """Names, or paths where two adapters have the same name."""
    found = [adapter.name for adapter in adapters]
    return [
        name if found.count(name) == 1 else str(adapter.path) for name, adapter in zip(found, adapters, strict=True)
    ]


def _chosen(adapter: StoredAdapter | None, settings: Settings, tokenizer: Any) -> Chosen:
    """The settings to use for an adapter, with the template that lies beside it unless another one was asked for."""
    own = adapter.manifest.recipe["data"] if adapter and adapter.manifest.recipe else None
    chosen = settings(own)
    asked = {"on": True, "off": False}.get(chosen.thinking)
    thinking = asked if asked is not None or adapter is None else adapter.manifest.thinking
    if adapter is None or adapter.chat_template is None or chosen.template != (own or {}).get("template"):
        return Chosen(chosen, ChatFormat.of(tokenizer, chosen), thinking)
    return Chosen(chosen, replace(trained(adapter).format(tokenizer), arguments=chosen.template_args), thinking)
