"""Models with random weights that are too large to ship: only their shapes matter."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

GROUP, BITS = 64, 4


def gemma3(vocabulary: int) -> nn.Module:
    """Gemma 3 270M with 4 of its 18 layers: tied embeddings, hidden 640, float32, frozen."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="gemma3_text", hidden_size=640, num_hidden_layers=4, intermediate_size=2048,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=vocabulary,
            sliding_window=512, sliding_window_pattern=4,
        )
    )  # fmt: skip
    model.sanitize({})  # no head of its own: the embeddings are it
    model.freeze()
    mx.eval(model.parameters())
    return model


def llama_7b(layers: int = 32) -> nn.Module:
    """LLaMA-7B's shape with packed random weights and float16 scales, made layer by layer.

    No float weight of it ever exists: MLX is lazy, and every packed layer replaces one that nothing has evaluated.
    """
    from mlx_lm.models.llama import Model, ModelArgs

    from mlx_lora.models.load import LoadedModel, ready

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=4096, num_hidden_layers=layers, intermediate_size=11008,
            num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, vocab_size=32000,
            tie_word_embeddings=False, max_position_embeddings=2048,
        )
    )  # fmt: skip
    model.model.embed_tokens = _packed(nn.QuantizedEmbedding, 32000, 4096)
    model.lm_head = _packed(nn.QuantizedLinear, 32000, 4096)
    for layer in model.layers:
        _pack_linears(layer)
    ready(LoadedModel(model, None, {}, Path(), mx.float16))
    mx.clear_cache()
    return model


def qwen3_5(vocabulary: int, layers: int = 24) -> nn.Module:
    """Qwen3.5-0.8B's shape with packed random weights and fewer words: three of four layers keep a state."""
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    from mlx_lora.models.load import LoadedModel, ready

    mx.random.seed(0)
    text = {
        "model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": layers, "intermediate_size": 3584,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
    }  # fmt: skip
    model = Model(ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))
    nn.quantize(model, group_size=GROUP, bits=BITS)
    model.set_dtype(mx.float16)
    ready(LoadedModel(model, None, {}, Path(), mx.float16))
    mx.clear_cache()
    return model


def _pack_linears(layer: nn.Module) -> None:
    for block in (layer.self_attn, layer.mlp):
        for name, linear in list(block.children().items()):
            if isinstance(linear, nn.Linear):
                block[name] = _packed(nn.QuantizedLinear, *linear.weight.shape)
    mx.eval(layer.parameters())


def _packed(kind: type, rows: int, columns: int) -> nn.Module:
    """A quantized layer of (rows, columns) around random bits, with weights of about 1/√columns."""
    layer = (
        nn.QuantizedEmbedding(1, GROUP) if kind is nn.QuantizedEmbedding else nn.QuantizedLinear(GROUP, 1, bias=False)
    )
    layer.group_size, layer.bits = GROUP, BITS
    if kind is nn.QuantizedEmbedding:
        layer.num_embeddings, layer.dims = rows, columns
    packed = (rows, columns * BITS // 32)
    scale = columns**-0.5 / 2**BITS
    layer.weight = mx.random.randint(-(2**31), 2**31 - 1, packed, dtype=mx.int32).view(mx.uint32)
    layer.scales = mx.full((rows, columns // GROUP), scale, mx.float16)
    layer.biases = mx.full((rows, columns // GROUP), -scale * (2**BITS - 1) / 2, mx.float16)
    mx.eval(layer.parameters())
    return layer
