"""What is left of an adapter once `fuse` has merged it: QA-LoRA into 4 bits, and LoRA at every setting of `--bits`.

The commands are the user's own. The first table compares QA-LoRA trained through the rounding of the zero-points with
QA-LoRA trained without it. The second is about LoRA on WikiSQL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, Failed, side

STEPS, RATE = (12, 60), 2e-4
WAYS = ("stored", "float32")
TRAIN_ROWS, TEST_ROWS = 120, 16  # the shortest
COMMON = ("data.template=none", "data.max_seq_length=512", "data.valid_fraction=0", "train.batch_size=2")
LORA = ("train.iters=60", "train.learning_rate=1e-3")
BITS = ("keep", "mixed", "8", "16")
TYPES = ("f16", "q8_0", "q4_1", "q4_0")
EXACT = ("--exact", "--max-tokens", "48")


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """One line for each training of QA-LoRA, and one for each format of the LoRA adapter."""
    work = Work(inputs)
    qalora = [work.qalora(steps, how) for steps in STEPS[: 1 if quick else None] for how in WAYS]
    return {"rate": RATE, "rows": TEST_ROWS, "qalora": qalora, "lora": [] if quick else work.lora()}


class Work:
    """The commands, run in a home of their own."""

    def __init__(self, inputs: Inputs):
        self._inputs, self._folder = inputs, inputs.folder
        self._data = inputs.folder / "part"
        self._data.mkdir()
        for name, most in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            lines = sorted((Path(inputs.wikisql) / f"{name}.jsonl").read_text().splitlines(keepends=True), key=len)
            (self._data / f"{name}.jsonl").write_text("".join(lines[:most]))

    def qalora(self, steps: int, zero_points: str) -> dict[str, Any]:
        """Train, merge into 4 bits, and the loss on unseen rows before and after."""
        model, name = self._inputs.as_published, f"qalora-{steps}-{zero_points}"
        settings = ("adapter.method=qalora", f"adapter.zero_points={zero_points}", f"train.iters={steps}")
        self._run("train", "--model", model, "--name", name, *settings, f"train.learning_rate={RATE}")
        base, live = self._run("eval", "--model", model, "--adapter", name)["results"]
        line = {"steps": steps, "zero_points": zero_points, "base": base["loss"], "live": live["loss"]}
        line |= self._fused(model, name, "--bits", "keep")
        if zero_points == "float32":
            wide = self._fused(model, name, "--zero-points", "float32")
            line |= {"wide_loss": wide["loss"], "wide_bytes": wide["bytes"]}
        print(f"  {line}", flush=True)
        return line

    def lora(self) -> list[dict[str, Any]]:
        """The adapter itself, and what it is at each setting of `--bits`."""
        model, name = self._inputs.four_bit, "lora"
        self._run("train", "--model", model, "--name", name, *LORA)
        _, live = self._run("eval", "--model", model, "--adapter", name, *EXACT)["results"]
        lines = [{"bits": None, "loss": live["loss"], "exact_match": live["exact_match"]}]
        for bits in BITS:
            lines.append({"bits": bits, **self._fused(model, name, "--bits", bits, exact=True)})
            print(f"  {lines[-1]}", flush=True)
        for kind in TYPES:
            lines.append({"type": kind, **self._gguf(model, name, kind)})
            print(f"  {lines[-1]}", flush=True)
        return lines

    def _gguf(self, model: str, name: str, kind: str) -> dict[str, Any]:
        """Merge into a GGUF file, which llama.cpp runs; loss and answers are those of the file imported again."""
        file, back = self._folder / f"{kind}.gguf", self._folder / f"back-{kind}"
        words = ("export", "gguf", "--fused", "--type", kind, "--out", str(file))
        report = self._run(*words, "--model", model, "--adapter", name, "--force")
        self._run("import-gguf", str(file), str(back))
        (found,) = self._run("eval", "--model", str(back), *EXACT)["results"]
        kept = {"delta_survival": report["weights_kept"], "bytes": report["bytes"], **report["check"]}
        return {**kept, "loss": found["loss"], "exact_match": found["exact_match"]}

    def _fused(self, model: str, name: str, *options: str, exact: bool = False) -> dict[str, Any]:
        """Merge, even where most of the update is lost, and look at what was written."""
        out = self._folder / f"fused-{name}-{options[-1]}"
        words = ("fuse", "--model", model, "--adapter", name, "--out", str(out), *options, "--force")
        report = self._run(*words)
        generate = EXACT if exact else ()
        (found,) = self._run("eval", "--model", str(out), *generate)["results"]
        same = side("ours_merged", before=model, after=str(out))
        kept = {key: report[key] for key in ("delta_survival", "bytes", "kl", "top1_agreement")}
        return {**kept, "loss": found["loss"], "exact_match": found["exact_match"], "packed_alike": same["alike"]}

    def _run(self, *words: str) -> Any:
        settings = COMMON if words[0] == "train" else COMMON[:2] if words[0] == "eval" else ()
        data = () if words[0] == "import-gguf" else ("--data", str(self._data))
        command = [sys.executable, "-m", "mlx_lora", *words, *data, *settings, "--json"]
        environment = os.environ | {"MLX_LORA_HOME": str(self._folder / "home")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise Failed(f"{words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    return [_qalora(figures), *([_lora(figures)] if figures["lora"] else [])]


def _qalora(figures: dict[str, Any]) -> tuple[str, list[str], list[list[Any]]]:
    rows = [
        [line["steps"], line["zero_points"], f"{line['live']:.5f}",
         f"{max(line['delta_survival'], 0):.1%}", f"{line['loss']:.5f}", "no" if line["packed_alike"] else "yes",
         f"{line['wide_loss']:.5f}" if "wide_loss" in line else ""]
        for line in figures["qalora"]
    ]  # fmt: skip
    title = (
        "QA-LoRA on SmolLM2-135M at 4 bits, groups of 32 with float16 zero-points, two short WikiSQL rows a step at a "
        f"rate of {figures['rate']:g}; loss on "
        f"{figures['rows']} unseen rows, {figures['qalora'][0]['base']:.5f} without an adapter. `fuse --bits keep` "
        "refuses where less than half survives; here it was forced."
    )
    header = ["steps", "zero_points", "loss", "survival", "merged", "packed bytes changed", "merged, float32"]
    return title, header, rows


def _lora(figures: dict[str, Any]) -> tuple[str, list[str], list[list[Any]]]:
    rows = [
        [_written_as(line),
         f"{line['bytes'] / 1e6:.0f}" if "bytes" in line else "", line.get("kl"), _share(line.get("delta_survival")),
         f"{line['loss']:.3f}", _share(line["exact_match"])]
        for line in figures["lora"]
    ]  # fmt: skip
    title = (
        "LoRA of 60 steps on the same rows over SmolLM2-135M at 4 bits in groups of 64, merged; "
        f"{figures['rows']} unseen rows. `keep` is refused without `--force`. llama.cpp says the KL of GGUF files over "
        "the 100 most likely tokens; merged weights whose update 4 bits would lose are in Q8_0 there."
    )
    return title, ["", "MB", "KL (nats)", "survival", "loss", "exact match"], rows


def _written_as(line: dict[str, Any]) -> str:
    if "type" in line:
        return f"GGUF, `--type {line['type']}`"
    return f"`--bits {line['bits']}`" if line["bits"] else "base and adapter"


def _share(value: float | None) -> str:
    return "" if value is None else f"{max(value, 0):.0%}"
