"""export gguf: what is refused before anything is written, what is said, and what is kept beside the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Adapter
from mlx_lora.errors import ModelError
from mlx_lora.interop.gguf import llama_types, program
from mlx_lora.machine import limits
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.load import load_stored
from mlx_lora.store.adapter import Manifest, save
from tests.cli.conftest import Ran
from tests.interop.test_neutral import drawn
from tests.models.tiny_gguf import write_tiny

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with a tokenizer that GGUF can say."""
    folder = tmp_path_factory.mktemp("base")
    import_gguf(write_tiny(folder / "base.gguf", "llama"), folder / "mlx", dtype="float32")
    return folder / "mlx"


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters that change what the base says, in directories named after their methods."""
    folder, model = tmp_path_factory.mktemp("adapters"), load_stored(base).model
    for method in ("lora", "dora"):
        config = Adapter(method=method, rank=2, targets="all-linear")
        wrappers = drawn(model, config)
        scales = {path: wrapper.scale for path, wrapper in wrappers.items()}
        known = Manifest(method=method, adapter=config.model_dump(), modules=list(scales), scales=scales)
        save(folder / method, wrappers, known, layers=2)
    return folder


@pytest.fixture
def export(run: Run, base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`export gguf` of the adapter of method lora; llama.cpp is for the real tests."""
    monkeypatch.setattr(program, "installed", lambda: False)

    def call(*words: object, method: str = "lora") -> Ran:
        chosen = [] if "--adapter" in words else ["--adapter", adapters / method]
        return run("export", "gguf", *([] if "--model" in words else ["--model", base]), *chosen, *words)

    return call


def says_what_the_base_says(monkeypatch: pytest.MonkeyPatch, *, live: bool) -> list[Any]:
    """llama.cpp that answers like the base, or like base and adapter; the calls it got."""
    from mlx_lora.tasks import export_gguf

    calls: list[Any] = []
    known: list[Any] = []
    reference = export_gguf.reference

    def remembered(*words: Any, **named: Any) -> Any:
        known.append(reference(*words, **named))
        return known[-1]

    def answers(file: Path, prompts: Any, count: int, adapter: Path | None, **named: Any) -> Any:
        calls.append((file.name, adapter and adapter.name))
        return known[0].live if live and file.name != "base.gguf" or adapter else known[0].base

    monkeypatch.setattr(program, "installed", lambda: True)
    monkeypatch.setattr(export_gguf, "reference", remembered)
    monkeypatch.setattr(program, "top_tokens", answers)
    return calls


def test_an_adapter_without_llama_cpp_is_written_and_said_to_be_unchecked(export: Run, tmp_path: Path) -> None:
    ran = export("--out", tmp_path / "out" / "a.gguf", "--json")
    assert ran.code == 0, ran.err
    report, kept = (
        json.loads(text) for text in (ran.out.splitlines()[-1], (tmp_path / "out" / "a.export.json").read_text())
    )
    assert report == {"out": str(tmp_path / "out" / "a.gguf")} | kept
    assert kept["check"] is None and "pip install xllamacpp" in kept["unchecked"] and kept["relative_error"] == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.export.json", "a.gguf"]


@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_a_merged_model_is_compared_with_base_and_adapter(
    export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    calls = says_what_the_base_says(monkeypatch, live=True)
    ran = export("--fused", "--type", form, "--out", tmp_path / "m.gguf")
    assert ran.code == 0, ran.err
    assert "100% (±0%) of the adapter's effect is in it" in ran.out and f"merged, {form}" in ran.out
    assert [name for name, _ in calls] == ["m.gguf", *(["base.gguf"] if form == "q8_0" else [])]
    assert ("the number format alone" in ran.out) == (form == "q8_0")


@pytest.mark.parametrize("words", [(), pytest.param(("--fused",), marks=pytest.mark.real)])
def test_a_file_that_lost_the_adapter_is_not_written_unless_forced(
    export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    says_what_the_base_says(monkeypatch, live=False)
    if not words:
        monkeypatch.setattr(program, "top_tokens", lambda *w, **n: (_ for _ in ()).throw(ModelError("it aborts")))
    ran = export(*words, "--out", tmp_path / "m" / "m.gguf")
    assert ran.code == 1 and ("0% of the adapter's effect" if words else "it aborts") in ran.err
    assert not list((tmp_path / "m").iterdir())
    if words:
        forced = export(*words, "--out", tmp_path / "m" / "m.gguf", "--force")
        assert forced.code == 0 and (tmp_path / "m" / "m.gguf").is_file()


def test_a_model_too_large_to_run_is_written_and_said_to_be_unchecked(
    export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = says_what_the_base_says(monkeypatch, live=True)
    monkeypatch.setattr(limits, "too_large", lambda size: "its weights take 13 GB, and 8 are free")
    ran = export("--fused", "--out", tmp_path / "m.gguf")
    assert ran.code == 0 and "not checked: its weights take 13 GB" in ran.err and not calls


def test_the_nearest_lora_of_a_method_without_an_adapter_form(export: Run, tmp_path: Path) -> None:
    refused = export("--out", tmp_path / "d.gguf", method="dora")
    assert refused.code == 1 and "no adapters of method dora" in refused.err and "--as-lora" in refused.err
    ran = export("--as-lora", 24, "--out", tmp_path / "d.gguf", method="dora")
    assert ran.code == 0 and "the nearest LoRA of rank 24 is" in ran.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "a.bin"), "doesn't end in .gguf"),
        (("--out", "taken.gguf"), "taken.gguf exists"),
        (("--out", "recorded.gguf"), "recorded.export.json exists"),
        (("--out", "folder.gguf"), "folder.gguf is a directory"),
        (("--out", "a.gguf", "--adapter", "nobody"), "no adapter 'nobody'"),
        (("--out", "a.gguf", "--model", "nowhere"), "no directory 'nowhere'"),
        (("--out", "a.gguf", "--fused", "--type", "q4_2"), "GGUF type 'q4_2' is not known"),
        (("--out", "a.gguf", "--fused", "--type", "q4_k_m"), "no llama-quantize on PATH"),
        (("--out", "a.gguf", "--type", "f16"), "add --fused"),
        (("--out", "a.gguf", "--fused", "--as-lora", "2"), "holds all of any method"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(
    export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr(llama_types, "tool", lambda: None)
    folder = tmp_path / "out"
    (folder / "folder.gguf").mkdir(parents=True)
    for name in ("taken.gguf", "recorded.export.json"):
        (folder / name).write_text("theirs")
    before = sorted(file.name for file in folder.iterdir())
    given = list(words)
    given[given.index("--out") + 1] = str(folder / given[given.index("--out") + 1])
    ran = export(*given)
    assert ran.code in (1, 2) and says in ran.err
    assert sorted(file.name for file in folder.iterdir()) == before
    assert (folder / "taken.gguf").read_text() == "theirs"
