"""Models that other programs keep on this disk: their layouts, broken entries, names, and use in place."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_lora.errors import ModelError
from mlx_lora.models.open import find_model
from mlx_lora.places import layout, listing
from mlx_lora.places.architectures import IMPORTABLE, known_to_mlx_lm
from mlx_lora.places.gguf_head import read_head
from mlx_lora.store.manifest import read_manifest
from tests.cli.conftest import Ran
from tests.conftest import write_model
from tests.models.test_gguf import tiny as write_gguf

Run = Callable[..., Ran]
COMMIT, OLDER = "a" * 40, "b" * 40
VARIABLES = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "LLAMA_CACHE", "OLLAMA_MODELS",
)  # fmt: skip


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory of the test's own, with nothing in it."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def head(file: Path, architecture: str = "llama", kind: str | None = "model") -> Path:
    """A small GGUF file of an architecture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    if kind:
        writer.add_type(kind)
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def in_hub(cache: Path, repo: str, source: Path, *, commit: str = COMMIT, main: bool = True) -> Path:
    """`source` as the hub's client caches it: blobs, and a snapshot of links to them."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in source.iterdir():
        blob = repository / "blobs" / f"{commit[0]}{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return snapshot


def in_ollama(models: Path, name: tuple[str, str, str, str], *layers: tuple[str, Path | str]) -> Path:
    """A manifest whose layers are files, or the digests of files that aren't there."""
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    written = []
    for number, (kind, file) in enumerate(layers):
        digest = file if isinstance(file, str) else f"sha256:{number:02x}{abs(hash(name)):062x}"[:71]
        if isinstance(file, Path):
            shutil.copy(file, models / "blobs" / digest.replace(":", "-"))
        written.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 1})
    manifest = models.joinpath("manifests", *name)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": written}))
    return manifest


def named() -> dict[str, Any]:
    return {model.name: model for model in listing.find_all().models}


def test_directories_and_files_of_every_place_are_found(user: Path, home: Path, tiny_path: Path) -> None:
    packed = write_model(user / "packed", quantization={"group_size": 64, "bits": 4})
    shutil.copytree(tiny_path, home / "models" / "mine")
    hub, studio, ollama = user / ".cache/huggingface/hub", user / ".lmstudio/models", user / ".ollama/models"
    in_hub(hub, "owner/packed", packed)
    shutil.copytree(packed, studio / "publisher" / "model")
    head(studio / "publisher" / "files" / "q4.gguf")
    head(studio / "publisher" / "files" / "mmproj-f16.gguf", "clip", "mmproj")
    file = head(user / "some.gguf")
    in_ollama(ollama, ("registry.ollama.ai", "library", "llama3.2", "latest"), ("model", file), ("template", "x"))
    in_ollama(ollama, ("registry.ollama.ai", "someone", "phi", "2b"), ("model", head(user / "p.gguf", "phi2")))
    in_ollama(ollama, ("hf.co", "owner", "repo", "Q4_0"), ("model", file))
    head(user / ".cache/llama.cpp/owner_repo_model.gguf")
    found = listing.find_all()
    assert found.notes == []
    assert {(m.name, m.place, m.kind, m.use) for m in found.models} == {
        ("mine", "home", "MLX", "--model"),
        ("owner/packed", "hub cache", "MLX packed", "--model"),
        ("publisher/model", "LM Studio", "MLX packed", "--model"),
        ("publisher/files/q4.gguf", "LM Studio", "GGUF", "import-gguf"),
        ("llama3.2:latest", "Ollama", "GGUF", "import-gguf"),
        ("someone/phi:2b", "Ollama", "GGUF", ""),
        ("hf.co/owner/repo:Q4_0", "Ollama", "GGUF", "import-gguf"),
        ("owner_repo_model.gguf", "llama.cpp", "GGUF", "import-gguf"),
    }
    sizes = {m.name: m.bytes for m in found.models}
    assert sizes["mine"] == sum(each.stat().st_size for each in tiny_path.iterdir())
    assert sizes["llama3.2:latest"] == file.stat().st_size


