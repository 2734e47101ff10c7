"""export ollama and export lmstudio: what is written, with how the adapter is asked; refusals that leave nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.errors import AdapterError, CannotFuse, MlxLoraError, NameTaken
from mlx_lora.interop.gguf import program
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.open import OpenModel, load_tokenizer
from mlx_lora.serve.conversation import Trained
from mlx_lora.tasks.export_ollama import asking_of, export_ollama, ollama_name
from tests.cli.conftest import Ran
from tests.interop.ollama.golang import execute
from tests.interop.ollama.reader import read_modelfile
from tests.models.tiny_gguf import write_tiny

Run = Callable[..., Ran]
CHECK = {
    "program": "llama.cpp", "positions": 8, "kl": 0.0125, "top1_agreement": 0.975, "kept": 0.98, "kept_error": 0.01,
    "quantization_kl": 0.5,
}  # fmt: skip


class Writer:
    """Writes a file in place of GGUF's, and keeps what it was asked for."""

    def __init__(self, fault: MlxLoraError | None = None) -> None:
        self.fault, self.asked = fault, {}

    def __call__(self, model: str | None, adapter: str, out: Path, **named: Any) -> dict[str, Any]:
        out.write_bytes(b"GGUF")
        self.asked = {"model": model, "adapter": adapter, "file": out.name} | named
        if self.fault:
            raise self.fault
        return {"check": CHECK}


@pytest.fixture
def mine(run: Run, data: Path, tiny_path: Path) -> str:
    """An adapter that was trained with a system message."""
    ran = run(
        "train", "--model", tiny_path, "--data", data, "--name", "mine", "train.iters=2", "data.system=You are brief",
        "data.max_seq_length=256", "adapter.rank=2",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return "mine"


def commands(out: Path) -> list[tuple[str, str]]:
    return read_modelfile((out / "Modelfile").read_text())


def test_a_directory_for_ollama(mine: str, tiny_path: Path, tmp_path: Path) -> None:
    write, out = Writer(), tmp_path / "out"
    report = export_ollama(None, mine, out, write=write, type_name="q4_k_m")
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    assert write.asked["fused"] and write.asked["type_name"] == "q4_k_m" and write.asked["file"] == "model.gguf"
    found = commands(out)
    assert found[0] == ("from", "./model.gguf") and ("system", "You are brief") in found
    assert ("parameter", "num_ctx 512") in found, "the tiny model has no more positions"
    stops = {value for name, value in found if value.startswith("stop ")}
    assert stops == {"stop <|end|>", "stop <|system|>", "stop <|user|>", "stop <|assistant|>"}
    messages = [{"role": "system", "content": "You are brief"}, {"role": "user", "content": "Q"}]
    prompt = execute(dict(found)["template"], messages)
    own = load_tokenizer(tiny_path).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == own
    card = (out / "README.md").read_text()
    assert (
        "llama.cpp, at 8 positions: 98% (±1%) of the adapter's effect is in it, KL to base and adapter 0.0125" in card
        and "ollama create mine" in card
    )
    assert report["command"] == f"ollama create mine -f {out / 'Modelfile'}" and report["check"] == CHECK
    assert str(tmp_path) not in card + (out / "Modelfile").read_text()


def test_an_adapter_over_a_base_of_ollamas_own(mine: str, tmp_path: Path) -> None:
    write, out = Writer(), tmp_path / "out"
    report = export_ollama(None, mine, out, write=write, over="llama3.2:1b", rank=3)
    assert write.asked["rank"] == 3 and not write.asked["fused"] and write.asked["file"] == "adapter.gguf"
    assert commands(out)[:2] == [("from", "llama3.2:1b"), ("adapter", "./adapter.gguf")]
    assert any("0.34.1" in note for note in report["notes"])
    (tmp_path / "base.gguf").touch()
    export_ollama(None, mine, out, write=write, over=str(tmp_path / "base.gguf"), force=True)
    assert commands(out)[0] == ("from", str(tmp_path / "base.gguf"))
    with pytest.raises(MlxLoraError, match="no file"):
        export_ollama(None, mine, tmp_path / "other", write=write, over="./missing.gguf")


def test_what_is_refused_leaves_nothing(mine: str, tmp_path: Path, home: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CannotFuse):
        export_ollama(None, mine, out, write=Writer(CannotFuse("lost")))
    assert not out.exists() and not [*tmp_path.glob(".out*")]
    out.mkdir()
    (out / "letter.txt").touch()
    unasked = Writer()
    for force in (False, True):
        with pytest.raises(NameTaken):
            export_ollama(None, mine, out, write=unasked, force=force)
    manifest = home / "adapters" / mine / "manifest.json"
    values = json.loads(manifest.read_text())
    values["recipe"]["data"]["system"] = 'say """'
    manifest.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="three quotation marks"):
        export_ollama(None, mine, tmp_path / "new", write=unasked)
    assert unasked.asked == {} and not (tmp_path / "new").exists()
    values["recipe"]["data"]["system"] = "no\u00a0break"
    manifest.write_text(json.dumps(values))
    assert any("U+00A0" in note for note in export_ollama(None, mine, tmp_path / "new", write=unasked)["notes"])


