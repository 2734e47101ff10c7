"""What a terminal shows of a run while it trains: lines of text made of the trainer's events.

The lines may be asked for by another thread, at any moment: every event replaces a value as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlx_lora import ui
from mlx_lora.report.text import LABEL, MARK, Thinned, plot
from mlx_lora.train.budget.choose import Plan
from mlx_lora.train.events import Evaluated, Event, Step

# Below these a plot would say nothing: one line is shown.
LEAST_WIDTH, LEAST_HEIGHT = 60, 16
MOST_WIDTH, PLOT_HEIGHT = 120, 8
# Steps whose speed is averaged.
RECENT = 8
LAST_EVALUATIONS = 256


class LiveView:
    """The state of one run on the screen. `clock` gives seconds, `memory` the bytes of arrays that live now."""

    def __init__(self, memory: Callable[[], int], clock: Callable[[], float] = time.monotonic):
        self.clock, self.memory = clock, memory
        self.losses = Thinned()
        self.evaluations: list[tuple[float, float]] = []
        self.best: tuple[int, float] | None = None
        self.speeds: list[float] = []
        self.step: Step | None = None
        self.before = 0  # the first step of this process, which also compiles, and when it was done
        self.second = 0.0
        self.active = 0
        self.plan: Plan | None = None
        self.sample: tuple[str, str] | None = None
        self.start = clock()

    def planned(self, plan: Plan | None) -> None:
        """What the run is expected to take; the clock starts."""
        self.plan, self.start = plan, self.clock()

    def sampled(self, wanted: str | None, guess: str | None) -> None:
        """A wanted answer and what the model would say in its place; None where there is none to show."""
        self.sample = None if wanted is None or guess is None else (wanted, guess)

    def hear(self, event: Event) -> None:
        if isinstance(event, Step):
            if self.step is None:
                self.before, self.second = event.step, self.clock()
            self.speeds = [*self.speeds[-RECENT + 1 :], event.tokens_per_second]
            self.active = self.memory()
            self.losses.add(event.step, event.loss)
            self.step = event
        elif isinstance(event, Evaluated):
            self.evaluations = [*self.evaluations[-LAST_EVALUATIONS:], (event.step, event.loss)]
            self.best = (event.step, event.loss) if event.best else self.best

    def lines(self, width: int, height: int) -> Sequence[str]:
        """The view for a terminal of this many columns and rows; one line where there is no room for more."""
        if self.step is None:
            return []
        if width < LEAST_WIDTH or height < LEAST_HEIGHT:
            return [self._short(width)]
        width = min(width - 1, MOST_WIDTH)
        step = self.step
        end = f"step {step.steps}"
        axis = f"{'':{LABEL}} └{f' {end}':─>{width - LABEL - 2}}"
        curve = plot(
            self.losses.points(), self.evaluations, width=width, height=min(PLOT_HEIGHT, height - 10), end=step.steps
        )
        return [self._title(step), *curve, axis, *self._figures(step), *self._samples()]

    def _title(self, step: Step) -> str:
        filled = round(24 * step.step / step.steps)
        return f"step {step.step}/{step.steps} {'█' * filled}{'░' * (24 - filled)}  {self._time(step)}"

    def _time(self, step: Step) -> str:
        now, done = self.clock(), step.step - self.before
        spent = ui.duration(now - self.start)
        if step.step == step.steps or not done:
            return spent
        return f"{spent}, about {ui.duration((now - self.second) / done * (step.steps - step.step))} left"

    def _figures(self, step: Step) -> list[str]:
        skipped = ", skipped: not finite" if step.skipped else ""
        speed = sum(self.speeds) / len(self.speeds)
        first = f"loss {step.loss:.4f}{skipped}   rate {step.learning_rate:.2e}   {speed:,.0f} tokens/s"
        best = f" (lowest {self.best[1]:.4f} at step {self.best[0]})" if self.best else ""
        valid = [f"{MARK} validation loss {self.evaluations[-1][1]:.4f}{best}"] if self.evaluations else []
        planned = f", predicted {ui.size(self.plan.peak_memory_bytes)}" if self.plan else ""
        limit = f", limit {ui.size(self.plan.limit_bytes)}" if self.plan else ""
        return [first, *valid, f"memory now {ui.size(self.active)}, peak {ui.size(step.peak_memory)}{planned}{limit}"]

    def _samples(self) -> list[str]:
        if self.sample is None:
            return []
        wanted, guess = self.sample
        return [f"wanted  {wanted}", f"likely  {'the same' if guess == wanted else guess}"]

    def _short(self, width: int) -> str:
        step = self.step
        assert step is not None
        figures = f"{step.step}/{step.steps}  loss {step.loss:.4f}  {self._time(step).rpartition(', about ')[2]}"
        room = min(width - 3 - len(figures), 16)
        filled = round(max(room, 0) * step.step / step.steps)
        return f"{figures}  {'█' * filled}{'░' * (room - filled)}" if room > 3 else figures