def test_every_listed_name_is_taken_in_place(run: Run, user: Path, home: Path, tiny_path: Path) -> None:
    hub, studio = user / ".cache/huggingface/hub", user / ".lmstudio/models"
    in_hub(hub, "owner/tiny", tiny_path)
    shutil.copytree(tiny_path, studio / "publisher" / "tiny")
    shutil.copytree(tiny_path, studio / "owner" / "tiny")  # the hub's has this name
    listed = run("models", "list", "--json").json
    assert [(model["name"], model["place"]) for model in listed] == [
        ("owner/tiny", "hub cache"),
        (str(studio / "owner" / "tiny"), "LM Studio"),
        ("publisher/tiny", "LM Studio"),
    ]
    for model in listed:
        assert str(find_model(model["name"])) == model["path"]
        assert run("models", "path", model["name"]).out.strip() == model["path"]
    words = ("--prompt", "x", "--raw", "--max-tokens", 1)
    assert run("generate", "--model", "publisher/tiny", *words).code == 0
    assert not (home / "models").exists(), "nothing was copied"


def test_an_adapter_finds_its_base_at_lm_studio_by_the_listed_name(
    run: Run,
    user: Path,
    home: Path,
    tiny_path: Path,
    data: Path,
) -> None:
    studio = user / ".lmstudio/models"
    shutil.copytree(tiny_path, studio / "publisher" / "tiny")
    ran = run("train", "--model", "publisher/tiny", "--data", data, "--name", "mine", "train.iters=1")
    assert ran.code == 0, ran.err
    assert read_manifest(home / "adapters" / "mine").base.name == "publisher/tiny"  # type: ignore[union-attr]
    (home / "fingerprints.json").unlink()
    asked = run("generate", "--adapter", "mine", "--prompt", "x", "--raw", "--max-tokens", 1)
    assert asked.code == 0, asked.err


def test_a_listed_gguf_is_imported_by_its_name(run: Run, user: Path, home: Path) -> None:
    file = write_gguf(user.parent / "base.gguf")
    in_ollama(user / ".ollama/models", ("registry.ollama.ai", "library", "small", "latest"), ("model", file))
    target = user / ".lmstudio/models/owner/repo/small-q4.gguf"
    target.parent.mkdir(parents=True)
    shutil.copy(file, target)
    shutil.copytree(write_model(user / "other"), home / "models" / "whole")
    listed = run("import-gguf", "--list", "--json").json
    assert [model["name"] for model in listed] == ["owner/repo/small-q4.gguf", "small:latest"]
    for number, word in enumerate(("small", "small:latest", "owner/repo/small-q4.gguf", "owner/repo")):
        made = run("import-gguf", word, "--name", f"m{number}")
        assert made.code == 0, made.err
        assert run("generate", "--model", f"m{number}", "--prompt", "x", "--raw", "--max-tokens", 1).code == 0
    refused = run("import-gguf", "smal", "--name", "n")
    assert refused.code == 1 and "'small:latest'" in refused.err and "import-gguf --list" in refused.err
    refused = run("import-gguf", "whole", "--name", "n")
    assert refused.code == 1 and "--model whole" in refused.err
    refused = run("generate", "--model", "small", "--prompt", "x")
    assert refused.code == 1 and "GGUF" in refused.err and "import-gguf small" in refused.err
    assert run("import-gguf", "--name", "n").code == 2


