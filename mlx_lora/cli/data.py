"""data check, split, convert and redact; canaries are in `leaks`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli import leaks
from mlx_lora.cli.options import Force, Json, Overrides, data_settings, progress

if TYPE_CHECKING:
    from mlx_lora.data.check import Report
    from mlx_lora.tasks.convert_data import Converted

SHOWN = 20
WIDTH = 60
NAMES = {
    "email": "e-mail address",
    "phone": "phone number",
    "card": "payment card",
    "iban": "IBAN",
    "key": "secret key",
}

DataPath = Annotated[str, typer.Argument(metavar="PATH", help="A file, or a folder with train, valid and test.")]
OneFile = Annotated[str, typer.Argument(metavar="PATH", help="A file, or a folder with one.")]
OutFile = Annotated[Path, typer.Option("--out", help="The .jsonl file to write.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Look at data before training on it, and write it anew.", no_args_is_help=True, rich_markup_mode=None
    )
    for command in (check, split, convert, redact, leaks.canaries):
        group.command()(command)
    app.add_typer(group, name="data")


def check(
    path: DataPath,
    settings: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Count tokens with this model's tokenizer.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print the first rows, marking what is learned.")] = 0,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Count rows of valid and test that train has, without a problem.")
    ] = False,
    json: Json = False,
) -> None:
    """Check every row: problems with file and line, tokens, duplicates, leaks, labels, personal data.

    Exit code 1 when there are problems.
    """
    from mlx_lora.tasks.check_data import check_data

    if show and model is None:
        raise typer.BadParameter("--show needs --model, whose tokenizer and chat template it shows")
    chosen = data_settings(settings)
    with ExitStack() as stack:
        report = check_data(path, chosen, model, allow_leaks=allow_leaks, progress=progress(stack))
    if show and model is not None:
        _show_samples(path, chosen, model, show)
    if json:
        ui.as_json(report.as_dict())
    else:
        for problem in report.problems[:SHOWN]:
            ui.result(str(problem))
        if len(report.problems) > SHOWN:
            ui.result(f"… and {len(report.problems) - SHOWN} more")
        for name, value in _facts(report):
            ui.result(f"{name:16} {value}")
        for note in report.notes:
            ui.note(f"({note})")
    if report.problems:
        raise typer.Exit(code=1)


def split(
    path: OneFile,
    out: Annotated[Path, typer.Option("--out", help="The folder to write train, valid and test files to.")],
    settings: Overrides = None,
    valid: Annotated[float, typer.Option("--valid", help="Share of the rows for valid.jsonl.")] = 0.1,
    test: Annotated[float, typer.Option("--test", help="Share of the rows for test.jsonl.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another number parts the rows in another way.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Part a file's rows into train, valid and test: what belongs together stays together, and new rows move none."""
    from mlx_lora.data.split import Fractions
    from mlx_lora.tasks.split_data import split_data

    try:
        fractions = Fractions(valid, test)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with ExitStack() as stack:
        done = split_data(
            path, out, data_settings(settings), fractions=fractions, seed=seed, force=force, progress=progress(stack)
        )
    if json:
        ui.as_json(done.as_dict())
        return
    for name, rows in done.rows.items():
        ui.result(f"{out / f'{name}.jsonl'}: {_counted(rows, 'row')}")
    if done.groups < sum(done.rows.values()):
        ui.result(f"{done.groups:,} groups of rows that begin alike were kept together")
    _note_learn_more(done.learn_more)