def test_what_exists_is_replaced_when_asked(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_ollama(None, mine, out, write=Writer())
    with pytest.raises(NameTaken):
        export_ollama(None, mine, out, write=Writer())
    export_ollama(None, mine, out, write=Writer(), force=True)


def test_how_an_adapter_is_asked(tiny_path: Path, tmp_path: Path) -> None:
    opened = OpenModel(tiny_path)
    plain = asking_of(opened, Trained("none"))
    assert plain.family == "none" and plain.stops == ["<|end|>"] and "alone" in plain.notes[0]
    odd = asking_of(opened, Trained(chat_template="{{ messages | length }}"))
    assert odd.template is None and "no TEMPLATE" in odd.notes[0] and not odd.stops
    deaf = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</>{% endif %}{% endfor %}"
    assert "leaves system" in asking_of(opened, Trained(chat_template=deaf, system="x")).notes[0]
    assert any("single questions" in note for note in asking_of(opened, Trained(single_questions=True)).notes)
    tools = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if tools %}{{ tools }}{% endif %}"
    assert any("refuses requests with tools" in note for note in asking_of(opened, Trained(chat_template=tools)).notes)
    assert asking_of(opened, Trained()).notes == []
    bare = shutil.copytree(tiny_path, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert asking_of(OpenModel(bare), Trained()).family == "none"


def test_the_command_writes_what_llama_cpp_loads(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running it in llama.cpp is the real tests' business."""
    monkeypatch.setattr(program, "installed", lambda: False)
    import_gguf(write_tiny(tmp_path / "base.gguf", "llama"), base := tmp_path / "base", dtype="float32")
    trained = run(
        "train", "--model", base, "--data", data, "--name", "mine", "train.iters=2", "data.template=chatml",
        "train.learning_rate=0.01",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    out, mine = tmp_path / "out", "mine"
    made = run("export", "ollama", "--adapter", mine, "--out", out, "--type", "f32")
    assert made.code == 0, made.err
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF" and (out / "model.export.json").is_file()
    assert f"ollama create mine -f {out / 'Modelfile'}" in made.out and "template: chatml" in made.out
    for words in (("--as-adapter",), ("--from", "llama3.2"), ("--as-lora", 2)):
        assert run("export", "ollama", "--adapter", mine, "--out", tmp_path / "x", *words).code == 2
    kept = run("export", "ollama", "--adapter", mine, "--out", tmp_path / "a", "--as-adapter", "--from", "base")
    assert kept.code == 0 and "0.34.1" in kept.err and "not checked" in kept.err, kept.err
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "Modelfile", "README.md", "adapter.export.json", "adapter.gguf",
    ]  # fmt: skip


def test_names_that_ollama_takes() -> None:
    assert [ollama_name(name) for name in ("Mine_1", "Übung", "東京", "a b:c")] == [
        "mine_1",
        "bung",
        "adapter",
        "a-b-c",
    ]


@pytest.mark.real
def test_lm_studio_finds_a_fused_model(run: Run, mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    refused = run("export", "lmstudio", "--adapter", mine)
    assert refused.code == 1 and "LM Studio has no folder" in refused.err and "--out" in refused.err
    (tmp_path / "user/.lmstudio").mkdir(parents=True)
    made = run("export", "lmstudio", "--adapter", mine, "--json")
    assert made.code == 0, made.err
    out = tmp_path / "user/.lmstudio/models/mlx-lora/mine"
    assert made.json["out"] == str(out) and made.json["name"] == "mlx-lora/mine"
    assert "You are brief" in made.json["notes"][0]
    card = (out / "README.md").read_text()
    assert "MLX model, fused" in card and "of the adapter's effect is in it" in card and "- system" not in card
    listed = run("models", "list", "--json").json
    assert [(model["name"], model["place"], model["use"]) for model in listed] == [
        ("mlx-lora/mine", "LM Studio", "--model")
    ]
    kept = json.loads((out / "export.json").read_text())
    assert kept["adapter"] == "mine" and kept["check"] == made.json["check"] and kept["format"] == "mlx"
    words = ("--prompt", "x", "--raw", "--max-tokens", 1)
    assert run("generate", "--model", "mlx-lora/mine", *words).code == 0
    assert run("export", "lmstudio", "--adapter", mine).code == 1, "it exists"
    assert run("export", "lmstudio", "--adapter", mine, "--force").code == 0