def test_the_snapshot_of_main_counts_unless_it_is_unfinished(user: Path, tiny_path: Path) -> None:
    hub = user / ".cache/huggingface/hub"
    main = in_hub(hub, "owner/tiny", tiny_path)
    newer = in_hub(hub, "owner/tiny", tiny_path, commit=OLDER, main=False)
    os.utime(main, (1e9, 1e9))
    assert listing.in_hub_cache("owner/tiny") == main
    (main / "model.safetensors").resolve().unlink()
    assert listing.in_hub_cache("owner/tiny") == newer
    (newer.parents[1] / "blobs" / "cafe.incomplete").touch()
    assert listing.in_hub_cache("owner/tiny") is None
    assert listing.find_all().notes == ["hub cache: owner/tiny: not complete"]
    (newer.parents[1] / "blobs" / "cafe").touch()  # the same file came whole later
    assert listing.in_hub_cache("owner/tiny") == newer


def test_broken_entries_are_notes_and_hide_nothing(user: Path, home: Path, tiny_path: Path) -> None:
    studio, ollama = user / ".lmstudio/models", user / ".ollama/models"
    shutil.copytree(tiny_path, studio / "a" / "good")
    for name, content in (("json", "{"), ("list", "[]"), ("bare", '{"model_type": "llama"}')):
        (studio / "a" / name).mkdir()
        (studio / "a" / name / "config.json").write_text(content)
    half = shutil.copytree(tiny_path, studio / "a" / "half")
    shards = {"x": "model.safetensors", "y": "model-2.safetensors"}
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    torn = head(studio / "b" / "files" / "torn.gguf")
    torn.write_bytes(torn.read_bytes()[:20])
    head(studio / "b" / "files" / "part-00001-of-00002.gguf")
    (studio / "loose-file").touch()
    (studio / "b" / "loop").symlink_to("loop")
    manifest = in_ollama(ollama, ("registry.ollama.ai", "library", "gone", "latest"), ("model", "sha256:" + "0" * 64))
    in_ollama(ollama, ("registry.ollama.ai", "library", "evil", "latest"), ("model", "sha256:../../../etc/passwd"))
    in_ollama(ollama, ("registry.ollama.ai", "library", "tensors", "latest"), ("tensor", "sha256:" + "1" * 64))
    in_ollama(ollama, ("registry.ollama.ai", "library", "cloud", "latest"))
    (manifest.parent / "torn").write_text("{")
    found = listing.find_all()
    assert [model.name for model in found.models] == ["a/good"]
    said = "\n".join(found.notes)
    for words in (
        "LM Studio: a/json: ", "a/list: config.json has no model_type", "a/bare: no weights",
        "a/half: model-2.safetensors is missing", "b/files/torn.gguf: it ends inside its metadata",
        "b/files/part-00001-of-00002.gguf: part-00002-of-00002.gguf is missing", "gone:latest: No such file",
        "evil:latest: ", "is no digest", "tensors:latest: safetensors in layers", "cloud:latest: no weights",
        "gone:torn: ",
    ):  # fmt: skip
        assert words in said, (words, said)
    assert len(found.notes) == 11


def test_an_architecture_that_isnt_known_is_listed_and_not_taken(user: Path, tiny_path: Path) -> None:
    other = shutil.copytree(tiny_path, user / ".lmstudio/models/a/other")
    (other / "config.json").write_text('{"model_type": "unheard_of"}')
    (found,) = listing.find_all().models
    assert found.use == "" and "architecture" in found.why and found.architecture == "unheard_of"


def test_known_architectures_are_those_that_mlx_lm_opens() -> None:
    from mlx_lora.models.open import check_architecture

    for named in ("llama", "mistral", "qwen3", "gemma3", "phi-msft", "kimi_k2", "base", "../llama", "bert", ""):
        try:
            check_architecture({"model_type": named})
            opens = True
        except (ModelError, AttributeError):  # mlx_lm has a file of that name that is no model
            opens = False
        if named != "base":
            assert known_to_mlx_lm({"model_type": named}) == opens, named


def test_importable_architectures_are_those_of_the_importers_table() -> None:
    names = pytest.importorskip("mlx_lora.models.gguf.names")
    assert sorted(names.ARCHITECTURES) == sorted(IMPORTABLE)


