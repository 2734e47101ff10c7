"""Many requests, known beforehand, in the thread that asks: the scheduler's batches without its queues.

For a program that owns the model already and has nothing else to do meanwhile, such as an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.machine import allocation
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.requests import Event, Failed, Finished, Request
from mlx_lora.serve.running import Row
from mlx_lora.serve.status import Limits, Options
from mlx_lora.serve.worker import Worker

ROWS = 32


@dataclass(frozen=True)
class Given:
    """An adapter on this base, and the token that ends its answers beside the tokenizer's."""

    wrappers: Wrappers
    end: int | None = None


def answered(
    loaded: LoadedModel, requests: Sequence[Request], adapters: Mapping[str, Given], *, rows: int = ROWS
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the request, tokens of its answer) as answers end, the shorter prompts first.

    Requests name `adapters` by their keys. A prompt may be longer than the model's context. Raises what the first
    request that fails fails with. The model has no adapter in it afterwards.
    """
    limits = Limits(rows=rows, prompt_cache_bytes=0, adapter_bytes=1 << 62)
    ended: list[tuple[int, Row, Event]] = []

    def deliver_to(index: int, row: Row) -> Callable[[Event], None]:
        return lambda event: ended.append((index, row, event)) if isinstance(event, Finished | Failed) else None

    left = iter(sorted(range(len(requests)), key=lambda index: len(requests[index].tokens)))
    with allocation.memory_limits(lean=False):
        worker = Worker(loaded, limits, lambda row: True, Options(lookup=False, any_length=True, throughput=True))
        try:
            for name, given in adapters.items():
                worker.residence.give(name, given.wrappers, end=given.end)
            while True:
                while len(worker.waiting) < rows and (index := next(left, None)) is not None:
                    row = Row(requests[index], lambda event: None)
                    row.deliver = deliver_to(index, row)
                    worker.waiting.append(row)
                if worker.idle:
                    return
                worker.turn()
                while ended:
                    index, row, event = ended.pop()
                    if isinstance(event, Failed):
                        raise event.error
                    yield index, [token.token for token in row.answer]
        finally:
            worker.close()
            put(loaded.model, {})
