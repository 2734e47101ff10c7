"""A fused model as a directory that transformers loads: half precision, under transformers' names.

mlx_lm keeps a published checkpoint's names for most architectures. It stacks the experts of a layer into one array, and
renames the text part of some vision models; both are undone here. An architecture that isn't in the tables was never
compared with transformers, and is refused by name.

Before a byte is written, mlx_lm's own `sanitize` reads the new names back: it must find every array of the model.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.errors import ModelError
from mlx_lora.interop.gate import COUNT, TopTokens, most_likely
from mlx_lora.models.index import INDEX

Named = list[tuple[str, mx.array]]

# mlx_lm's modules whose names are transformers' own, experts apart.
SAME = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral3", "olmo2", "phi3",
    "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
# Names of an expert's projections in a published checkpoint, where mlx_lm has gate_proj, up_proj and down_proj.
PLAIN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERTS = {"mixtral": NUMBERED, "olmoe": PLAIN, "qwen2_moe": PLAIN, "qwen3_moe": PLAIN}
# Beginnings that mlx_lm's vision models have, and those of the checkpoint.
PREFIXES = {"gemma3": {"language_model.": "language_model."}}
STACKED = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def architecture_of(model: nn.Module) -> str:
    """mlx_lm's module of the model."""
    return type(model).__module__.rpartition(".")[2]


def check(model: nn.Module) -> None:
    """Raise ModelError for an architecture whose names aren't known here; worth knowing before the work."""
    if (name := architecture_of(model)) not in (*SAME, *EXPERTS, *PREFIXES):
        known = ", ".join(sorted((*SAME, *EXPERTS, *PREFIXES)))
        raise ModelError(
            f"{name}: how transformers names its tensors is not known here, so nothing was written",
            hint=f"fuse --bits 16 writes a directory for MLX; known for export hf: {known}",
        )


def renamed(model: nn.Module, arrays: Named) -> Named:
    """The model's arrays under transformers' names, experts apart again as slices. Raises ModelError as `check` does,
    and where mlx_lm wouldn't read the new names as this model."""
    check(model)
    names = architecture_of(model)
    prefixes, experts = PREFIXES.get(names, {}), EXPERTS.get(names, {})
    written: Named = []
    for name, array in arrays:
        if experts and (found := STACKED.fullmatch(name)):
            block, projection, kind = found.groups()
            stems = [f"{block}.experts.{number}.{experts[projection]}" for number in range(array.shape[0])]
            written += [(f"{stem}.{kind}", array[number]) for number, stem in enumerate(stems)]
        else:
            old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            written.append((prefixes.get(old, "") + name.removeprefix(old), array))
    _read_back(model, arrays, written)
    return written


def _read_back(model: nn.Module, arrays: Named, written: Named) -> None:
    """Raise ModelError unless mlx_lm makes the model's names and shapes of what is written."""
    twin = copy.copy(model)  # reading may change the model: a head that is tied is taken away
    for part in (twin, getattr(twin, "language_model", twin)):
        part.setdefault("lm_head", None)
    sanitize = getattr(twin, "sanitize", lambda named: named)
    found = {name: array.shape for name, array in sanitize(dict(written)).items()}
    expected = {name: array.shape for name, array in arrays}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ModelError(
            f"{architecture_of(model)}: mlx_lm doesn't read these back as they were: {', '.join(wrong[:5])}"
        )


def as_one_of_several(folder: Path) -> None:
    """Give `model.safetensors` another name where there are files beside it (vision): transformers reads a file of that
    name alone, and the index only where there is none."""
    single, index = folder / "model.safetensors", folder / INDEX
    others = [file for file in folder.glob("*.safetensors") if file != single]
    if not single.exists() or not others:
        return
    named = folder / "model-text.safetensors"
    single.rename(named)
    values = json.loads(index.read_text())
    files = {name: named.name if file == single.name else file for name, file in values["weight_map"].items()}
    index.write_text(json.dumps(values | {"weight_map": files}, indent=4))


def transformers_here() -> bool:
    """Whether transformers can run a model on this machine, which takes torch."""
    from importlib.util import find_spec

    return find_spec("torch") is not None


def top_tokens(
    path: Path, prompts: Sequence[Sequence[int]], *, count: int = COUNT, adapter: Path | None = None
) -> TopTokens:
    """What transformers says of the next token after each prompt, computed on the processor in the stored dtype.

    With `adapter` PEFT puts that over the model. Raises ModelError where one of them doesn't load, with its own words.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    found: TopTokens = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # they are about what these libraries will rename
        model = _loaded(path, adapter)
        for prompt in prompts:
            logits = model(torch.tensor([list(prompt)])).logits[0, -1:]
            found += most_likely(np.asarray(logits.float().numpy()), count=count)
    return found


def _loaded(path: Path, adapter: Path | None) -> Any:
    """The model as transformers loads it, with PEFT's adapter over it if one is given."""
    from transformers import AutoModelForCausalLM

    program = "transformers"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), local_files_only=True, dtype="auto")
        if adapter is not None:
            from peft import PeftModel

            program = "PEFT"
            model = PeftModel.from_pretrained(model, str(adapter))
        return model.eval()
    except Exception as error:  # whatever it raises: this isn't anything that the program loads
        raise ModelError(f"{program} doesn't load what was written: {type(error).__name__}: {error}") from error
