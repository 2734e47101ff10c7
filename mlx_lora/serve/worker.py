"""What the generating thread does: rows wait, begin in a lane, take part in passes and end. See `serve.scheduler`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.adapters.mixed import Mixed
from mlx_lora.errors import TooLong
from mlx_lora.models import token_ids
from mlx_lora.models.context import context_length
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.lane import Lane
from mlx_lora.serve.lookup import Passes, find_passes
from mlx_lora.serve.prefill import chunk_size
from mlx_lora.serve.prompt_cache import PromptCache
from mlx_lora.serve.quantized import quantized
from mlx_lora.serve.requests import Failed
from mlx_lora.serve.residence import Residence
from mlx_lora.serve.room import Room
from mlx_lora.serve.rows import RowsModel
from mlx_lora.serve.running import Ended, Kept, Row
from mlx_lora.serve.status import DEFAULT, Limits, Options, Status
from mlx_lora.serve.ways import ALONE, Way, find_way, mixing_fault

# Passes of a lane before the next lane's turn: putting other wrappers into a model takes a few milliseconds.
TURN = 8
# Tokens of a chunk of a prompt at most: what runs beside it waits that long for its next token.
CHUNK = 256
# Seconds between two passes that loading adapters may take, and between two looks at what has arrived without passes.
LOADING, ONLY_LOADING = 0.01, 1.0

Done = Callable[[BaseException | None], None]
Leave = Callable[[Row], bool]

log = logging.getLogger(__name__)


class Worker:
    """The rows of a scheduler on a loaded base. `leave(row)` notes that a row has ended, and says whether it was open.

    Made and used in one thread.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, leave: Leave, options: Options = DEFAULT, **residence: Any):
        self.loaded, self.limits, self._leave = loaded, limits, leave
        self._options, self._context = options, None if options.any_length else context_length(loaded.config)
        put(loaded.model, {})
        self.waiting: deque[Row] = deque()
        self.prompts = PromptCache(limits.prompt_cache_bytes)
        self.residence = Residence(
            loaded, limit=limits.adapter_bytes, on_gone=self.prompts.drop, trial=self._try_mixing, **residence
        )
        self._wanted: list[tuple[str, Done]] = []
        self._name = str(loaded.config.get("model_type", "this model"))
        self._make_cache = make_cache = quantized(loaded.model, self._name, options.kv_bits)
        alone = Way(ALONE, 1, make_cache.note if make_cache and limits.rows > 1 else None)
        self.way = alone if make_cache or limits.rows == 1 else find_way(loaded.model, self._name)
        if self.way.note:
            log.info(self.way.note)
        passes = find_passes(loaded.model, self._name, make_cache) if options.lookup else None
        self._passes = passes if isinstance(passes, Passes) else None
        self.no_lookup = passes if isinstance(passes, str) else None
        self._room = Room(loaded.model, self.prompts, make_cache)
        self._chunk = min(CHUNK, chunk_size(loaded.model))
        self._lanes: dict[Hashable | None, Lane] = {None: self._lane(None)}
        self._turn = 0
        self._installed: tuple[Hashable | None, int] | None = None
        self._counts: dict[str, Any] = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "passes": 0}
        self._counts |= {"drafted_tokens": 0, "held_tokens": 0}

    def _try_mixing(self, mixed: Mixed, key: Hashable, wrappers: Wrappers) -> str | None:
        """`residence.Trial`: why an adapter has passes of its own on this model, by name."""
        self._installed = None
        if (fault := mixing_fault(mixed, key, wrappers, self.way)) is None:
            return None
        log.info("%s: an adapter is answered by itself, because in a pass with others %s", self._name, fault)
        return f"{self._name} can't mix adapters in a pass: {fault}"

    def _lane(self, held: Any) -> Lane:
        model = RowsModel(self.loaded.model, self.residence.mixed.rows)
        lane = Lane(
            model, self.way, adapter=held, rows=self.limits.rows, chunk=self._chunk, passes=self._passes,
            make_cache=self._make_cache, throughput=self._options.throughput,
        )  # fmt: skip
        if held is not None:
            model.publish = lane.only_own
        return lane

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until something arrives; rows may wait for a file that is being read."""
        awaits = self.residence.awaits
        waiting = [row for row in self.waiting if not (row.loading and awaits(row.request.adapter))]
        return not (self._running() or waiting or self.residence.loading)

    def turn(self) -> None:
        """Go on loading adapters, begin the rows that can begin, and run one pass."""
        self.residence.load_on(LOADING if self._running() else ONLY_LOADING)
        self._tell_wanted()
        self._keep_room()
        self._admit()
        if (lane := self._next_lane()) is not None:
            self._pass(lane)

    def _keep_room(self) -> None:
        """Where the machine is about to swap, give up what is kept of prompts, then the row that began last."""
        if (rows := self._running()) and (fault := self._room.fault()) is not None:
            last = max(rows, key=lambda row: row.begun)
            self._lanes[last.key if last.held and last.held.alone else None].remove(last)
            self._fail(last, fault)

    def want(self, name: str, done: Done) -> None:
        """Bring an adapter into memory, and call `done` with None or with what went wrong."""
        self._wanted.append((name, done))
        self._tell_wanted()

    def _tell_wanted(self) -> None:
        for wanted in list(self._wanted):
            name, done = wanted
            try:
                if (held := self.residence.lease(name)) is None:
                    continue
                self.residence.release(held)
                done(None)
            except Exception as error:
                done(error)
            self._wanted.remove(wanted)

    def end_all(self) -> None:
        for row in [*self.waiting, *self._running()]:
            self._end(row, "cancelled")
        self.close()

    def close(self) -> None:
        """Give up what runs without telling anybody."""
        for lane in self._lanes.values():
            lane.close()
        self.residence.close()

    def _running(self) -> list[Row]:
        return [row for lane in self._lanes.values() for row in lane.rows.values()]

    def _admit(self) -> None:
        """Move rows that wait into their lanes, in order; a row whose lane is full lets others pass.

        One that waits for memory, or for a lane to itself, doesn't: it would wait for as long as others come.
        """
        for row in list(self.waiting):
            if len(running := self._running()) >= self.limits.rows:
                return
            try:
                if (lane := self._lane_of(row)) is not None and self._room.admits(row, running):
                    self._insert(lane, row)
                    self.waiting.remove(row)
                elif lane is not None or row.suspect:
                    return
            except Exception as error:
                self.waiting.remove(row)
                self._fail(row, error)

    def _lane_of(self, row: Row) -> Lane | None:
        """The lane that a row belongs to; None while that has no place, or while the adapter loads."""
        if row.held is None and not self._prepare_row(row):
            return None
        key = row.key if row.held is not None and row.held.alone is not None else None
        if key not in self._lanes:
            self._lanes[key] = self._lane(row.held)
        return self._lanes[key] if self._lanes[key].takes(row) else None

    def _insert(self, lane: Lane, row: Row) -> None:
        layers, cached = self.prompts.find(row.key, row.tokens)
        lane.insert(row, layers, cached, self.prompts.shared(row.key, row.tokens))
        self._counts["prompt_tokens"] += len(row.tokens)
        self._counts["cached_tokens"] += cached

    def _prepare_row(self, row: Row) -> bool:
        """The adapter, the prompt with its virtual tokens, the tokens that end the answer; False while one loads."""
        request, tokenizer = row.request, self.loaded.tokenizer
        if not row.prompt:
            token_ids.check(tokenizer, request.tokens)
        if request.adapter is not None:
            row.held = self.residence.lease(request.adapter)
            row.loading = row.held is None
            if row.loading:
                return False
        virtual = row.held.virtual if row.held else None
        row.prompt = virtual.prompt(request.tokens, request.first_answer) if virtual else list(request.tokens)
        self._check_length(row)
        row.ends = frozenset(tokenizer.eos_token_ids) | (row.held.ends if row.held else frozenset())
        return True

    def _check_length(self, row: Row) -> None:
        """An answer ends where the model's context does; raises TooLong for a prompt that is longer."""
        row.most = row.request.max_tokens
        if (context := self._context) is None:
            return
        if len(row.prompt) > context:
            raise TooLong(f"the prompt has {len(row.prompt):,} tokens, this model's context is {context:,}")
        row.most = min(row.most, context - len(row.prompt) + 1)  # the last token is never read

    def _next_lane(self) -> Lane | None:
        """The lane whose turn it is, out of those with rows; lanes of adapters that have no rows go."""
        for key, lane in list(self._lanes.items()):
            if key is not None and not lane.rows:
                lane.close()
                del self._lanes[key]
        busy = [lane for lane in self._lanes.values() if lane.rows]
        if not busy:
            return None
        self._turn += 1
        return busy[self._turn // TURN % len(busy)]

    def _install(self, lane: Lane) -> None:
        """Put the wrappers of a lane into the model, where others are in it."""
        mixed = self.residence.mixed
        wrappers = lane.adapter.wrappers if lane.adapter else mixed.wrappers
        wanted = (lane.adapter.key if lane.adapter else None, len(wrappers))
        if self._installed != wanted:
            put(self.loaded.model, wrappers)
            self._installed = wanted

    def _pass(self, lane: Lane) -> None:
        before, drafted, held = lane.model.passes, lane.drafted, lane.held
        try:
            self._install(lane)
            for result in lane.step():
                self._keep(result)
                if isinstance(result, Ended):
                    self._ended_row(result)
        except Exception as error:
            self._run_again(lane, error)
        self._counts["passes"] += lane.model.passes - before
        self._counts["drafted_tokens"] += lane.drafted - drafted
        self._counts["held_tokens"] += lane.held - held

    def _run_again(self, lane: Lane, error: Exception) -> None:
        """After a pass that failed: its rows begin again one by one, and one that fails by itself gets the error."""
        rows = lane.abandon()
        log.warning("a pass of %d rows failed, they begin again: %r", len(rows), error)
        for row in reversed(rows):
            if row.suspect or len(rows) == 1:
                self._fail(row, error)
            else:
                row.suspect = True
                self.waiting.appendleft(row)

    def _keep(self, result: Ended | Kept) -> None:
        """Keep caches, but not those of an adapter that has been replaced."""
        held = result.row.held
        if result.layers is not None and (held is None or self.residence.is_current(held)):
            self.prompts.put(result.row.key, result.tokens, result.layers)

    def _ended_row(self, ended: Ended) -> None:
        row = ended.row
        if row.error is not None:
            self._fail(row, row.error)
        else:
            self._end(row, ended.reason)

    def cancel(self, row: Row) -> None:
        """Take a row out, keeping what it has read."""
        if row in self.waiting:
            self.waiting.remove(row)
        for lane in self._lanes.values():
            if (kept := lane.remove(row, keep=True)) is not None:
                self._keep(Kept(row, *kept))
                break
        self._end(row, "cancelled")

    def _end(self, row: Row, reason: str) -> None:
        if self._left(row):
            self._counts["generated_tokens"] += len(row.answer)
            row.deliver(row.finished(reason))

    def _fail(self, row: Row, error: BaseException) -> None:
        if self._left(row):
            row.deliver(Failed(error))

    def _left(self, row: Row) -> bool:
        """Whether a row has ended just now, and not before."""
        if row.held is not None:
            self.residence.release(row.held)
            row.held = None
        return self._leave(row)

    def status(self) -> Status:
        return Status(
            alive=True, running=sum(len(lane.rows) for lane in self._lanes.values()), waiting=len(self.waiting),
            quiet_seconds=0.0, **self._counts, prompt_cache_bytes=self.prompts.nbytes,
            prompt_cache_hits=self.prompts.hits, prompt_cache_misses=self.prompts.misses,
            adapter_bytes=self.residence.nbytes, adapters=tuple(self.residence.names()),
            alone=tuple(self.residence.why_alone().items()), way=self.way,
            no_lookup=self.no_lookup,
        )  # fmt: skip
