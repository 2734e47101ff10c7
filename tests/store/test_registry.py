"""The adapters of the home directory, and which base each belongs to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import paths
from mlx_lora.adapters.attach import attach, put
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import AdapterError, MlxLoraError, ModelError, NameTaken
from mlx_lora.models.load import load_stored, ready
from mlx_lora.models.save import save as save_model
from mlx_lora.store import registry
from mlx_lora.store.adapter import MANIFEST, Manifest, StoredAdapter, read, save, wrappers_for
from tests.conftest import write_model

TOKENS = mx.array([[5, 9, 70, 2, 33]])
WRONG = ["../x", "a/b", "", ".hidden", "..", "a b", "a\n", "a\u200b", "x" * 129]
Write = Callable[..., Path]


@pytest.fixture
def write(tiny_path: Path) -> Write:
    """`write(name, base=…, quantization=…)` puts an adapter into the home, as training would."""

    def write(name: str, *, base: Path = tiny_path, quantization: Quantize | None = None) -> Path:
        loaded = load_stored(base, quantization=quantization)
        described = registry.describe_base(loaded)
        config = Adapter(rank=2)
        wrappers = attach(ready(loaded).model, config)
        for wrapper in wrappers.values():
            wrapper.lora_b = mx.ones_like(wrapper.lora_b)
        manifest = Manifest(
            method="lora", adapter=config.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, 8.0),
            base=described, metrics={"best_valid_loss": 0.5},
        )  # fmt: skip
        return save(paths.room("adapters", name), wrappers, manifest, layers=3)

    return write


def test_entries_are_the_directories_that_are_complete(write: Write, home: Path) -> None:
    write("mail")
    write("notes")
    (home / "adapters" / "unfinished").mkdir()
    shutil.copytree(home / "adapters" / "mail", home / "adapters" / ".mail.temporary")
    mail, notes = registry.entries()
    assert (mail.name, mail.method, mail.rank, mail.base, mail.valid_loss) == ("mail", "lora", 2, "tiny", 0.5)
    assert notes.name == "notes" and notes.bytes > 0 and notes.created
    assert registry.names() == ["mail", "notes"]


def test_a_damaged_manifest_is_listed_as_such_and_hides_no_other(write: Write) -> None:
    (write("broken") / MANIFEST).write_text("{")
    write("mail")
    assert [(entry.name, entry.method) for entry in registry.entries()] == [("broken", "damaged"), ("mail", "lora")]


def test_rename_and_remove_take_the_run_along(write: Write, home: Path) -> None:
    write("old")
    (home / "runs" / "old").mkdir(parents=True)
    (home / "runs" / "old" / "recipe.yaml").write_text("seed: 0")
    assert registry.rename("old", "new") == home / "adapters" / "new"
    assert registry.names() == ["new"] and (home / "runs" / "new" / "recipe.yaml").is_file()
    assert registry.remove("new") > 0
    assert registry.names() == [] and not any((home / "runs").iterdir())


def test_renaming_an_adapter_to_its_own_name_changes_nothing(write: Write, home: Path) -> None:
    write("mail")
    assert registry.rename("mail", "mail") == home / "adapters" / "mail"
    assert registry.names() == ["mail"]
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        registry.rename("other", "other")


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("verb", ["remove", "rename from", "rename to"])
def test_names_that_leave_the_home_are_refused(write: Write, home: Path, verb: str, name: str) -> None:
    """A name can't reach outside the home."""
    write("mail")
    actions = {
        "remove": lambda: registry.remove(name),
        "rename from": lambda: registry.rename(name, "new"),
        "rename to": lambda: registry.rename("mail", name),
    }
    with pytest.raises(MlxLoraError, match="is not a name"):
        actions[verb]()
    assert registry.names() == ["mail"] and sorted(entry.name for entry in home.parent.iterdir()) == ["home"]


def test_a_link_goes_alone_and_takes_its_name(write: Write, home: Path) -> None:
    """Removing one removes nothing it leads to, renaming never writes over one, one that leads out is no name."""
    write("mail")
    (home / "runs" / "notes").mkdir(parents=True)
    for kind, name, to in (("adapters", "link", "mail"), ("runs", "link", "notes"), ("adapters", "nowhere", "gone")):
        (home / kind / name).symlink_to(to)
    (home / "adapters" / "out").symlink_to(Path(shutil.copytree(home / "adapters" / "mail", home.parent / "elsewhere")))
    assert registry.names() == ["link", "mail"]
    with pytest.raises(NameTaken):
        registry.rename("mail", "nowhere")
    assert registry.remove("link") == 0
    assert registry.names() == ["mail"] and (home / "runs" / "notes").is_dir()
    assert not (home / "runs" / "link").is_symlink() and (home.parent / "elsewhere" / MANIFEST).is_file()


