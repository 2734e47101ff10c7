"""A comparison's recipes, its result lines, the verdict on them, and the plot. `tasks.compare` trains and evaluates.

Three comparisons are built in, after tables of the LoRA paper (arXiv 2106.09685): `methods` (Table 4, with later
methods), `matrices` (Table 5) and `ranks` (Table 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Recipe
from mlx_lora.errors import RecipeError
from mlx_lora.recipe import load_recipe

# Losses count as equal if they differ by at most this many nats.
CLOSE = 0.02
BASE = "(base)"
FOLDER = Path("recipes/compare")
# Settings of `train` that all recipes of a comparison share, so that every run sees the same amount of data.
BUDGET = ("epochs", "iters", "batch_size", "grad_accumulation")

LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
# Table 5: the same number of parameters each, where all four matrices have the same shape.
MATRICES = {"q": 8, "k": 8, "v": 8, "o": 8, "qk": 4, "qv": 4, "qkvo": 2}
RANKS = (1, 2, 4, 8, 64)  # Table 6
# The methods are so different that, with few steps and a small base, one learning rate wouldn't be fair to all of them.
RATES = (1e-3, 5e-3, 3e-2)


@dataclass(frozen=True)
class Line:
    """The result of one run, or of a base alone. Seconds and peak memory are those of the training loop.

    `loss` is the mean over the test rows' tokens with loss, in nats. `exact_match` is the share of test rows answered
    exactly, None for plain text. `valid_loss` chooses between learning rates. `adapter_bytes` is the size of the
    weights file. `error` says why a run failed.
    """

    recipe: str
    method: str | None = None
    learning_rate: float | None = None
    parameters: int = 0
    valid_loss: float | None = None
    loss: float | None = None
    exact_match: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    adapter_bytes: int | None = None
    adapter: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A recipe to train, or its base alone (`bare`). Candidates that differ in learning rate share a `label`."""

    name: str
    label: str
    recipe: Recipe
    bare: bool = False


def read(sources: Sequence[str], overrides: Iterable[str] = (), rates: Sequence[float] = ()) -> list[Candidate]:
    """The runs of a comparison: every base, then every recipe, once for each of `rates` if any.

    A source is a recipe, a folder (its recipes by name), or a built-in comparison's name. Raises RecipeError if the
    recipes don't share model, data, seed and budget.
    """
    overrides = list(overrides)
    named: list[tuple[str, Recipe]] = []
    for source in sources:
        if source in BUILT_IN and not Path(source).exists():
            entries = BUILT_IN[source]()
            named += [(name, load_recipe(file, overrides, settings=changes)) for name, file, changes in entries]
        else:
            named += [(str(recipe.name), recipe) for recipe in (load_recipe(f, overrides) for f in _files(source))]
    names = [name for name, _ in named]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"two recipes are called {', '.join(repeated)}", hint="a comparison tells recipes by their names"
        )
    _check_budget(named)
    recipes = [recipe for _, recipe in named]
    return [*_bases(recipes), *(run for name, recipe in named for run in _by_rate(name, recipe, rates))]


def _bases(recipes: Sequence[Recipe]) -> list[Candidate]:
    """Each quantized form of the base that a recipe trains on, labelled by its quantization if there are several."""
    forms: dict[str, Recipe] = {}
    for recipe in recipes:
        parts = [BASE.strip("()")]
        if recipe.quantize:
            settings = recipe.quantize.complete()
            parts += [settings["mode"], f"{settings['bits']} bits", f"group {settings['group_size']}"]
            parts += ["double_quant"] if settings.get("double_quant") else []
        forms.setdefault(f"({', '.join(parts)})", recipe)
    labels = forms if len(forms) > 1 else [BASE]
    return [Candidate(label, label, recipe, bare=True) for label, recipe in zip(labels, forms.values(), strict=True)]


def rates_of(sources: Sequence[str]) -> tuple[float, ...]:
    """The learning rates that a built-in comparison tries; none for recipes, which set their own."""
    return RATES if list(sources) == ["methods"] and not Path("methods").exists() else ()


def _files(source: str) -> list[Path]:
    folder = paths.existing(source)
    if folder is None or not folder.is_dir():
        return [Path(source)]
    if files := sorted(folder.glob("*.yaml")):
        return files
    raise RecipeError(f"{source} has no recipes", hint=f"name recipes, a folder of them, or {', '.join(BUILT_IN)}")


Entry = tuple[str, Path, dict[str, Any]]  # a run's name, its recipe's file, and the settings that it changes


def _methods() -> list[Entry]:
    entries: list[Entry] = [(file.stem, file, {}) for file in _files(str(FOLDER))]
    return [*entries, ("loraplus", FOLDER / "lora.yaml", {"train.loraplus_ratio": 16})]


def _matrices() -> list[Entry]:
    return [_lora_entry(letters, rank) for letters, rank in MATRICES.items()]


def _ranks() -> list[Entry]:
    return [_lora_entry(letters, rank) for letters in ("qv", "qkvo") for rank in RANKS]


def _lora_entry(letters: str, rank: int) -> Entry:
    changes = {"adapter.targets": [LETTERS[letter] for letter in letters], "adapter.rank": rank}
    return f"{letters}-r{rank}", FOLDER / "lora.yaml", changes


BUILT_IN = {"methods": _methods, "matrices": _matrices, "ranks": _ranks}


