"""What a tuning leaves: the recipe as YAML with the reason for each choice, sentences for people, keys for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlx_lora import paths, ui
from mlx_lora.config import Recipe
from mlx_lora.errors import NameTaken
from mlx_lora.recipe import parse_recipe
from mlx_lora.study.compare import CLOSE
from mlx_lora.study.statistics import LEAST_ROWS
from mlx_lora.study.trials import Difference, Found, Line, Space, difference


@dataclass(frozen=True)
class Tuned:
    """The result. `asked` are the settings that were given, by dotted key; `used` are seconds."""

    recipe: Recipe
    asked: dict[str, Any]
    space: Space
    per_epoch: int
    found: Found
    lines: list[Line]
    used: float
    file: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, by dotted key; a setting that has no meaning for the method isn't among them."""
        best, steps = self.found.best.trial, self.found.steps
        chosen: dict[str, Any] = {"train.learning_rate": best.rate}
        if self.space.ranks:
            chosen["adapter.rank"] = best.rank
        if self.space.targets:
            chosen["adapter.targets"] = best.targets
        if steps % self.per_epoch or "train.iters" in self.asked:
            return chosen | {"train.iters": steps}
        return chosen | {"train.epochs": steps // self.per_epoch}

    def as_dict(self) -> dict[str, Any]:
        """The keys of `tune --json`."""
        found, tokens = self.found, sum(self.space.tokens)
        return {
            "name": self.recipe.name,
            "file": str(self.file),
            "recipe": yaml.safe_load(self.text()),
            "settings": self.settings,
            "steps": found.best.trial.steps,
            "best_step": found.best.best_step,
            "valid_loss": _mean(found.best, tokens),
            "default": None if found.default is None else _short(found.default, tokens),
            "lost": None if found.lost is None else asdict(found.lost),
            "rows": len(self.space.tokens),
            "trials": [_short(line, tokens) for line in self.lines],
            "left_out": [{**asdict(trial), "seconds": seconds} for trial, seconds in found.left_out],
            "seconds": self.used,
        }

    def sentences(self) -> list[str]:
        """What was found, how sure that is, and what there was no time for."""
        best, rows = self.found.best, len(self.space.tokens)
        said = [
            f"best: {best.trial.name}, validation loss {_nats(best, sum(self.space.tokens))}",
            self.against_default(),
        ]
        if rows < LEAST_ROWS:
            said.append(f"{rows} validation rows say little: choices between close ones may be chance")
        said += [f"left out: {trial.name} ({ui.duration(seconds)})" for trial, seconds in self.found.left_out]
        return said

    def against_default(self) -> str:
        """What the default would have lost, with how sure that is."""
        found, default = self.found, self.space.default
        if found.lost is None or found.default is None:
            return "what the default would have lost isn't known: it has failed, or there was no time for it"
        if found.default == found.best:
            least = f"by more than chance and {CLOSE:g} nats a token"
            return f"nothing that was tried is better than the default (rate {default.rate:g}) {least}"
        steps = found.default.trial.steps
        over = "" if steps == default.steps else f", seen in runs of {steps} of {default.steps} steps"
        verb = "lost" if found.lost.nats >= 0 else "gained"
        return f"the default (rate {default.rate:g}) would have {verb} {_interval(found.lost)}{over}"

    def text(self, file: str | None = None) -> str:
        """The recipe, as the file of that name; NAME.yaml by default."""
        recipe, name, against = self.recipe, str(self.recipe.name), self.against_default()
        file = file or f"{name}.yaml"
        head = [
            f"# {name}: found by `mlx-lora tune`, which compared {len(self.lines)} trainings on"
            f" {len(self.space.tokens)} validation rows of {recipe.data.path}.",
            f"# {against[0].upper()}{against[1:]}.",
            "#",
            f"# Needs:    the model {recipe.model}, the data {recipe.data.path}",
            f"# Run:      mlx-lora train {file}",
            f"# Look:     mlx-lora eval --adapter {name} --data {recipe.data.path}",
            f"# Change:   mlx-lora train {file} seed=1 --name {name}-again",
            _line("model", recipe.model),
            _line("name", name),
        ]
        values = {"data.path": recipe.data.path} | self.asked | self.settings
        reasons = {key: "as you asked" for key in self.asked} | self._reasons()
        whole = [key for key in values if "." not in key]
        head += [f"{_line(key, values[key])}{_comment(reasons.get(key))}" for key in whole]
        for section in ("adapter", "data", "train"):
            inside = [key for key in values if key.startswith(f"{section}.")]
            head += [f"{section}:"] * bool(inside)
            head += [
                f"{_line('  ' + key.partition('.')[2], values[key])}{_comment(reasons.get(key))}" for key in inside
            ]
        return "\n".join(head) + "\n"

    def _reasons(self) -> dict[str, str]:
        """Why each tuned setting is as it is: losses of what was tried beside it."""
        space = self.space
        reasons = {}
        if space.rates:
            reasons["train.learning_rate"] = self._rates()
        if space.ranks:
            reasons["adapter.rank"] = self._around("rank")
        if space.targets:
            reasons["adapter.targets"] = self._around("targets")
        if space.epochs:
            reasons["train.epochs"] = reasons["train.iters"] = self._around("steps")
        return reasons

    def _rates(self) -> str:
        tokens, lines = sum(self.space.tokens), sorted(self.found.rates, key=lambda line: line.trial.rate)
        shown = ", ".join(f"{_nats(line, tokens)} at {line.trial.rate:g}" for line in lines)
        return f"validation loss {shown}; {lines[0].trial.steps} steps"

    def _around(self, what: str) -> str:
        """What another value has shown beside the best one, or that there was no time for another."""
        best, tokens = self.found.best, self.space.tokens
        others = [
            line for line in self.lines
            if line.losses and getattr(line.trial, what) != getattr(best.trial, what)
            and replace(line.trial, **{what: getattr(best.trial, what)}) == best.trial
        ]  # fmt: skip
        if not others:
            return "the default; others were left out, for want of time"
        if what == "steps":  # the nearest fewer and the nearest more
            fewer = [line for line in others if line.trial.steps < best.trial.steps]
            more = [line for line in others if line.trial.steps > best.trial.steps]
            others = [*sorted(fewer, key=_steps)[-1:], *sorted(more, key=_steps)[:1]]
        said = []
        for line in others:
            value, lost = getattr(line.trial, what), difference(line.losses, best.losses, tokens)
            said.append(
                f"{value}{' steps' * (what == 'steps')}: {_interval(lost)} {'more' if lost.nats >= 0 else 'less'}"
            )
        return "; ".join(said)


def write(tuned: Tuned, out: Path, *, force: bool = False) -> None:
    """Write the recipe file. Raises NameTaken where it exists."""
    check_out(out, force=force)
    text = tuned.text(out.name)
    parse_recipe(yaml.safe_load(text), str(out))  # a fault would be one of this program
    with paths.created(out, "wb") as stream:
        stream.write(text.encode())


def check_out(out: Path, *, force: bool) -> None:
    """Raise NameTaken where a file is in the way; worth knowing before the work is done."""
    if out.exists() and not force:
        raise NameTaken(f"{out} exists", hint="--out another file, or --force to replace it")


def _interval(lost: Difference) -> str:
    """Its size, whichever of the two is better."""
    sign = 1 if lost.nats >= 0 else -1
    if lost.low is None or lost.high is None:
        return f"{sign * lost.nats:.3f} nats a token"
    low, high = sorted((sign * lost.low, sign * lost.high))
    sure = "" if low > 0 else ", which may be chance"
    return f"{sign * lost.nats:.3f} nats a token ({low:.3f} to {high:.3f} at 95 %{sure})"


def _steps(line: Line) -> int:
    return line.trial.steps


def _mean(line: Line, tokens: int) -> float | None:
    return sum(line.losses) / tokens if line.losses else None


def _nats(line: Line, tokens: int) -> str:
    mean = _mean(line, tokens)
    return "failed" if mean is None else f"{mean:.4f}"


def _short(line: Line, tokens: int) -> dict[str, Any]:
    loss = {"loss": _mean(line, tokens), "best_step": line.best_step, "seconds": line.seconds, "error": line.error}
    return asdict(line.trial) | loss


def _line(key: str, value: Any) -> str:
    """`key: value` as YAML."""
    return f"{key}: {yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10000).strip()[1:-1]}"


def _comment(reason: str | None) -> str:
    return f"  # {reason}" if reason else ""
