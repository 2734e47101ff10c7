"""Recorded figures become the README's tables and the plots. Nothing is measured here.

`python -m tests.bench --tables` writes between the markers; a test compares, so a README can't claim other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.bench import plots, results
from tests.readme import README

START, END = "<!-- bench -->\n", "<!-- /bench -->"
Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table under its title; every column but the first is set to the right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """Three digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def block() -> str:
    """What stands between the markers: the machine where it changes, then each benchmark's tables with its command."""
    parts, last = [], ""
    for name, record in results.read().items():
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


def written() -> str:
    """README.md with the block as the recorded figures want it; without markers, as it is."""
    text = README.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{block()}{END}{after}" if start else text


def write() -> None:
    """Redraw README and plots."""
    if START not in README.read_text(encoding="utf-8"):
        raise SystemExit(f"README.md has no {START.strip()} … {END}")
    README.write_text(written(), encoding="utf-8")
    plots.draw(results.read(), results.FOLDER)
