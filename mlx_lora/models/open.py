"""A path or a name becomes an `OpenModel`: a directory that was found once, with what its files say of the model.

Every command that needs a model begins with `open_model`. Configuration and tokenizer are read once, when they are
first asked for. Weights are `load.py`'s business.

Nothing is ever fetched: a repo id that isn't on disk is an error that names `pull`. Nothing in a model directory is
ever executed: configurations that ask for code, and weights that are pickles, are refused before they are opened. What
is ignored (`auto_map`, an index that the files don't agree with) is noted in the log; the command line shows it.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_lora import files, paths
from mlx_lora.errors import ModelError, nearest
from mlx_lora.machine import allocation
from mlx_lora.models import token_ids
from mlx_lora.places import listing
from mlx_lora.places.listing import REPO

with allocation.file_limits_kept():
    import mlx_lm.utils as mlx_lm_utils

# Settings that make mlx_lm or transformers run code. `auto_map` only names some, for whoever asks to run it.
RUNS_CODE = ("model_file", "_attn_implementation_internal")
# A model is built before its weights are held against it, layer by layer: more than any model has would take for ever.
COUNTS = re.compile(r"(.*_)?n(um)?_(.*_)?(layer|block|expert)s?")
MOST_LAYERS = 2048
# Files by these endings are opened by mlx_lm and transformers; the ones that hold a vocabulary may be large.
READ_ENDINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")

log = logging.getLogger(__name__)


@dataclass
class OpenModel:
    """A model directory that was found. What its files say is read once, when it is first asked for."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is in the file. Raises ModelError as `read_config` does."""
        return read_config(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        """mlx_lm's tokenizer, with chat template and every end token. Raises ModelError where it can't be loaded."""
        return load_tokenizer(self)

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors files of the weights, by name. Raises ModelError as `check_files` does."""
        check_files(self.path)
        return weight_files(self.path)

    @property
    def ends(self) -> Any:
        """`eos_token_id` of generation_config.json, which mlx_lm takes before that of config.json."""
        return self.generation.get("eos_token_id") or self.config.get("eos_token_id")

    @property
    def generation(self) -> dict[str, Any]:
        """generation_config.json, how the model's makers want it sampled; empty where there is none."""
        file = self.path / "generation_config.json"
        found = files.read_json(file, ModelError) if file.exists() else {}
        return found if isinstance(found, dict) else {}


# What stands for a model: one that is open, its directory, or a word that the user gave.
Model = OpenModel | Path | str


def open_model(model: Model) -> OpenModel:
    """Find a model once; one that is open already is returned as it is. Raises ModelError as `find_model` does."""
    if isinstance(model, OpenModel):
        return model
    return OpenModel(model if isinstance(model, Path) and model.is_dir() else find_model(str(model)))


def find_model(model: str) -> Path:
    """The directory that `model` names: by the rule of `paths.find`, else by a name that `models list` prints.

    Raises ModelError saying where it looked; never asks a hub.
    """
    path = paths.find("models", model)
    if path and path.is_dir():
        return path
    if path:
        hint = (
            f"mlx-lora import-gguf {model} --name NAME"
            if path.suffix == ".gguf"
            else "name the directory that holds it"
        )
        raise ModelError(f"{model} is a file, a model is a directory", hint=hint)
    if listed := listing.directory(model):
        return listed
    raise _not_found(model)


def _not_found(model: str) -> ModelError:
    where = f"no directory {model!r}" + (
        "" if paths.is_path(model) else f", and no model of that name in {paths.home() / 'models'}"
    )
    names, close = listing.model_names(), listing.close_to(model)
    similar = f"; did you mean {close[0]!r}?" if close else nearest(model, names) if names else ""
    hint = "mlx-lora models list" if close else f"mlx-lora pull {model if REPO.fullmatch(model) else 'REPO'}"
    return ModelError(where + similar, hint=hint)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises ModelError where it is missing or broken, or would have code run.

    So does a tokenizer that only code from the directory could make; code that is named but not needed is noted.
    """
    file = path / "config.json"
    if not os.path.lexists(file):
        raise ModelError(f"{path}: not a model directory, config.json is missing")
    config = files.read_json(file, ModelError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file}: has no model_type")
    _refuse_code(file, config)
    if (settings := path / "tokenizer_config.json").exists():
        _refuse_code(settings, values := files.read_json(settings, ModelError))
        _check_tokenizer_class(settings, values)
    for part in files.mappings(config):
        for key, value in part.items():
            if isinstance(value, int | float) and value > MOST_LAYERS and COUNTS.fullmatch(key[:80]):
                raise ModelError(f"{file}: {key} is {value}; the limit is {MOST_LAYERS}")
    return config


def _refuse_code(file: Path, config: Any) -> None:
    """Raise ModelError where a configuration, or any part of it, would have code run."""
    for part in files.mappings(config):
        for key in RUNS_CODE:
            if part.get(key) is not None:
                raise ModelError(f"{file}: {key!r} asks to run code from the model directory; refused")
    if any(part.get("auto_map") for part in files.mappings(config)):
        log.info("%s names code that comes with the model (auto_map): ignored, it never runs", file)


def _check_tokenizer_class(file: Path, settings: Any) -> None:
    """Raise ModelError where `auto_map` makes the tokenizer and transformers has no class of that name."""
    named = settings.get("auto_map") if isinstance(settings, dict) else None
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    if not named:
        return
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    of_code = [str(name).rpartition(".")[2] for name in (named if isinstance(named, list) else [named]) if name]
    kind = str(settings.get("tokenizer_class") or (of_code or ["?"])[-1])
    if any(tokenizer_class_from_name(name) is not None for name in (kind, kind.removesuffix("Fast"))):
        return
    there = (file.parent / "tokenizer.json").exists()
    raise ModelError(
        f"{file}: only code that comes with the model can make its tokenizer, {kind[:100]}; it never runs",
        hint='to read tokenizer.json without it, set "tokenizer_class": "PreTrainedTokenizerFast" and remove auto_map'
        if there
        else "choose a conversion of the model that has tokenizer.json and a tokenizer_class of transformers",
    )


def check_architecture(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
    """mlx_lm's classes of a model and of its arguments. Raises ModelError where it has none for this config.json."""
    try:
        return mlx_lm_utils._get_classes(config)  # type: ignore[no-any-return]
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"config.json: architecture {config.get('model_type')!r} is not known to the installed mlx-lm ({error})",
            hint="a newer mlx-lm may have it; Llama, Mistral, Qwen, Gemma and Phi models are safe choices",
        ) from None


