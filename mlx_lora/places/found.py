"""One model that was found on this disk, and how it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.places import architectures
from mlx_lora.places.gguf_head import read_head

PACKED, MLX, TRANSFORMERS, GGUF = "MLX packed", "MLX", "transformers", "GGUF"
WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Found:
    """A model on this disk. `name` is what `--model`, or `import-gguf`, takes it by.

    `use` is "--model" for a directory that is taken as it is, "import-gguf" for a file to be converted first, and ""
    where neither can be done; `why` says the reason then.
    """

    name: str
    place: str
    kind: str
    architecture: str
    path: Path
    bytes: int
    use: str
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The keys of `models list --json`."""
        return asdict(self) | {"path": str(self.path)}

    def called(self, name: str) -> Found:
        return replace(self, name=name)


@dataclass
class Listing:
    """Everything that was found, in the order in which names are looked up, and notes on what can't be used."""

    models: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """Add a model. A name stands for one path: the second of a name is called by its path."""
        if any(other.path == found.path for other in self.models):
            return
        taken = any(other.name == found.name for other in self.models)
        self.models.append(found.called(str(found.path)) if taken else found)

    @contextmanager
    def noting(self, place: str, name: str) -> Iterator[None]:
        """Make a note of what can't be read in the block; it is another program's."""
        try:
            yield
        except (ModelError, ValueError, OSError) as fault:
            self.notes.append(f"{place}: {name}: {_said(fault)}")

    def add_directory(self, name: str, place: str, path: Path) -> bool:
        """Add a model directory; a broken one is a note. False where `path` is none: it has no config.json."""
        with self.noting(place, name):
            if not (path / "config.json").is_file():
                return False
            self.add(of_directory(name, place, path))
        return True

    def add_ggufs(self, prefix: str, place: str, ggufs: Sequence[Path]) -> None:
        """Add the language models among GGUF files of one directory, named `prefix` and the file's name."""
        for file in sorted(ggufs):
            parts = _SPLIT.fullmatch(file.name)
            if parts and int(parts[2]) != 1 and int(parts[3]):
                continue
            with self.noting(place, prefix + file.name):
                if found := of_gguf(prefix + file.name, place, file):
                    self.add(found)


def of_directory(name: str, place: str, path: Path) -> Found:
    """A directory with config.json and safetensors. Raises ModelError for what is missing or damaged, OSError."""
    config = files.read_json(path / "config.json", ModelError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json has no model_type")
    weights = sorted(path.glob(WEIGHTS))
    if not weights:
        raise ModelError("no weights, model*.safetensors")
    if absent := _absent(path):
        raise ModelError(f"{absent[0]} is missing" + (f", and {len(absent) - 1} more" if absent[1:] else ""))
    known = architectures.known_to_mlx_lm(config)
    return Found(
        name,
        place,
        _kind(config, weights[0]),
        config["model_type"],
        path,
        sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "--model" if known else "",
        "" if known else "the installed mlx-lm doesn't have its architecture",
    )


def _kind(config: dict[str, Any], weights: Path) -> str:
    if isinstance(config.get("quantization"), dict):
        return PACKED
    written_by = files.metadata(weights, ModelError)
    return MLX if isinstance(written_by, dict) and written_by.get("format") == "mlx" else TRANSFORMERS


def _absent(path: Path) -> list[str]:
    """Files that the index names, of a directory that has none of the others either: some conversions keep the index
    of their source, whose files have other names."""
    if not (path / INDEX).is_file():
        return []
    index = files.read_json(path / INDEX, ModelError)
    named = index.get("weight_map") if isinstance(index, dict) else None
    wanted = {str(file) for file in named.values()} if isinstance(named, dict) else set()
    present = {file.name for file in path.glob("*.safetensors")}
    return sorted(wanted - present) if wanted & present else []


def of_gguf(name: str, place: str, file: Path, why: str = "") -> Found | None:
    """A GGUF file, with every part of a split one; None for a projector or an adapter. Raises ValueError, OSError."""
    head = read_head(file)
    if not head.is_model:
        return None
    parts = [file]
    if split := _SPLIT.fullmatch(file.name):
        if not 0 < int(split[2]) <= int(split[3]):
            raise ValueError(f"part {int(split[2])} of {int(split[3])} by its name")
        parts = [file.with_name(f"{split[1]}-{part:05d}-of-{split[3]}.gguf") for part in range(1, int(split[3]) + 1)]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise ValueError(f"{missing[0]} is missing")
    known = head.architecture in architectures.IMPORTABLE
    return Found(
        name,
        place,
        GGUF,
        head.architecture,
        file,
        sum(part.stat().st_size for part in parts),
        "import-gguf" if known else "",
        why if known else "import-gguf doesn't read this architecture",
    )


def _said(fault: Exception) -> str:
    reason, name = getattr(fault, "strerror", None), getattr(fault, "filename", None)
    return f"{reason} ({Path(name).name})" if reason and name else str(reason or fault)