def _check_budget(named: Sequence[tuple[str, Recipe]]) -> None:
    """Raise RecipeError naming every setting that must be equal and differs from the first recipe's."""
    first_name, first = named[0]
    faults = []
    for name, recipe in named[1:]:
        pairs = [(key, getattr(first, key), getattr(recipe, key)) for key in ("model", "seed")]
        pairs += [(f"data.{key}", getattr(first.data, key), value) for key, value in recipe.data]
        pairs += [(f"train.{key}", getattr(first.train, key), getattr(recipe.train, key)) for key in BUDGET]
        faults += [f"{key}: {a} in {first_name}, {b} in {name}" for key, a, b in pairs if a != b]
    if faults:
        raise RecipeError(
            "these recipes don't compare:\n  " + "\n  ".join(faults), hint="key=value sets a key for all of them"
        )


def _by_rate(label: str, recipe: Recipe, rates: Sequence[float]) -> list[Candidate]:
    if not rates:
        return [Candidate(label, label, recipe)]
    changed = [recipe.train.model_copy(update={"learning_rate": rate}) for rate in rates]
    return [
        Candidate(f"{label}-lr{train.learning_rate:g}", label, recipe.model_copy(update={"train": train}))
        for train in changed
    ]


def best(lines: Iterable[Line]) -> list[Line]:
    """One line for each recipe: that of the learning rate with the lowest validation loss."""
    chosen: dict[str, Line] = {}
    for line in lines:
        previous = chosen.get(line.recipe)
        if previous is None or _order(line) < _order(previous):
            chosen[line.recipe] = line
    return list(chosen.values())


def _order(line: Line) -> float:
    """Validation loss: lower is better, failed runs come last. Test rows must not choose what they judge."""
    return float("inf") if line.error or line.valid_loss is None else line.valid_loss


def verdict(lines: Iterable[Line]) -> list[str]:
    """Sentences: the lowest loss, the fewest parameters with a loss close to it, the most exact matches."""
    trained = [line for line in lines if line.parameters and line.loss is not None]
    if len(trained) < 2:
        return []
    winner = min(trained, key=lambda line: line.loss or 0.0)
    sentences = [f"lowest loss: {_description(winner)}"]
    close = [line for line in trained if (line.loss or 0.0) <= (winner.loss or 0.0) + CLOSE]
    smallest = min(close, key=lambda line: (line.parameters, line.loss))
    if smallest.parameters < winner.parameters:
        share = smallest.parameters / winner.parameters
        sentences.append(
            f"fewest parameters within {CLOSE:g} nats of it: {_description(smallest)}, {share:.2g} of the parameters"
        )
    else:
        sentences.append(f"nothing with fewer parameters comes within {CLOSE:g} nats of it")
    matched = [line for line in trained if line.exact_match is not None]
    if matched:
        most = max(line.exact_match or 0.0 for line in matched)
        names = ", ".join(line.recipe for line in matched if line.exact_match == most)
        sentences.append(f"most exact matches: {names} ({most:.3g})" if most else "no answer matches exactly")
    return sentences


def _description(line: Line) -> str:
    return f"{line.recipe} ({line.loss:.4f} nats, {line.parameters:,} parameters)"


def draw(lines: Iterable[Line], title: str, file: Path) -> None:
    """Loss against trainable parameters as a PNG, the bases' losses in its title. Raises ImportError or OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [(line, line.loss) for line in lines if line.loss is not None]
    trained = [(line, loss) for line, loss in measured if line.parameters]
    bases = "; ".join(f"{line.recipe.strip('()')} alone {loss:.3g}" for line, loss in measured if not line.parameters)
    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=120)
    counts = [line.parameters for line, _ in trained] or [1]
    axes.scatter(counts, [loss for _, loss in trained] or [1], s=24 if trained else 0, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(counts) / 2, max(counts) * 2)
    axes.margins(y=0.1)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:.3g}")
    axes.set(xlabel="trainable parameters", ylabel="loss on the test rows (nats per token)")
    axes.set_title(f"{title}\n{bases}" if bases else title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.canvas.draw()
    _label(figure, axes, trained)
    with paths.created(file) as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _label(figure: Any, axes: Any, trained: Sequence[tuple[Line, float]]) -> None:
    """Write each point's name, joined to it by a thin line, at the nearest place that covers no other name or point."""
    points = [axes.transData.transform((line.parameters, loss)) for line, loss in trained]
    occupied = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    renderer, edges = figure.canvas.get_renderer(), axes.get_window_extent()
    for (line, loss), (x, y) in sorted(zip(trained, points, strict=True), key=lambda item: -item[1][1]):
        text = axes.annotate(
            line.recipe, (line.parameters, loss), xytext=(0, 0), textcoords="offset pixels", fontsize=8,
            va="center", ha="center", arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0},
        )  # fmt: skip
        size = text.get_window_extent(renderer)
        width, height = size.width / 2 + 2, size.height / 2
        for right, up in _offsets(width, height):
            box = (x + right - width, y + up - height, x + right + width, y + up + height)
            inside = edges.x0 < box[0] and box[2] < edges.x1 and edges.y0 < box[1] and box[3] < edges.y1
            overlaps = (box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in occupied)
            if inside and not any(overlaps):
                break
        text.set_position((right, up))
        occupied.append(box)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Offsets of a label's centre from its point, in pixels, the nearest first."""
    rows = [row * (2 * height + 1) for row in range(-15, 16)]
    columns = [side * (width + gap) for gap in (8, 30, 60, 90) for side in (1, -1)]
    offsets = [(column, row) for column in columns for row in rows] + [(0.0, row) for row in rows if row]
    return sorted(offsets, key=lambda offset: max(abs(offset[0]) - width, 0) + 1.5 * abs(offset[1]))
