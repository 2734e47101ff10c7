"""Damaged files of every kind: each loads or is refused by one error of ours, soon, and nothing ends the process.

Seeds are fixed. A few of each kind run always, 10,000 of them under `-m real`; both read in this process, so that a
crash in a library's own code ends the test run. A hang ends it too, with every thread's place on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from gguf import GGMLQuantizationType as Kind

from mlx_lora.adapters.attach import attach
from mlx_lora.cli import main
from mlx_lora.config import Adapter, Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.fit import encode_file
from mlx_lora.data.read import find_splits, read
from mlx_lora.errors import MlxLoraError
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.load import load, ready
from mlx_lora.models.open import load_tokenizer
from mlx_lora.recipe import load_recipe
from mlx_lora.store import adapter as store
from tests import fuzz
from tests.conftest import write_model
from tests.data.conftest import ANSWER, TALK, TOOLS
from tests.models.test_gguf import tiny as write_gguf

LONGEST = 5.0  # seconds
Read = Callable[[Path], Any]


def read_weights(file: Path) -> None:
    for array in store.read_arrays(file).values():
        mx.eval(array)


def read_base(file: Path) -> None:
    loaded = load(file.parent)
    mx.eval(loaded.model(mx.array([[5, 9, 70, 2]])))


def read_tokenizer(file: Path) -> None:
    tokenizer = load_tokenizer(file.parent)
    tokenizer.decode(tokenizer.encode("say 5 twice, héllo"))


def read_gguf(file: Path) -> None:
    import_gguf(file, file.parent / "out", force=True)
    load_tokenizer(file.parent / "out").encode("hello")


def read_recipe(file: Path) -> None:
    load_recipe(file)


class Valid:
    """A valid file of every kind, with what reads it: `targets[kind]` is a list of (file, read)."""

    def __init__(self, folder: Path):
        base = write_model(folder / "base", num_hidden_layers=1)
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [256]}))
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        self.tokenizer = load_tokenizer(base)
        adapter, theirs = self._adapter(base, folder / "adapter"), folder / "theirs"
        shutil.copytree(adapter, theirs)
        (theirs / store.MANIFEST).unlink()
        gguf = folder / "gguf" / "tiny.gguf"
        gguf.parent.mkdir()
        write_gguf(gguf, kind=lambda stem: Kind.Q4_0 if "attn" in stem else Kind.Q8_0)
        fuzz.learn_gguf(gguf)
        rows = [{"messages": TALK + ANSWER, "tools": TOOLS}, {"messages": [*TALK[:3]]}, {"messages": ANSWER}]
        data = folder / "data"
        data.mkdir()
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (data / "list.json").write_text(json.dumps(rows))
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            "model: base\nadapter:\n  rank: 8\n  targets: [q_proj, v_proj]\n  rank_pattern: {q_proj: 4}\n"
            "data:\n  path: data\n  mask: auto\ntrain:\n  learning_rate: 2.0e-4\n  grad_checkpoint: on\nseed: 0\n"
        )
        self.targets: dict[str, list[tuple[Path, Read]]] = {
            "safetensors": [(adapter / store.WEIGHTS, read_weights)] * 9 + [(base / "model.safetensors", read_base)],
            "gguf": [(gguf, read_gguf)],
            "json": [
                *[(base / "config.json", read_base)] * 2,
                *((base / name, read_tokenizer) for name in ("tokenizer.json", "tokenizer_config.json")),
                *((base / name, read_base) for name in ("generation_config.json", "model.safetensors.index.json")),
                *((adapter / name, self.read_adapter) for name in (store.CONFIG, store.MANIFEST)),
                (theirs / store.CONFIG, self.read_adapter),
                (data / "list.json", self.read_rows),
            ],
            "jsonl": [(data / "train.jsonl", self.read_rows)],
            "yaml": [(recipe, read_recipe)],
        }
        self.base = load(base)

    @staticmethod
    def _adapter(base: Path, out: Path) -> Path:
        loaded, config = load(base), Adapter(rank=2, rank_pattern={"q_proj": 1})
        wrappers = attach(ready(loaded).model, config)
        scales = {path: config.scale_of(path) for path in wrappers}
        manifest = store.Manifest(method="lora", adapter=config.model_dump(), modules=list(wrappers), scales=scales)
        return store.save(out, wrappers, manifest, layers=1)

    def read_adapter(self, file: Path) -> None:
        store.wrappers_for(self.base.model, store.read(file.parent))

    def read_rows(self, file: Path) -> None:
        for found in find_splits(file).values():
            source = read(found, Data())
            problems = encode_file(source.file, Encoder(self.tokenizer, Data())).problems
            if problems:
                raise MlxLoraError(str(problems))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    return Valid(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def ends_when_it_hangs() -> Iterator[None]:
    """A reader that can't be stopped by an exception is stopped with the process."""
    yield
    faulthandler.cancel_dump_traceback_later()