def test_what_lies_beside_an_ollama_model_is_said(user: Path) -> None:
    file, ollama = head(user / "x.gguf"), user / ".ollama/models"
    vision = head(user / "v.gguf", "clip", "mmproj")
    name = ("registry.ollama.ai", "library", "see", "latest")
    in_ollama(ollama, name, ("model", file), ("projector", vision), ("adapter", vision))
    (found,) = listing.find_all().models
    assert (found.use, found.why) == ("import-gguf", "without its adapter and vision")


def test_where_programs_look_follows_their_settings(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout.hub_cache() == user / ".cache/huggingface/hub"
    for variable, value, expected in (
        ("XDG_CACHE_HOME", user / "xdg", user / "xdg/huggingface/hub"),
        ("HF_HOME", "~/hf", user / "hf/hub"),
        ("HUGGINGFACE_HUB_CACHE", user / "older", user / "older"),
        ("HF_HUB_CACHE", "$HOME/newer", user / "newer"),
    ):
        monkeypatch.setenv(variable, str(value))
        assert layout.hub_cache() == expected
    assert layout.hub_caches() == [("hub cache", user / "newer")]
    monkeypatch.setenv("LLAMA_CACHE", str(user / "llama"))
    assert layout.hub_caches()[1] == ("llama.cpp", user / "llama") and layout.llama_cpp_folders()[0] == user / "llama"
    assert layout.lm_studio_models() == user / ".lmstudio/models"
    (user / ".cache/lm-studio").mkdir(parents=True)
    assert layout.lm_studio_models() == user / ".cache/lm-studio/models"
    (user / ".lmstudio-home-pointer").write_text(f"{user / 'studio'}\n")
    assert layout.lm_studio_models() == user / "studio/models"
    (user / "studio").mkdir()
    (user / "studio/settings.json").write_text('{"downloadsFolder": "~/downloads"}')
    assert layout.lm_studio_models() == user / "downloads"
    (user / "studio/settings.json").write_text("{")
    assert layout.lm_studio_models() == user / "studio/models"
    assert layout.ollama_models()[0] == user / ".ollama/models"
    monkeypatch.setenv("OLLAMA_MODELS", "/elsewhere")
    assert layout.ollama_models() == [Path("/elsewhere")]


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"PK\x03\x04" * 9])
def test_a_head_that_is_none_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(damage)
    with pytest.raises(ValueError, match="it ends inside|not a GGUF|GGUF version"):
        read_head(tmp_path / "x.gguf")


def test_hundreds_of_models_take_less_than_a_second(user: Path, tiny_path: Path) -> None:
    studio, hub = user / ".lmstudio/models", user / ".cache/huggingface/hub"
    for number in range(150):
        folder = studio / "publisher" / f"model-{number}"
        folder.mkdir(parents=True)
        for file in tiny_path.iterdir():
            os.link(file, folder / file.name)
        in_hub(hub, f"owner/model-{number}", folder)
    start = time.process_time()
    assert len(listing.find_all().models) == 300
    assert time.process_time() - start < 1


def test_what_another_program_keeps_to_itself_is_a_note(
    user: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that only another user may read, and a named pipe that would keep its reader waiting."""
    hub = user / ".cache/huggingface/hub"
    hidden, seen = in_hub(hub, "owner/hidden", tiny_path), in_hub(hub, "owner/seen", tiny_path)
    studio = user / ".lmstudio/models/owner/piped"
    studio.mkdir(parents=True)
    os.mkfifo(studio / "piped.gguf")
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.is_relative_to(hidden):
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    found = listing.find_all()
    assert [model.path for model in found.models] == [seen]
    assert any("owner/hidden: Permission denied" in note for note in found.notes)
    assert any("owner/piped/piped.gguf: not a regular file" in note for note in found.notes)
