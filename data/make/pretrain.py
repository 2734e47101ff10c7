"""Pretrains the tiny base: a Llama of 1.05 million parameters, from the seeded corpus, in about half an hour.

Rows hold whole conversations, packed by best fit. Answers carry loss weight 1, short ones more, all else 0.1. Matrices
learn by Muon, embeddings and norms by Adam; the learning rate warms up, stays, and falls to zero over the last 40 %,
and that fall is worth much: a base from half-way is a poor one.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from .corpus import Message, conversations
from .tokenizer import BEGIN, END, MAX_LENGTH, VOCABULARY_SIZE

STEPS = 2300
FIRST_PART = 0.15  # of the steps, with lists to repeat
ROWS, ROW_LENGTH = 16, 128
POOL = 96  # conversations that wait for a row they fit into
PROMPT_WEIGHT = 0.1
MUON_RATE, ADAM_RATE = 0.02, 4e-3
MUON_DECAY = 0.15
SHORT_ANSWER = 6  # tokens; shorter answers weigh as much as one of this length
WARMUP_STEPS, DECAY_SHARE = 40, 0.4
REPORT_EVERY = 25

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}

Example = tuple[list[int], list[float]]  # token ids and their loss weights


def encode_conversation(processor: sentencepiece.SentencePieceProcessor, messages: list[Message]) -> Example:
    """Ids and loss weights as the chat template renders them; turns that don't fit into a row are left out."""
    begin, end = processor.piece_to_id(BEGIN), processor.piece_to_id(END)
    tokens, weights = [begin], [0.0]
    kept = 1
    for message in messages:
        text = processor.encode(message["content"])
        is_answer = message["role"] == "assistant"
        answer_weight = max(1.0, SHORT_ANSWER / (len(text) + 1))
        tokens += [processor.piece_to_id(f"<|{message['role']}|>"), *text, end]
        weights += [PROMPT_WEIGHT] + [answer_weight if is_answer else PROMPT_WEIGHT] * (len(text) + 1)
        if len(tokens) > ROW_LENGTH + 1:
            break
        kept = len(tokens) if is_answer else kept
    return tokens[:kept], weights[:kept]


def rows(examples: Iterator[Example]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of ROW_LENGTH + 1 ids and weights, each filled with the longest waiting examples that still fit."""
    pool: list[Example] = []
    while True:
        ids = np.zeros(ROW_LENGTH + 1, dtype=np.int32)
        weights = np.zeros(ROW_LENGTH + 1, dtype=np.float32)
        position = 0
        while True:
            while len(pool) < POOL:
                example = next(examples)
                if len(example[0]) > 1:
                    pool.append(example)
            fitting = [index for index in range(POOL) if len(pool[index][0]) <= ROW_LENGTH + 1 - position]
            if not fitting:
                break
            # the oldest example opens the row, so none waits for ever
            best = fitting[0] if position == 0 else max(fitting, key=lambda index: len(pool[index][0]))
            tokens, token_weights = pool.pop(best)
            ids[position : position + len(tokens)] = tokens
            weights[position : position + len(tokens)] = token_weights
            position += len(tokens)
        yield ids, weights


def batches(tokenizer_model: Path, seed: int) -> Iterator[tuple[mx.array, mx.array]]:
    """STEPS batches of ids and weights, both (ROWS, ROW_LENGTH + 1)."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    streams = [
        rows(encode_conversation(processor, messages) for messages in conversations(seed, first_part))
        for first_part in (True, False)
    ]
    for step in range(STEPS):
        stream = streams[0] if step < FIRST_PART * STEPS else streams[1]
        ids, weights = zip(*(next(stream) for _ in range(ROWS)), strict=True)
        yield mx.array(np.stack(ids)), mx.array(np.stack(weights))


def schedule(peak: float) -> Callable[[mx.array], mx.array]:
    """Linear warm-up, constant, linear to zero."""
    decay_steps = int(STEPS * DECAY_SHARE)

    def rate(step: mx.array) -> mx.array:
        return peak * mx.minimum(mx.minimum((step + 1) / WARMUP_STEPS, (STEPS - step) / decay_steps), 1.0)

    return rate


def make_model(seed: int) -> Model:
    """The Llama with random weights; the outputs of attention and MLP start at zero."""
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(CONFIG))
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    mx.eval(model.parameters())
    return model


class DecayingMuon(optim.Muon):
    """Muon with decoupled weight decay. It keeps the matrices small, so that an adapter's small update counts."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        kept = 1 - self.learning_rate * MUON_DECAY
        return super().apply_single(gradient, parameter * kept, state)


def make_optimizer() -> optim.MultiOptimizer:
    """Muon for the matrices of the layers, Adam for embeddings and norms."""
    muon = DecayingMuon(schedule(MUON_RATE), momentum=0.95, weight_decay=0.0)
    adam = optim.Adam(schedule(ADAM_RATE), betas=[0.9, 0.95], bias_correction=True)
    return optim.MultiOptimizer([muon, adam], [lambda path, weight: weight.ndim == 2 and "embed_tokens" not in path])


def weighted_loss(model: Model, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """Loss to descend, and the mean over answer tokens alone to report."""
    logits = model(ids[:, :-1])
    losses = nn.losses.cross_entropy(logits, ids[:, 1:])
    weights = weights[:, 1:]
    answers = weights >= 1.0
    return (losses * weights).sum() / weights.sum(), (losses * answers).sum() / answers.sum()


def pretrain(tokenizer_model: Path, seed: int) -> Model:
    """Train from scratch and print a line every now and then."""
    model, optimizer = make_model(seed), make_optimizer()
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, weights: mx.array) -> mx.array:
        (_, answer_loss), gradients = nn.value_and_grad(model, weighted_loss)(model, ids, weights)
        optimizer.update(model, gradients)
        return answer_loss

    start, recent = time.perf_counter(), []
    for number, (ids, weights) in enumerate(batches(tokenizer_model, seed), start=1):
        answer_loss = step(ids, weights)
        mx.eval(answer_loss, state)
        recent.append(answer_loss.item())
        if number % REPORT_EVERY == 0:
            seconds = time.perf_counter() - start
            speed = number * ROWS * ROW_LENGTH / seconds
            print(f"step {number}  answers {np.mean(recent):.3f}  {speed:.0f} tokens/s  {seconds:.0f} s", flush=True)
            recent.clear()
    return model


def save_base(model: Model, folder: Path) -> None:
    """Write the weights in half precision and `config.json` beside the tokenizer."""
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id")} | {"do_sample": False}
    for name, content in (("config.json", CONFIG), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_base(folder: Path, seed: int) -> None:
    """Pretrain and write the base; the tokenizer must be in `folder` already."""
    save_base(pretrain(folder / "tokenizer.model", seed), folder)