def tried(file: Path, reader: Read, content: bytes) -> tuple[str, str]:
    """What became of reading `file` with other bytes: loaded, refused, or what must not happen; and the error."""
    original = file.read_bytes()
    file.write_bytes(content)
    faulthandler.dump_traceback_later(6 * LONGEST, exit=True)
    start = time.perf_counter()
    try:
        reader(file)
        outcome, said = "loaded", ""
    except MlxLoraError as error:
        outcome, said = "refused", error.message
    except BaseException as error:
        outcome, said = f"escaped: {type(error).__name__}", str(error)
    finally:
        file.write_bytes(original)
        shutil.rmtree(file.parent / "out", ignore_errors=True)
    if (seconds := time.perf_counter() - start) > LONGEST:
        outcome = f"took {seconds:.1f} s"
    return outcome, said


def damage(valid: Valid, kind: str, count: int) -> Counter[str]:
    """Outcomes of `count` damaged files of a kind; a failure names the seeds that must not have done what they did."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for seed in range(count):
        random = Random(f"{kind} {seed}")
        file, reader = random.choice(valid.targets[kind])
        outcome, said = tried(file, reader, fuzz.mutate(kind, file.read_bytes(), random))
        outcomes[outcome] += 1
        if outcome not in ("loaded", "refused") or (outcome == "refused" and not said):
            wrong.append(f"{kind} {seed} ({file.name}): {outcome} {said[:200]}")
    assert not wrong, "\n".join(wrong[:20])
    return outcomes


@pytest.mark.parametrize("kind", fuzz.WAYS)
def test_every_kind_is_read_while_it_is_sound(valid: Valid, kind: str) -> None:
    for file, reader in valid.targets[kind]:
        assert tried(file, reader, file.read_bytes()) == ("loaded", ""), file


@pytest.mark.parametrize("kind", fuzz.WAYS)
def test_damaged_files_load_or_are_refused(valid: Valid, kind: str) -> None:
    outcomes = damage(valid, kind, 80)
    assert outcomes["refused"] > 10


@pytest.mark.real
@pytest.mark.parametrize("kind", fuzz.WAYS)
def test_many_damaged_files_load_or_are_refused(valid: Valid, kind: str) -> None:
    outcomes = damage(valid, kind, 2000)
    print(f"\n{kind}: {dict(outcomes)}")
    assert outcomes["loaded"] and outcomes["refused"]


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "safetensors": lambda file: ["adapters", "verify", file.parent],
    "gguf": lambda file: ["import-gguf", file, file.parent / "out"],
    "json": lambda file: ["generate", "--model", file.parent, "--prompt", "hi", "--max-tokens", 2],
    "jsonl": lambda file: ["data", "check", file],
    "yaml": lambda file: ["train", file, "--model", "nowhere"],
}


@pytest.mark.parametrize("kind", fuzz.WAYS)
def test_damaged_files_on_the_command_line(valid: Valid, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten of each: an error is one of ours, never a traceback or a surprise."""
    file, _ = valid.targets[kind][0]
    codes = set()
    for seed in range(10):
        original = file.read_bytes()
        file.write_bytes(fuzz.mutate(kind, original, Random(f"command {kind} {seed}")))
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(word) for word in COMMANDS[kind](file)])
        finally:
            file.write_bytes(original)
            shutil.rmtree(file.parent / "out", ignore_errors=True)
        code, shown = ended.value.code, capsys.readouterr().err
        codes.add(code)
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert code in (0, 1) and "Traceback" not in shown and "unexpected" not in shown, shown
        assert len(errors) == (code if kind != "jsonl" else 0), shown
    assert 1 in codes
