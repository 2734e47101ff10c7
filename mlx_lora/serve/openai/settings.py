"""How tokens are chosen for a request: what it says, what the model's makers recommend, and OpenAI's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lora.models import token_ids
from mlx_lora.serve.openai.bodies import Common
from mlx_lora.serve.openai.errors import refused
from mlx_lora.serve.openai.penalties import Bias, Penalties
from mlx_lora.serve.openai.target import Target
from mlx_lora.serve.requests import Processor, Sampling
from mlx_lora.serve.service import Service


def sampling_of(target: Target, body: Common, index: int) -> Sampling:
    usual = usual_sampling(target.service)

    def value(name: str, otherwise: float) -> float:
        asked = getattr(body, name)
        return float(usual.get(name, otherwise) if asked is None else asked)

    return Sampling(
        temperature=value("temperature", 1.0),
        top_p=max(value("top_p", 1.0), 1e-6),  # 0 asks for the most likely token
        seed=None if body.seed is None else body.seed + index,
        top_k=max(int(value("top_k", 0)), 0),
        min_p=value("min_p", 0.0),
    )


def penalties_of(target: Target, body: Common, length: int) -> list[Processor]:
    processors: list[Processor] = []
    repetition = body.repetition_penalty
    if repetition is None:
        repetition = float(usual_sampling(target.service).get("repetition_penalty", 1.0))
    if body.presence_penalty or body.frequency_penalty or repetition != 1:
        processors.append(
            Penalties(
                length, presence=body.presence_penalty, frequency=body.frequency_penalty, repetition=repetition
            )
        )  # fmt: skip
    if body.logit_bias:
        processors.append(Bias(_biases(target.service, body.logit_bias)))
    return processors


def _biases(service: Service, asked: Mapping[str, float]) -> dict[int, float]:
    """Biases by token. Raises ApiError for a key that is no token of the model."""
    found: dict[int, float] = {}
    for key, value in asked.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or not _is_token(service, int(key)):
            raise refused("logit_bias", f"{key[:20]!r} is no token of this model")
        found[int(key)] = value
    return found


def _is_token(service: Service, token: int) -> bool:
    return token < len(service.tokenizer) and token_ids.fault(service.tokenizer, [token]) is None


def usual_sampling(service: Service) -> dict[str, Any]:
    """What generation_config.json recommends: temperature (0 where it samples nothing), top_p, top_k, min_p, and
    repetition_penalty. OpenAI's defaults stand where it says nothing."""
    said = service.generation
    names: Sequence[str] = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    numbers = {name: said[name] for name in names if isinstance(said.get(name), int | float)}
    return {**numbers, "temperature": 0.0} if said.get("do_sample") is False else numbers
