"""PEFT's side: LoRA on transformers' Llama, torch on the CPU with two threads, float32. MLX is never imported here."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tests.bench.sides import rows as plain

RATE, LAYERS, THREADS = 1e-4, 16, 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_LOSS = -100


def run(*, model: str, rows: str, steps: int) -> dict[str, Any]:
    """The same rows in every step: rank 8 on every linear of the last layers, AdamW."""
    torch.set_num_threads(THREADS)
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    depth = base.config.num_hidden_layers
    adapted = list(range(depth - LAYERS, depth))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, layers_to_transform=adapted, task_type="CAUSAL_LM")
    return train(get_peft_model(base, config), plain.read(rows), steps)


def train(model: Any, rows: list[plain.PlainRow], steps: int) -> dict[str, Any]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    tokens = torch.tensor([row.tokens for row in rows])
    wanted = torch.tensor([row.weights for row in rows]) != 0
    labels = torch.where(wanted, tokens, NO_LOSS)
    model.train()
    seconds, losses = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds[1:],
        "losses": losses,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "trained_tokens": sum(row.trained for row in rows),
    }
