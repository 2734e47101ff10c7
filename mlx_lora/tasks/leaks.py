"""`study leaks`: how much of its training rows an adapter gives away, measured beside its base and held-out rows.

The rows are read again from the user's files. The report has numbers, row numbers and a hash; the text of rows that
came back goes only into a file that the user names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import ui
from mlx_lora.data import write
from mlx_lora.data.canaries import Canary
from mlx_lora.data.encode import Encoder
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.rows import Row, common
from mlx_lora.data.sources import FORMATS
from mlx_lora.data.splits import find_splits
from mlx_lora.data.system import with_system
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store.adapter import read
from mlx_lora.study import leaks
from mlx_lora.study.leak_report import ANSWERS, RESTS, Extraction, Leaks, Losses, Planted
from mlx_lora.study.leaks import Beginning, Share
from mlx_lora.tasks.leak_rows import Gathered, Part, gather
from mlx_lora.tasks.opened import Settings, open_adapters


@dataclass(frozen=True)
class Depth:
    """How thorough an audit is: `rows` training rows at most and as many others, `given` tokens of a row that are given
    to get the rest, and `candidates` that each planted secret is ranked among, beside itself."""

    rows: int = 200
    given: int = 8
    candidates: int = 255


def audit_leaks(
    model: str | None,
    adapter: str,
    data: str,
    settings: Settings,
    *,
    held_out: str | None = None,
    depth: Depth | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: OnFile = silent,
    stage: Callable[[str], None] = lambda text: None,
) -> Leaks:
    """What `adapter` gives away of the training rows in `data`; `settings` as for `evaluate_adapters`.

    Rows that came back are written to `out`, a .jsonl file, with their text, where one is named. Raises DataError for
    rows that can't be read, AdapterError for an adapter that isn't there.
    """
    # a wrong path is said before anything is loaded
    sources = [file for path in (data, held_out) if path for file in find_splits(path).values()]
    if out is not None:
        write.check_targets([out], force=force, sources=sources)
    stored, depth = read(registry.find(adapter)), depth or Depth()
    opened = open_adapters(model, [stored], settings, stage=stage)
    chosen = opened.chosen[stored.name]
    encoder = Encoder(opened.engine.loaded.tokenizer, chosen.settings, chosen.format)
    found = gather(data, held_out, encoder, stored.manifest, most=depth.rows, progress=progress)
    audit = _Audit(opened.engine, stored.name, encoder, found, depth, progress)
    report = audit.run()
    if out is not None:
        with write.files_written([out]) as files:
            for row in audit.came_back:
                files[out].write((ui.json_text(row) + "\n").encode())
        stage(f"{out} has the text of {len(audit.came_back)} rows that came back")
    return report


class _Audit:
    """One adapter beside its base. `came_back` are rows that the adapter gave back, with their text."""

    def __init__(
        self, engine: Engine, name: str, encoder: Encoder, found: Gathered, depth: Depth, progress: OnFile
    ) -> None:
        self.engine, self.name, self.encoder = engine, name, encoder
        self.found, self.depth, self.progress = found, depth, progress
        self.came_back: list[dict[str, Any]] = []
        engine.use(name)
        self.ends = engine.ends
        self.shared = leaks.shared_beginning([*found.members.rows, *found.others.rows])

    def run(self) -> Leaks:
        found = self.found
        return Leaks(
            adapter=self.name,
            file=str(found.members.file),
            sha256=found.sha256,
            rows=len(found.members.rows),
            held_out_file=str(found.others.file) if found.others.rows else None,
            others=len(found.others.rows),
            given=self.depth.given,
            losses=self._losses() if found.others.rows else None,
            extraction=[self._extracted(asked) for asked in (ANSWERS, RESTS) if self._asked(asked, found.members)],
            canaries=self._planted() if found.planting else [],
            candidates=self.depth.candidates + 1,
            notes=found.notes,
        )

    def _losses(self) -> Losses:
        members, others = self.found.members.rows, self.found.others.rows
        advance = self.progress("losses", 2 * (len(members) + len(others)))
        each = {
            name: [leaks.row_losses(self.engine, name, rows, advance) for rows in (members, others)]
            for name in (None, self.name)
        }
        base, adapter = each[None], each[self.name]
        return Losses(
            float(base[0].mean()), float(adapter[0].mean()), float(base[1].mean()), float(adapter[1].mean()),
            leaks.membership(*base), leaks.membership(*adapter),
            leaks.membership(adapter[0] - base[0], adapter[1] - base[1]),
        )  # fmt: skip

    def _asked(self, asked: str, part: Part) -> list[Beginning]:
        if not part.rows:
            return []
        if asked == ANSWERS:
            return leaks.answers_asked(part.rows, self.ends)
        return leaks.rests_asked(part.rows, self.ends, given=self.depth.given, shared=self.shared)

    def _extracted(self, asked: str) -> Extraction:
        members, others = (self._asked(asked, part) for part in (self.found.members, self.found.others))
        advance = self.progress("answers" if asked == ANSWERS else "rests of rows", 2 * (len(members) + len(others)))
        base, back = (leaks.given_back(self.engine, name, members, advance) for name in (None, self.name))
        shares = [Share(int(each.sum()), len(each)) for each in (base, back)]
        held: list[Share | None] = [None, None]
        if others:
            each = [leaks.given_back(self.engine, name, others, advance) for name in (None, self.name)]
            held = [Share(int(one.sum()), len(others)) for one in each]
        numbers = self.found.members.numbers
        self.came_back += [self._text(one, asked, numbers) for one, came in zip(members, back, strict=True) if came]
        rows = {int(numbers[one.number]) for one, came in zip(members, back & ~base, strict=True) if came}
        tokens = int(np.median([len(one.wanted) for one in members]))
        return Extraction(asked, shares[0], shares[1], held[0], held[1], sorted(rows), tokens)

    def _text(self, one: Beginning, asked: str, numbers: np.ndarray) -> dict[str, Any]:
        decode = self.engine.loaded.tokenizer.decode
        return {
            "row": int(numbers[one.number]), "asked": asked,
            "given": decode(list(one.given)), "came_back": decode(list(one.wanted)),
        }  # fmt: skip

    def _planted(self) -> list[Planted]:
        """Exposure and extraction of every canary, by how often it was planted."""
        assert self.found.planting
        all_canaries = self.found.planting.canaries
        advance = self.progress("planted secrets", 2 * len(all_canaries) * (self.depth.candidates + 2))
        found: dict[int, list[tuple[float, float, bool, bool]]] = {}
        for canary in all_canaries:
            rows = self._candidates(canary)
            exposures, extracted = [], []
            start = min(common(rows[0].tokens.tolist(), other.tokens.tolist()) for other in rows[1:])
            asked = [leaks.beginning(0, rows[0], start, self.ends)]
            for name in (None, self.name):
                losses = leaks.row_losses(self.engine, name, rows, advance)
                exposures.append(leaks.exposure(losses[0], losses[1:]))
                extracted.append(bool(leaks.given_back(self.engine, name, asked, advance)[0]))
            found.setdefault(canary.repeats, []).append((exposures[0], exposures[1], extracted[0], extracted[1]))
        most = np.log2(self.depth.candidates + 1) - 1e-9
        groups = {repeats: [np.array(values) for values in zip(*each, strict=True)] for repeats, each in found.items()}
        return [
            Planted(
                repeats, len(base), int((base >= most).sum()), int((own >= most).sum()),
                int(of_base.sum()), int(of_own.sum()), float(base.mean()), float(own.mean()),
            )
            for repeats, (base, own, of_base, of_own) in groups.items()
        ]  # fmt: skip

    def _candidates(self, canary: Canary) -> Sequence[Row]:
        """The canary's row, then the rows that it would be with other secrets, as training encodes them."""
        planting, settings = self.found.planting, self.encoder.settings
        assert planting
        secrets = [canary.secret, *canary.others(self.depth.candidates, planting.seed)]
        examples = [FORMATS[planting.format].parse(canary.row(planting.format, secret)) for secret in secrets]
        if settings.system:
            examples = [with_system(example, settings.system) for example in examples]
        return [leaks.as_row(*one.rows[0]) for one in self.encoder.encoded(examples)]
