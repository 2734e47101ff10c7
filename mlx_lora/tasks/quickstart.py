"""The whole product on the embedded base: quantize, train three private tasks, swap, fuse, compare. No network.

Everything it makes is named `quickstart-…` in the home and is made anew by the next quickstart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data, Quantize, Recipe
from mlx_lora.errors import TrainingError
from mlx_lora.interop.fuse import fuse
from mlx_lora.measure import predictions
from mlx_lora.models.load import load_stored
from mlx_lora.models.save import save
from mlx_lora.recipe import load_recipe
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.study.evaluate import Questions, evaluate, questions
from mlx_lora.tasks.fuse import agreement_with
from mlx_lora.tasks.train import Listener, train_adapter

TASKS = ("notes", "mail", "sql")
BASE = "quickstart-base"
MAX_TOKENS = 80
FUSED_ROWS = 40
# Eight bits round: an answer may turn on a tie. Fewer equal answers than this would not be the same model.
SAME_ANSWERS = 0.95


@dataclass
class Outcome:
    """What the tables and the JSON show. `samples` are (task, question, base's answer, adapter's answer)."""

    tasks: list[dict[str, Any]]
    swap_milliseconds: float
    base_bytes: int
    fused_matches: bool
    fused: dict[str, Any]
    samples: list[tuple[str, str, str, str]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks,
            "swap_milliseconds": self.swap_milliseconds,
            "base_bytes": self.base_bytes,
            "fused_matches": self.fused_matches,
            "fused": self.fused,
        }


def quickstart(listener: Callable[[], Listener], stage: Callable[[str], None]) -> Outcome:
    """Run it all. `listener()` gives each training its screen; `stage` hears what comes next.

    Raises KeyboardInterrupt when a training was asked to stop."""
    stage("quantizing the base to 4 bits")
    base_bytes = _quantize_base()
    trained = {}
    for task in TASKS:
        stage(f"training an adapter for {task}")
        recipe = _recipe(task)
        trained[task] = train_adapter(recipe, force=True, listener=listener())
        if trained[task].finished.stopped_by == "interrupted":
            raise KeyboardInterrupt
        if trained[task].finished.stopped_by == "memory":
            raise TrainingError("training took more memory than it may", hint="close other programs, and try again")
    stage("loading the base once and answering test rows with each adapter")
    adapters = {task: read(paths.room("adapters", f"quickstart-{task}")) for task in TASKS}
    engine = Engine(registry.open_base(BASE, list(adapters.values())))
    rows, swaps, samples = [], [], []
    for task, adapter in adapters.items():
        engine.add(task, wrappers_for(engine.loaded.model, adapter))
    for task in TASKS:
        asked = _questions(task, engine)
        base, with_adapter = (evaluate(engine, name, asked, max_tokens=MAX_TOKENS) for name in (None, task))
        swaps += [engine.use(other) for other in (None, *TASKS)]
        samples.append((task, *_sample(engine, task, asked)))
        rows.append(
            {
                "name": task,
                "base_exact_match": base.exact_match,
                "adapter_exact_match": with_adapter.exact_match,
                "adapter_bytes": (adapters[task].path / "adapters.safetensors").stat().st_size,
                "train_seconds": trained[task].finished.seconds,
            }
        )
    stage("fusing one adapter into a model of its own and comparing their answers")
    matches, fused = _fuse(engine, adapters[TASKS[0]])
    return Outcome(rows, median(swaps), base_bytes, matches, fused, samples)


def _quantize_base() -> int:
    loaded = load_stored(paths.bundled("data", "base"), quantization=Quantize(bits=4, group_size=32))
    return save(loaded, paths.room("models", BASE), force=True).bytes


def _recipe(task: str) -> Recipe:
    own = {"name": f"quickstart-{task}", "model": BASE, "quantize": None}
    return load_recipe(Path(f"recipes/{task}.yaml"), settings=own)


def _questions(task: str, engine: Engine) -> Questions:
    recipe = _recipe(task)
    assert recipe.data.path is not None
    return questions(recipe.data.path, Data(), engine.loaded.tokenizer, exact=True)


def _sample(engine: Engine, task: str, asked: Questions) -> tuple[str, str, str]:
    """The first test row: its question, what the base says, what the adapter says."""
    decode = engine.loaded.tokenizer.decode
    answers = []
    for name in (None, task):
        engine.use(name)
        answers.append(decode(list(engine.stream(asked.prompts[0], max_tokens=MAX_TOKENS))))
    return decode(asked.prompts[0], skip_special_tokens=True), answers[0], answers[1]


def _fuse(engine: Engine, adapter: StoredAdapter) -> tuple[bool, dict[str, Any]]:
    """Fuse, load the result from disk, and ask both the same questions."""
    task = TASKS[0]
    asked = _questions(task, engine)
    out = paths.room("models", "quickstart-fused")
    fused = fuse(lambda: load_stored(BASE), adapter, out, force=True)
    rows, prompts = asked.rows[:FUSED_ROWS], asked.prompts[:FUSED_ROWS]
    engine.use(task)
    agreement = agreement_with(predictions(engine.loaded.model, rows), out, rows)
    expected = dict(engine.batch(prompts, max_tokens=MAX_TOKENS))
    answers = dict(Engine(registry.open_base(str(out))).batch(prompts, max_tokens=MAX_TOKENS))
    same = sum(answers[index] == answer for index, answer in expected.items()) / len(expected)
    return same >= SAME_ANSWERS, {**fused.as_dict(agreement), "same_answers": same}