def test_what_is_taken_or_unknown_is_an_error(write: Write) -> None:
    write("mail")
    write("notes")
    with pytest.raises(NameTaken, match="'notes'"):
        registry.rename("mail", "notes")
    with pytest.raises(AdapterError, match="did you mean 'mail'?"):
        registry.remove("mial")
    with pytest.raises(AdapterError, match="did you mean 'notes'?"):
        registry.find("note")
    assert registry.names() == ["mail", "notes"]


def test_an_adapter_is_found_by_name_first_and_by_path(write: Write, tmp_path: Path) -> None:
    path = write("mail")
    outside = Path(shutil.copytree(path, tmp_path / "elsewhere"))
    assert registry.find("mail") == path and registry.find(str(outside)) == outside
    for missing in ("~nobody-here/x", str(tmp_path / "nothing"), "x" * 5000):
        with pytest.raises(AdapterError, match="no adapter"):
            registry.find(missing)


@pytest.mark.parametrize(
    "quantization",
    [None, Quantize(bits=4, group_size=32), Quantize(mode="nf4", double_quant=True)],
    ids=["plain", "4 bits", "nf4"],
)
def test_an_adapter_opens_its_base_as_it_was_trained_over(
    write: Write, tiny_path: Path, tmp_path: Path, quantization: Quantize | None
) -> None:
    """Quantized on the way in, or found in a directory that holds the same quantized tensors."""
    stored = read(write("mail", quantization=quantization))
    expected = quantization.complete() if quantization else None
    assert registry.quantization_needed(stored, tiny_path) == expected
    here = registry.open_base(str(tiny_path), [stored])
    registry.check_belongs(stored, here)
    put(here.model, wrappers_for(here.model, stored))

    save_model(load_stored(tiny_path, quantization=quantization), tmp_path / "same tensors")
    assert registry.quantization_needed(stored, tmp_path / "same tensors") is None
    there = registry.open_base(str(tmp_path / "same tensors"), [stored])
    registry.check_belongs(stored, there)
    put(there.model, wrappers_for(there.model, stored))
    np.testing.assert_array_equal(here.model(TOKENS), there.model(TOKENS))


def test_another_base_or_quantization_is_refused_for_every_adapter_at_once(
    write: Write, tiny_path: Path, tmp_path: Path
) -> None:
    """An adapter for another base, or with missing tensors, is refused."""
    other = write_model(tmp_path / "other", seed=1)
    mail, notes = read(write("mail")), read(write("notes"))
    with pytest.raises(AdapterError, match="(?s)mail belongs to another base.*notes belongs to another") as caught:
        registry.open_base(str(other), [mail, notes])
    assert caught.value.hint == "use --model tiny"

    packed = read(write("packed", quantization=Quantize(bits=4)))
    with pytest.raises(AdapterError, match="different quantizations"):
        registry.open_base(str(tiny_path), [mail, packed])
    save_model(load_stored(tiny_path, quantization=Quantize(bits=8)), tmp_path / "eight bits")
    with pytest.raises(AdapterError, match="trained over tiny at 4 bits"):
        registry.open_base(str(tmp_path / "eight bits"), [packed])
    with pytest.raises(AdapterError, match="packed belongs to tiny at 4 bits, which is not how it is loaded"):
        registry.check_belongs(packed, registry.open_base(str(tiny_path), [mail]))
    with pytest.raises(AdapterError, match="mail belongs to tiny as it is on disk"):
        registry.check_belongs(mail, registry.open_base(str(tiny_path), [packed]))


def test_an_adapter_that_names_no_base_goes_with_any(write: Write, tiny_path: Path) -> None:
    path = write("theirs")
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"base": None}))
    theirs: StoredAdapter = read(path)
    packed = read(write("packed", quantization=Quantize(bits=4)))
    loaded = registry.open_base(str(tiny_path), [theirs, packed])
    assert loaded.quantized
    registry.check_belongs(theirs, loaded)


def test_a_base_without_weights_says_so_and_not_that_it_is_another(write: Write, tiny_path: Path, home: Path) -> None:
    stored = read(write("mail"))
    empty = Path(shutil.copytree(tiny_path, home / "models" / "empty"))
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="missing weights"):
        registry.open_base("empty", [stored])


def test_a_base_in_the_hub_cache_goes_by_its_repos_name(tiny_path: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_path, snapshot)
    assert registry.describe_base(load_stored(snapshot)).name == "owner/tiny"
