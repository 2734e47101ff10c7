"""What `plan` predicts beside what a run measures, and the fit of its coefficients; QLoRA's table by arithmetic alone.

The fitted coefficients are what `mlx_lora/train/plan.py` has to say: a test compares, and predictions are made anew.
LLaMA-7B's shape is not run again: its peaks are those that `shape_7b` recorded.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.bench import results
from tests.bench.inputs import Inputs
from tests.bench.process import side

LENGTHS = (128, 512, 2048)
LLAMA = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 640, "num_hidden_layers": 6, "intermediate_size": 1920,
    "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 5, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 32768, "sliding_window": 512,
    "sliding_window_pattern": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
# Wide layers and few words: what follows attention decides, as it does in large models.
WIDE = LLAMA | {
    "hidden_size": 2048, "num_hidden_layers": 3, "intermediate_size": 5632, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"Qwen3's kind": QWEN3, "Gemma 3's kind": GEMMA3, "a wide Llama": WIDE}
# Three of four layers have a state in place of attention.
QWEN35 = {
    "model_type": "qwen3_5", "hidden_size": 768, "num_hidden_layers": 4, "intermediate_size": 2048,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 8,
    "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4, "vocab_size": 32768, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1408,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "vocab_size": 32768, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1408,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "vocab_size": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
# They are measured at 4 bits.
FURTHER = {"Qwen3.5's kind": QWEN35, "DeepSeek-V3's kind": DEEPSEEK_V3, "Qwen3-MoE's kind": QWEN3_MOE}
# Layers, hidden, inner, heads: arXiv 2302.13971, table 2.
SIZES = {
    "7B": (32, 4096, 11008, 32), "13B": (40, 5120, 13824, 40), "33B": (60, 6656, 17920, 52),
    "65B": (80, 8192, 22016, 64),
}  # fmt: skip
# GB of the paper: of training with batch 1 and 512 positions (its figure of the memory footprint), of it the base; and
# of the finished Guanaco models in its table.
QLORA = {"7B": (6.9, 5.05, 5), "13B": (11.3, 8.48, 10), "33B": (24.7, 19.3, 21), "65B": (45.0, 37.1, 41)}
POSITIONS = 512


def llama(size: str) -> dict[str, Any]:
    """The configuration of a LLaMA."""
    layers, hidden, inner, heads = SIZES[size]
    return LLAMA | {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }  # fmt: skip


def measure(inputs: Inputs, quick: bool, only: str | None = None) -> dict[str, Any]:
    """Every run with its prediction, the configurations, the fitted coefficients, and QLoRA's shapes.

    `only` names one of FURTHER: its runs are measured, the others and the coefficients are those on record.
    """
    if only is not None:
        return _renewed(only)
    configs: dict[str, Any] = SHAPES | FURTHER
    runs = []
    for length in LENGTHS[:1] if quick else LENGTHS:
        for bits in (4, None):
            for checkpoint in ("off", "on"):
                runs.append(_run("SmolLM2-135M", bits, length, checkpoint, configs, inputs.model(bits)))
    runs += [] if quick else _others(inputs, configs)
    runs += _recorded(configs)
    runs += [] if quick else [run for base in FURTHER for run in _further(base, configs)]
    return {"configs": configs, **fitted(runs, configs)}


def _renewed(base: str) -> dict[str, Any]:
    """The recorded figures with the runs of one of FURTHER measured anew."""
    figures = results.read()["plan"]["figures"]
    configs = figures["configs"]
    measured = _further(base, configs)
    found = side("ours_plan.predicted", runs=[{**run, "config": configs[base]} for run in measured])["predicted"]
    new = [{**run, "predicted_bytes": total} for run, total in zip(measured, found, strict=True)]
    return {**figures, "runs": [run for run in figures["runs"] if run["base"] != base] + new}


def _further(base: str, configs: dict[str, Any]) -> list[dict[str, Any]]:
    """One of FURTHER, on rows of 512 and of 2,048 positions, with where and when: the other runs may be older."""
    configs[base] = FURTHER[base]
    kinds = ((512, "off"), (2048, "off"), (2048, "on"))
    where = {"cpu": results.machine()["cpu"], "date": datetime.now(UTC).date().isoformat()}
    return [_run(base, 4, length, checkpoint, configs) | where for length, checkpoint in kinds]


def fitted(runs: list[dict[str, Any]], configs: dict[str, Any]) -> dict[str, Any]:
    """The runs with their predictions, by the coefficients fitted to them, and QLoRA's shapes: no measuring."""
    found = side("ours_plan.fit", runs=[{**run, "config": configs[run["base"]]} for run in runs])
    predicted = [{**run, "predicted_bytes": total} for run, total in zip(runs, found["predicted"], strict=True)]
    sizes = {size: llama(size) for size in SIZES}
    table = side("ours_plan.shapes", configs=sizes, length=POSITIONS, coefficients=found["coefficients"])
    return {"runs": predicted, "coefficients": found["coefficients"], "qlora": table}


