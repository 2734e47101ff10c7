"""What `auto` stands for in the `train` section: numbers that follow from the base, the method and the rows.

    learning_rate   5e-4 · (2000 / hidden)^0.781 · √(16 / (scale · rank)) · SHORT for a short run · the method's factor
    epochs          as many as make STEPS optimizer steps, at least 1 and at most MOST_EPOCHS
    eval_every      steps / 10, or more where validation would take more than a fifth of the time
    patience        a third of the evaluations, more with few validation rows

Everything here is a pure function of its arguments. The same recipe and rows give the same numbers on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lora.config import Adapter, Train, number
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.errors import RecipeError
from mlx_lora.methods import SETTINGS, parts
from mlx_lora.train.optim import total_steps

KEYS = ("epochs", "learning_rate", "eval_every", "patience")

# Small data are repeated until there are this many optimizer steps, or this many epochs.
STEPS, MOST_EPOCHS = 300, 10
# Evaluations of a run, and the largest share of its time that they may take. An evaluated row costs a third of a
# trained one: the forward pass without the backward pass.
EVALUATIONS, SHARE, FORWARD = 10, 0.2, 1 / 3
# Fewer validation rows than this are noisy: one evaluation without gain says little.
FEW_ROWS = 20

# The rate of LoRA at the width WIDTH, and how it falls with the width: Tinker's `get_lr` for Llama, ten times the rate
# of full fine-tuning ("LoRA Without Regret", Thinking Machines 2025). Measured here, in tests/bench/README.md: the
# embedded base (width 128), SmolLM2 (576, a Llama) and Gemma 3 (640). Tinker gives Qwen the power 0.0775: 0.6 times
# this rate at width 1024, 1.7 times at 4096. No Qwen was measured here, and nothing wider than 640.
RATE, WIDTH, POWER = 5e-4, 2000, 0.781
# scale · rank of rank 8 and alpha 16. The best rate falls about with its square root: on the embedded base's sql, of
# rates two times apart, it was 16e-3 or more with rank 2 and alpha 4, 8e-3 with 8 and 16, 4e-3 with 32 and 64, and 2e-3
# with rank 8 and alpha 64.
PRODUCT = 16
# Runs of at most FEW_STEPS want this much more ("LoRA Without Regret": 15 times full fine-tuning's instead of 10); from
# MANY_STEPS on nothing is added. The embedded base doesn't tell: 8e-3 was its best with 20, 80 and 160 steps.
SHORT, FEW_STEPS, MANY_STEPS = 1.5, 100, 400
# A method's rate over LoRA's. The comments have the best rate of 80 steps of 4 rows on the embedded base's sql and
# notes, where LoRA's were 8e-3 and 4e-3, of rates two to three times apart; "+": it was the highest of those.
METHODS = {
    "lora": 1.0,
    "dora": 1.0,  # 8e-3+, 4e-3
    "glora": 1.0,  # 8e-3+, 4e-3
    "bottleneck": 2.0,  # 16e-3+, 8e-3; SmolLM2 on WikiSQL, 20 steps: 1e-2 before 1e-3, as LoRA
    "qalora": 5.0,  # 32e-3+ on sql: each number it trains is added to a whole group of inputs
    "adalora": 4.0,  # 16e-3, 32e-3+
    "vera": 16.0,  # 0.128+, 0.128+
    "ia3": 16.0,  # 0.128+, 0.128+
    "bitfit": 8.0,  # 64e-3+, 64e-3+; SmolLM2 on WikiSQL, 20 steps: 1e-2 before 1e-3
    "prefix": 16.0,  # 0.128+, 0.128+
    "prompt": 30.0,  # 0.3+, 0.3+, which is also its paper's (arXiv 2104.08691)
    "full": 0.1,  # 0.8e-3, 0.8e-3; SmolLM2's last two layers, 20 steps: 1e-3 before 1e-2
}
# An optimizer's rate over Adam's. Best of the same runs on sql: adafactor 8e-3+, lion 1.6e-3+, muon 16e-3. SGD has
# none: its rate depends on the size of the gradient.
OPTIMIZERS = {"adam": 1.0, "adamw": 1.0, "adafactor": 1.0, "lion": 0.25, "muon": 2.5}


@dataclass(frozen=True)
class Chosen:
    """Settings without `auto`, and why each number was chosen, by dotted key."""

    settings: Train
    reasons: dict[str, str]

    @property
    def sentences(self) -> tuple[str, ...]:
        """A line for each choice."""
        return tuple(
            f"{key} is {_shown(getattr(self.settings, key.removeprefix('train.')))}: {reason}"
            for key, reason in self.reasons.items()
        )


def choose(settings: Train, adapter: Adapter, *, hidden: int, rows: int, valid: int) -> Chosen:
    """`settings` with a number for each `auto`: `hidden` is the base's width, `rows` train and `valid` validate.

    Raises RecipeError for a learning rate that nothing here knows.
    """
    chosen, reasons = settings, dict[str, str]()
    ways: dict[str, Callable[[Train], tuple[Any, str]]] = {
        "epochs": lambda train: epochs(train, rows),
        "learning_rate": lambda train: learning_rate(train, adapter, hidden, rows),
        "eval_every": lambda train: eval_every(train, rows, valid),
        "patience": lambda train: patience(train, rows, valid),
    }
    for key, way in ways.items():  # in this order: each one rests on those before
        if getattr(settings, key) == "auto":
            value, reason = way(chosen)
            chosen = chosen.model_copy(update={key: value})
            reasons |= {f"train.{key}": reason} if reason else {}
    return Chosen(chosen, reasons)


def epochs(settings: Train, rows: int) -> tuple[int, str]:
    """Passes over the rows. With `iters` set nothing depends on them; they are those that the steps make."""
    per_epoch = _per_epoch(settings, rows)
    if settings.iters:
        return max(math.ceil(settings.iters / per_epoch), 1), ""
    passes = min(max(round(STEPS / per_epoch), 1), MOST_EPOCHS)
    made = "makes" if rows == 1 else "make"
    return passes, f"{_counted(rows, 'row')} {made} {_counted(passes * per_epoch, 'step')}"


def learning_rate(settings: Train, adapter: Adapter, hidden: int, rows: int) -> tuple[float, str]:
    """The highest rate of the run; of a combination, that of the method which wants less."""
    if settings.optimizer not in OPTIMIZERS:
        raise RecipeError(
            f"train.learning_rate is auto, which is not known for {settings.optimizer}",
            hint="set a number: try 0.1, and halve it if the loss jumps",
        )
    steps = total_steps(settings, _per_epoch(settings, rows))
    shortness = math.log(MANY_STEPS / steps) / math.log(MANY_STEPS / FEW_STEPS)
    rate = RATE * (WIDTH / hidden) ** POWER * SHORT ** min(max(shortness, 0.0), 1.0)
    rate *= min(METHODS[name] for name in parts(adapter.method)) * OPTIMIZERS[settings.optimizer]
    if set(parts(adapter.method)) & set(SETTINGS["alpha"]):
        rate *= math.sqrt(PRODUCT / (adapter.alpha * (math.sqrt(adapter.rank) if adapter.rslora else 1)))
    if settings.loraplus_ratio is not None:
        # B's rate is so many times A's: their geometric mean stays. With 16 the embedded base's sql was best at 1e-3.
        rate /= math.sqrt(settings.loraplus_ratio)
    return _rounded(rate), f"for {adapter.method} over a base of width {hidden}, in {_counted(steps, 'step')}"


def eval_every(settings: Train, rows: int, valid: int) -> tuple[int | None, str]:
    """Steps from one evaluation to the next; None where there is nothing to evaluate on."""
    if not valid:
        return None, "there are no validation rows"
    steps = total_steps(settings, _per_epoch(settings, rows))
    trained = steps * settings.batch_size * settings.grad_accumulation
    passes = 1 if settings.max_drift is None else 2  # the base runs too
    affordable = int(SHARE * trained / (FORWARD * passes * valid))
    every = math.ceil(steps / min(max(affordable, 1), EVALUATIONS))
    return every, f"{_counted(math.ceil(steps / every), 'validation')} on {_counted(valid, 'row')}"


def patience(settings: Train, rows: int, valid: int) -> tuple[int | None, str]:
    """Evaluations without gain; None where there are too few evaluations for it to stop anything."""
    every = number(settings.eval_every)
    if not valid or every is None:
        return None, ""
    steps = total_steps(settings, _per_epoch(settings, rows))
    evaluations = math.ceil(steps / every)
    wait = math.ceil(evaluations / 3) + (valid < FEW_ROWS)
    if wait < 2 or wait >= evaluations:
        return None, ""
    return wait, f"training stops after {wait} validations without gain, and the best adapter is kept"


def _per_epoch(settings: Train, rows: int) -> int:
    return steps_per_epoch(rows, batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation)


def _rounded(value: float) -> float:
    """Two digits: more would claim a precision that no table has."""
    return float(f"{value:.1e}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
