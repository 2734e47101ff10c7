"""doctor and selftest: what this machine has, and whether it computes what it should."""

from __future__ import annotations

from typing import Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(selftest)


def doctor(json: Json = False) -> None:
    """Say what this machine has and what it lacks."""
    from mlx_lora.tasks.doctor import examine

    found = examine()
    if json:
        ui.as_json({**found.facts, "warnings": found.warnings})
        return
    _show(found.facts)
    for warning in found.warnings:
        ui.warning(warning)


def selftest(json: Json = False) -> None:
    """Hold this device against numpy and the CPU backend, on the embedded base. Exit code 1 when they differ."""
    from mlx_lora.tasks.selftest import selftest as run

    report = run(stage=ui.note)
    if json:
        ui.as_json(report.as_dict())
    else:
        _show(report.facts)
        rows = [(line.name, line.against, line.difference, line.tolerance, _verdict(line)) for line in report.lines]
        ui.table(["check", "against", "difference", "tolerance", ""], rows)
    if not report.passed:
        failed = sum(not line.passed for line in report.lines)
        ui.warning(f"{failed} of {len(report.lines)} checks failed: please report them, with all of the above")
        raise typer.Exit(code=1)


def _verdict(line: Any) -> str:
    return "passed" if line.passed else f"FAILED {line.error or ''}".strip()


def _show(facts: dict[str, Any]) -> None:
    """Facts by name, one a line."""
    for name, value in facts.items():
        if value is not None:
            ui.result(f"{_label(name):18} {_fact(name, value)}")


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _fact(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return ui.size(value)
    if isinstance(value, dict):
        return ", ".join(f"{_label(key)} {_fact(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
