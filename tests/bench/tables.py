"""Recorded figures become the tables of three documents, and plots. Nothing is measured here.

`python -m tests.bench --tables` writes between the markers; a test compares, so a document can't claim other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import plots, results

README = results.FOLDER.parent / "README.md"
TOP = results.FOLDER.parents[2] / "README.md"
INTEROP = TOP.parent / "mlx_lora" / "interop" / "README.md"
Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table under its title; every column but the first is set to the right."""
    return f"{title}\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """Three digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def block() -> str:
    """What stands between the markers: the machine where it changes, then each benchmark's tables with its command."""
    return _block(results.read())


def merged() -> str:
    """The tables of `merged` alone, for the document about merging."""
    return _block({name: record for name, record in results.read().items() if name == "merged"})


def _block(records: dict[str, dict[str, Any]]) -> str:
    parts, last = [], ""
    for name, record in records.items():
        here = f"On {_machine(record['machine'])}:\n"
        parts += [here] if here != last else []
        parts += [markdown(*table) for table in results.case(name).tables(record["figures"])]
        parts.append(f"`{record['command']}`, {record['date']}.\n")
        last = here
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    blas = ", OpenBLAS" if machine["openblas"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB{blas}; {versions}"


def headline() -> str:
    """The README's table: the same float32 step here and in another tool, measured in one sitting a line."""
    records = {name: record["figures"] for name, record in results.read().items()}
    step, long = records["mlx_lm"]["float32, completion"], records["length"]["bases"]["float32"]["2048"]
    wide, peft = records["vocabulary"]["262144"], records["peft"]
    sittings = [
        ("mlx_lm, four rows of 96", step, "mlx_lm", "peak_bytes"),
        ("mlx_lm, one row of 2,048", long, "mlx_lm", "peak_bytes"),
        ("mlx_lm, 262,144 words in the vocabulary", wide, "mlx_lm", "peak_bytes"),
        ("PEFT on torch, four rows of 96", peft, "peft", "process_bytes"),
    ]
    header = ["", "theirs", "ours", "times faster", "of their memory", "ours, checkpointing", "of their memory"]
    rows = [[label, *_beside(found, peer, key)] for label, found, peer, key in sittings]
    return _table(header, rows)


def _beside(found: dict[str, Any], peer: str, key: str) -> list[str]:
    """Seconds and gigabytes of a peer and of ours, and ratios, with checkpointing where it was measured."""
    theirs, ours, again = found[peer], found["ours"], found.get("ours, checkpointing")
    shown = [f"{side['seconds']:.3g} s, {side[key] / 1e9:.3g} GB" for side in (theirs, ours)]
    shown += [f"{theirs['seconds'] / ours['seconds']:.2f}", f"{ours[key] / theirs[key]:.2f}"]
    return shown + ([f"{again['seconds']:.3g} s", f"{again[key] / theirs[key]:.2f}"] if again else ["", ""])


def written() -> dict[Path, str]:
    """The documents with their blocks as the recorded figures want them."""
    wanted = ((README, "bench", block()), (TOP, "headline", headline()), (INTEROP, "merged", merged()))
    return {file: _between(file.read_text(encoding="utf-8"), name, text) for file, name, text in wanted}


def _between(document: str, name: str, text: str) -> str:
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise SystemExit(f"a document has no {start.strip()} … {end}")
    before, _, rest = document.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}{text}{end}{after}"


def write() -> None:
    """Redraw documents and plots."""
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
    plots.draw(results.read(), results.FOLDER)