def convert(
    path: OneFile,
    out: OutFile,
    settings: Overrides = None,
    hide: Annotated[
        bool, typer.Option("--redact", help="Put [email], [phone], [card], [iban] and [key] in place of such data.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write rows of any format as messages (.jsonl), or as text where they are plain text."""
    _show_converted(_convert(path, out, settings, hide=hide, force=force), json=json)


def redact(
    path: OneFile,
    out: OutFile,
    settings: Overrides = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write rows as convert --redact does, without e-mail addresses, numbers and keys; names stay."""
    _show_converted(_convert(path, out, settings, hide=True, force=force), json=json)


def _convert(path: str, out: Path, settings: list[str] | None, *, hide: bool, force: bool) -> Converted:
    from mlx_lora.tasks.convert_data import convert_data

    with ExitStack() as stack:
        chosen = data_settings(settings)
        return convert_data(path, out, chosen, redact=hide, force=force, progress=progress(stack))


def _show_converted(done: Converted, *, json: bool) -> None:
    if json:
        ui.as_json(done.as_dict())
        return
    ui.result(f"{done.out}: {_counted(done.rows, 'row')} of format {done.format}")
    if done.redacted is not None:
        ui.result(f"redacted: {_personal(done.redacted)}; what has no form of its own, like names, is still there")
    _note_learn_more(done.learn_more)


def _note_learn_more(rows: int) -> None:
    if rows:
        ui.note(f"{_counted(rows, 'row')} learned the last answer alone; data.mask=last keeps it so for messages")


def _show_samples(path: str, settings: Any, model: str, count: int) -> None:
    from mlx_lora.data.check import samples
    from mlx_lora.data.encode import Encoder
    from mlx_lora.data.read import find_splits
    from mlx_lora.models.open import load_tokenizer

    first = next(iter(find_splits(path).values()))
    for runs in samples(first, Encoder(load_tokenizer(model), settings), count):
        ui.runs_of_text(runs)


def _facts(report: Report) -> Iterable[tuple[str, str]]:
    """The report as lines for people: a name, and what there is to say; lines that would say nothing are left out."""
    files = ", ".join(f"{rows:,} in {file}" for file, rows in report.files.items())
    yield "format", report.format or "none"
    if report.columns:
        yield "columns", ", ".join(f"{role}: {column}" for role, column in report.columns.items())
    yield "rows", files if len(report.files) > 1 else f"{report.rows:,}"
    yield from _sizes(report)
    if report.labels:
        for index, (label, rows) in enumerate(report.labels.items()):
            yield "" if index else "answers", f"{label}: {rows:,} ({rows / report.rows:.0%})"
    yield "empty", f"{_counted(report.empty_rows, 'row')}, {_counted(report.empty_answers, 'answer')}"
    yield "duplicates", f"{_counted(report.duplicates, 'row')}"
    near = report.near_duplicates
    if near["pairs"]:
        seen = f"among {near['rows_sampled']:,} different rows"
        across = f", {near['across_splits']:,} of them in another file" if near["across_splits"] else ""
        yield (
            "",
            f"{_counted(near['pairs'], 'row')} nearly like an earlier one {seen}{across}{_examples(near['examples'])}",
        )
    elif near["rows_sampled"] < report.rows - report.duplicates - report.leaked_rows:
        yield "", f"none nearly alike among {near['rows_sampled']:,} sampled rows"
    if report.same_prompt_different_answers:
        examples = _examples(report.same_prompt_examples)
        yield (
            "other answers",
            f"{_counted(report.same_prompt_different_answers, 'prompt')} with different answers{examples}",
        )
    if len(report.files) > 1:
        yield "leaked", f"{_counted(report.leaked_rows, 'row')} of another file in the training rows"
    yield "personal data", _personal(report.personal)
    if report.plan:
        yield "plan", _plan(report.plan)
    yield "problems", f"{len(report.problems):,}"


def _sizes(report: Report) -> Iterable[tuple[str, str]]:
    from mlx_lora.data.histogram import Bin, lines

    if report.tokens is None or report.typical is None:
        return
    yield "tokens", f"{report.tokens:,}, {report.trained_tokens:,} of them learned"
    yield "tokens a row", f"median {report.typical[0]:,}, 95 % up to {report.typical[1]:,}, longest {report.longest:,}"
    for line in lines([Bin(**row) for row in report.histogram or []], WIDTH):
        yield "", line
    if report.truncated_rows or report.dropped_rows:
        yield "too long", f"{report.truncated_rows:,} truncated, {report.dropped_rows:,} dropped"
    if report.over_context:
        yield (
            "over context",
            f"{_counted(report.over_context, 'row')} longer than the model's {report.context:,} positions",
        )


def _personal(found: dict[str, int]) -> str:
    return ", ".join(_counted(count, NAMES[kind]) for kind, count in found.items() if count) or "none found"


def _plan(plan: dict[str, Any]) -> str:
    memory = f"peak {ui.size(plan['peak_memory_bytes'])} of {ui.size(plan['limit_bytes'])}"
    time = f", about {ui.duration(plan['seconds'])}" if plan["seconds"] else ""
    instead = f"; would fit: {' '.join(plan['suggestion'])}" if plan["suggestion"] else ""
    return f"{memory}: {'fits' if plan['fits'] else 'does not fit'}{time}{instead}"


def _examples(pairs: list[list[dict[str, Any]]]) -> str:
    """A few pairs as ` (train.jsonl:3 and 7, …)`."""
    shown = []
    for first, second in pairs[:3]:
        names = [Path(place["file"]).name for place in (first, second)]
        where = second["line"] if names[0] == names[1] else f"{names[1]}:{second['line']}"
        shown.append(f"{names[0]}:{first['line']} and {where}")
    return f" ({', '.join(shown)})" if shown else ""


def _counted(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
