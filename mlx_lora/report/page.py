"""One HTML file that needs nothing else: no script, no font, no picture from elsewhere, and a policy that says so.

Whatever comes from data is escaped here, by the functions that make elements; sections put them together. The markup is
well-formed XML too, so tests can read it as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mlx_lora.ui import visible

# The beginning of every report, by which one is known as ours and may be replaced.
MARK = "<!-- mlx-lora report -->"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """The whole file."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f"<!DOCTYPE html>\n{MARK}\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8" />\n<title>{text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Anything as text of an element or an attribute: what HTML gives a meaning, or has no place for, is escaped."""
    return escape(visible(str(value)))


def section(heading: str, *parts: str) -> str:
    """A section with a heading; nothing where all its parts are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(heading)}</h2>\n{inner}\n</section>\n" if inner else ""


def paragraph(words: str, kind: str = "") -> str:
    return f"<p{_kind(kind)}>{text(words)}</p>" if words else ""


def figure(svg: str, caption: str = "") -> str:
    """A figure made by `svg.Figures`; nothing for an empty one."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>" if svg else ""


def small(*figures: str) -> str:
    """Figures that may stand beside each other."""
    return f'<div class="small">{"".join(figures)}</div>' if any(figures) else ""


def numbers(values: Mapping[str, str]) -> str:
    """Names with their values, as tiles."""
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="figures">{tiles}</dl>' if tiles else ""


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> str:
    """A table with a caption and a header for every column and row; columns of numbers are set to the right."""
    if not rows:
        return ""
    right = [all(isinstance(row[index], int | float | None) for row in rows) for index in range(len(headers))]
    kinds = [_kind("number" if each else "") for each in right]
    head = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(headers, kinds, strict=True))
    body = ""
    for row in rows:
        cells = [f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row[1:], kinds[1:], strict=True)]
        body += f'<tr><th scope="row"{kinds[0]}>{_cell(row[0])}</th>{"".join(cells)}</tr>\n'
    inner = f"<caption>{text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    # what is wider than the screen scrolls, with the keyboard too
    return f'<div class="wide" tabindex="0" role="region" aria-label="{text(caption)}"><table>{inner}</table></div>'


def folded(summary: str, inner: str) -> str:
    """Something that is shown when asked for."""
    return f"<details><summary>{text(summary)}</summary>\n{inner}</details>" if inner else ""


def sample(parts: Sequence[tuple[str, str, str]], title: str = "") -> str:
    """Texts with what they are, and `good`, `bad` or "" for each; line ends are kept."""
    inner = "".join(
        f'<dt>{text(name)}</dt><dd><p class="text{f" {kind}" if kind else ""}">{text(words) or "(nothing)"}</p></dd>'
        for name, words, kind in parts
    )
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'<div class="sample">{heading}<dl>{inner}</dl></div>'


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _cell(value: object) -> str:
    shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else value
    return text(f"{shown:,}" if isinstance(shown, int) and not isinstance(shown, bool) else shown)