def _others(inputs: Inputs, configs: dict[str, Any]) -> list[dict[str, Any]]:
    """What the first table of runs doesn't decide: other adapters, other architectures, wide layers."""
    runs = []
    for checkpoint in ("off", "on"):
        runs.append(_run("SmolLM2-135M", 4, 512, checkpoint, configs, inputs.model(4), targets="all-linear"))
        runs += [_run(base, 4, 512, checkpoint, configs) for base in SHAPES]
        runs += [_run("a wide Llama", bits, 128, checkpoint, configs) for bits in (4, None)]
    runs.append(_run("a wide Llama", 4, 16, "on", configs, targets="all-linear", rank=64))
    return runs


def _run(
    base: str,
    bits: int | None,
    length: int,
    checkpoint: str,
    configs: dict[str, Any],
    model: str | None = None,
    **adapter: Any,
) -> dict[str, Any]:
    options = {"bits": bits, "length": length, "checkpoint": checkpoint, "targets": "attention", "rank": 8, **adapter}
    found = side("ours_plan.run", model=model, config=configs.get(base) if model is None else None, **options)
    configs[base] = found["config"]
    print(f"  {base} {options}: {found['peak_bytes'] / 1e9:.3f} GB", flush=True)
    return {"base": base, **options, "peak_bytes": found["peak_bytes"]}


def _recorded(configs: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of LLaMA-7B's shape, with loss on the last quarter."""
    configs["LLaMA-7B's shape"] = llama("7B")
    return [
        {"base": "LLaMA-7B's shape", "bits": 4, "length": int(length), "checkpoint": "on", "targets": "attention",
         "rank": 8, "trained": run["trained_tokens"], "optimizer": "adam", "peak_bytes": run["peak_bytes"]}
        for length, run in results.read()["shape_7b"]["figures"].items()
    ]  # fmt: skip


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Predictions beside measurements, and QLoRA's sizes."""
    plain = [run for run in figures["runs"] if run["base"] not in FURTHER]
    title = "What `plan` predicts and what one row measures: the peak of a step, loss on every token."
    found = [_predictions(title, plain)]
    for base in FURTHER:
        runs = [run for run in figures["runs"] if run["base"] == base]
        if runs:
            found.append(_predictions(f"The same of {base}, on {runs[0]['cpu']}, {runs[0]['date']}.", runs))
    return [*found, _qlora(figures["qlora"])]


def _predictions(title: str, runs: list[dict[str, Any]]) -> tuple[str, list[str], list[list[Any]]]:
    rows = []
    for run in runs:
        base = f"{run['base']}, {'4-bit' if run['bits'] else 'float32'}, {run['targets']}, rank {run['rank']}"
        predicted, measured = run["predicted_bytes"], run["peak_bytes"]
        rows.append(
            [
                base,
                run["length"],
                run["checkpoint"],
                predicted / 1e9,
                measured / 1e9,
                f"{predicted / measured - 1:+.1%}",
            ]
        )
    header = ["base, adapter", "positions", "checkpointing", "predicted GB", "measured GB", "off by"]
    return title, header, rows


def _qlora(figures: dict[str, Any]) -> tuple[str, list[str], list[list[Any]]]:
    rows = []
    for size, adapters in figures.items():
        parts = adapters["paper"]
        trained, rest = parts["adapter"] + parts["optimizer"], parts["activations"] + parts["loss"] + parts["overhead"]
        ours = [parts["weights"], trained, rest, parts["peak_bytes"], adapters["default"]["peak_bytes"]]
        rows.append([size, *(value / 1e9 for value in ours), *QLORA[size]])
    title = (
        f"LLaMA at 4 bits on a GPU, one row of {POSITIONS} positions, rank 64 on every linear layer, gradient "
        "checkpointing: `plan`'s arithmetic beside QLoRA's figures (arXiv 2305.14314)."
    )
    header = ["size", "weights GB", "adapter and optimizer GB", "activations and loss GB", "peak GB",
              "peak GB, rank 8 on attention", "paper: peak GB", "paper: weights GB", "paper: Guanaco GB"]  # fmt: skip
    return title, header, rows