def _arguments(config: dict[str, Any]) -> type | None:
    """mlx_lm's class of a model's settings, None for an architecture that it doesn't have."""
    try:
        return check_architecture(config)[1]  # type: ignore[no-any-return]
    except ModelError:
        return None


def check_files(path: Path) -> None:
    """Raise ModelError listing everything a model directory lacks or holds damaged, before anything is loaded."""
    missing, weights = [], weight_files(path)
    if not weights:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in files.PICKLES)
        also = f" ({', '.join(pickles[:3])} can run code and is never read)" if pickles else ""
        missing.append(f"weights, model*.safetensors{also}")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        missing.append("a tokenizer, tokenizer.json or tokenizer.model")
    faults = [f"missing {' and '.join(missing)}"] if missing else []
    faults += _faults_of_texts(path)
    faults += [f"{file.name} can't be loaded: {found}" for file in weights if (found := files.safetensors_fault(file))]
    if faults:
        pointer = any(files.LFS_POINTER in fault for fault in faults)
        hint = "`git lfs pull` in the clone it came from fetches the files themselves" if pointer else None
        raise ModelError(f"{path}: " + "\n  ".join(faults), hint=hint)


def _faults_of_texts(path: Path) -> list[str]:
    """What is wrong with the files beside the weights that mlx_lm and transformers open by themselves."""
    entries = sorted([*path.iterdir(), *path.glob("additional_chat_templates/*")])
    read = [file for file in entries if file.suffix in READ_ENDINGS]
    sizes = {file: files.LARGE if file.name in VOCABULARIES else files.SMALL for file in read}
    return [f"{file.name} {found}" for file, most in sizes.items() if (found := files.fault(file, most=most))]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names."""
    return sorted(path.glob("model*.safetensors"))


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model, with its chat template and every end token, without any weights.

    Made anew in every call; `OpenModel.tokenizer` makes it once.
    """
    opened = open_model(model)
    config = opened.config  # refuses what would run code
    if faults := _faults_of_texts(opened.path):
        raise ModelError(f"{opened.path}: " + "\n  ".join(faults))
    with files.refusing(ModelError, f"{opened.path}: its tokenizer can't be loaded"):
        ends = [opened.ends] if isinstance(opened.ends, int) else opened.ends
        if not isinstance(ends, list | None) or any(not isinstance(end, int) for end in ends or []):
            raise ModelError(f"{opened.path}: eos_token_id is neither a number nor a list of numbers")
        never = {"trust_remote_code": False}  # left open, transformers asks at the terminal whether to run the code
        tokenizer = mlx_lm_utils.load_tokenizer(opened.path, never, eos_token_ids=ends)
        token_ids.remember_rows(tokenizer, token_ids.rows_of(config, _arguments(config)))
    return tokenizer
