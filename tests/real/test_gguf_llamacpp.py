"""Imported GGUF files against llama.cpp itself: the same tokens from the same text, and the same text from the same
weights. The model is SmolLM2-135M-Instruct; small files with its vocabulary stand for what it doesn't use.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.gguf.tokenizer import SPLITS, Vocabulary, build_tokenizer

pytestmark = pytest.mark.real

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's bindings are not installed (pip install xllamacpp)")

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1. Eat well\n2. Sleep enough\n3.",
)
TEXTS = (
    "", " ", "a", "Hello world", " Hello  world ", "   three   spaces   ", "\n", "\n\n\n", " \n \n", "the end \n",
    "\t\tif x:\r\n\treturn", "line one\nline two\n\n  indented", "12345678", "in 2024, 3.14159 and 1,000,000",
    "a1b22c333", "²³¼Ⅷ①٣४", "don't I'M we'Ll they'RE it's 'tis 'S", "naïve café Straße ŁÓDŹ", "Привет, мир! Ἑλλάς",
    "日本語のテキスト。中文字符", "한국어", "مرحبا بالعالم", "नमस्ते दुनिया", "emoji 🙂👩\u200d👩\u200d👧🇫🇷 end",
    "e\u0301 combining vs é", "\u00a0nbsp\u2003em\u200bzero", "x = {'key': [1, 2.5e-3]} # comment!!! ???",
    "https://example.com/a?b=c&d=%20#e", "CamelCaseWords andHTMLParser2go", "a/b//c\\d\n/e", "$100 + €20 = £?",
    "<|im_start|>user\nHi<|im_end|>\n", "text<|endoftext|> after", "<|im_start|> <s>", "............", "!!!\n\n???",
    "snake_case __init__ --flag", "\u2581 lower block",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(smollm2_gguf)


@pytest.fixture(scope="module")
def smollm2_fields(smollm2: gguf.GGUFReader) -> dict[str, Any]:
    """The file's metadata without what a writer adds by itself."""
    own = {name: field.contents() for name, field in smollm2.fields.items() if not name.startswith("GGUF.")}
    return {name: value for name, value in own.items() if name != "general.architecture"}


@pytest.fixture(scope="module")
def smollm2_f32_gguf(smollm2: gguf.GGUFReader, smollm2_fields: dict[str, Any], cache: Path) -> Path:
    """The same weights, each value written out as float32."""
    target = cache / "SmolLM2-135M-Instruct.F32-of-Q4_1.gguf"
    if not target.is_file():
        tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in smollm2.tensors}
        write_f32(target, smollm2_fields | {"general.file_type": int(gguf.LlamaFileType.ALL_F32)}, tensors)
    return target


def write_f32(
    target: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], architecture: str = "llama"
) -> None:
    writer = gguf.GGUFWriter(target.with_suffix(".part"), architecture)
    adders = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in fields.items():
        adders[type(value)](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


class LlamaCpp:
    """llama.cpp over one file, in float32 wherever the file lets it be."""

    def __init__(self, file: Path, context: int = 512):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_parallel = 1
        parameters.warmup = False
        # Its threads wait in a spin: with a second one, a machine that is busy otherwise slows it fifty times.
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(parameters)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        body = json.dumps({"content": text, "add_special": add_special, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.loads(answer.read())["tokens"]

    def greedy(self, prompt: list[int], count: int) -> list[tuple[int, dict[int, float]]]:
        """Each token chosen, with the log-probabilities of the five likeliest."""
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 5, "cache_prompt": False}
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        return [(step["id"], {top["id"]: top["logprob"] for top in step["top_logprobs"]}) for step in steps]

    def next_token(self, prompt: list[int], count: int, *, chosen: int) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest next tokens.

        A server reports none for a token that is half a character, so it is made to choose the token `chosen`, which
        must be whole characters. The log-probabilities are those before that choice.
        """
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": count, "cache_prompt": False,
             "logit_bias": [[chosen, 1000.0]]}
        )  # fmt: skip
        return {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.fixture
def llama_cpp() -> Iterator[Callable[..., LlamaCpp]]:
    opened: list[LlamaCpp] = []

    def open_file(*args: Any, **kwargs: Any) -> LlamaCpp:
        opened.append(LlamaCpp(*args, **kwargs))
        return opened[-1]

    yield open_file
    for peer in opened:
        del peer.server


def load_float32(directory: Path) -> tuple[Any, Any]:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(directory))
    model.set_dtype(mx.float32)  # scales and biases of packed weights included
    return model, tokenizer


def greedy(model: Any, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    chosen: list[int] = []
    inputs = mx.array([prompt])
    while len(chosen) < count and not ends.intersection(chosen):
        chosen.append(int(model(inputs, cache=cache)[0, -1].argmax().item()))
        inputs = mx.array([[chosen[-1]]])
    return chosen


@pytest.fixture(scope="module")
def imported(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "smollm2"
    import_gguf(smollm2_gguf, out)
    return out


def test_greedy_tokens_equal_llama_cpp_on_the_same_float32_weights(
    smollm2_f32_gguf: Path, imported: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    model, tokenizer = load_float32(imported)
    peer = llama_cpp(smollm2_f32_gguf)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        theirs = [token for token, _ in peer.greedy(ids, 32)]
        assert greedy(model, ids, 32, tokenizer.eos_token_ids) == theirs, prompt


def test_greedy_tokens_leave_llama_cpp_only_at_a_tie_on_the_packed_weights(
    smollm2_gguf: Path, imported: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    """llama.cpp rounds activations to 8 bits before it multiplies them by packed weights; we don't."""
    model, tokenizer = load_float32(imported)
    peer = llama_cpp(smollm2_gguf)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        ours = greedy(model, ids, 32, tokenizer.eos_token_ids)
        for token, (theirs, top) in zip(ours, peer.greedy(ids, 32), strict=False):
            if token != theirs:
                assert top[theirs] - top.get(token, -float("inf")) < 0.3, f"{prompt!r}: {token} against {top}"
                break


def test_packed_weights_are_the_files_own_values(smollm2: gguf.GGUFReader, imported: Path) -> None:
    model, _ = load_float32(imported)
    tensors = {tensor.name: tensor for tensor in smollm2.tensors}
    layer = model.model.layers[7]
    pairs = {
        "token_embd": model.model.embed_tokens,
        "blk.7.attn_v": layer.self_attn.v_proj,
        "blk.7.attn_output": layer.self_attn.o_proj,
        "blk.7.ffn_down": layer.mlp.down_proj,
    }
    for name, module in pairs.items():
        tensor = tensors[f"{name}.weight"]
        ours = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=module.bits)
        np.testing.assert_array_equal(np.array(ours), gguf.quants.dequantize(tensor.data, tensor.tensor_type), name)


def test_the_capital_of_france_is_paris(imported: Path) -> None:
    model, tokenizer = load_float32(imported)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = greedy(model, ids, 32, tokenizer.eos_token_ids)
    assert answer[-1] in tokenizer.eos_token_ids
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."


def test_tokens_equal_llama_cpp(smollm2_gguf: Path, imported: Path, llama_cpp: Callable[..., LlamaCpp]) -> None:
    import mlx_lm.utils

    tokenizer = mlx_lm.utils.load_tokenizer(imported)
    peer = llama_cpp(smollm2_gguf)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == peer.tokenize(text, add_special=True), text
        assert tokenizer.decode(ids) == text


def tiny_tensors(vocabulary: int, *, hidden: int = 64, layers: int = 2) -> dict[str, np.ndarray]:
    """Random weights of a llama with 2 heads of 32, 1 key head, under GGUF's names."""
    random = np.random.default_rng(0)
    shapes = {
        "attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (96, hidden), "ffn_up": (96, hidden), "ffn_down": (hidden, 96),
    }  # fmt: skip
    tensors = {"token_embd.weight": random.normal(size=(vocabulary, hidden)), "output_norm.weight": np.ones(hidden)}
    for n in range(layers):
        tensors |= {f"blk.{n}.{name}.weight": random.normal(size=s) / s[1] ** 0.5 for name, s in shapes.items()}
        tensors |= {f"blk.{n}.{name}.weight": np.ones(hidden) for name in ("attn_norm", "ffn_norm")}
    return tensors


TINY: dict[str, Any] = {
    "llama.block_count": 2, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.rope.dimension_count": 32,
    "llama.context_length": 512, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("rule", sorted(SPLITS))
def test_every_pre_tokenizer_cuts_as_llama_cpp(
    rule: str, smollm2_fields: dict[str, Any], tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    fields = smollm2_fields | TINY | {"tokenizer.ggml.pre": rule}
    del fields["tokenizer.ggml.add_bos_token"]  # so that each rule's own default shows
    write_f32(tmp_path / "tiny.gguf", fields, tiny_tensors(49152))
    peer = llama_cpp(tmp_path / "tiny.gguf")
    tokenizer = build_tokenizer(Vocabulary.read(fields))
    differing = [t for t in TEXTS if tokenizer.encode(t).ids != peer.tokenize(t, add_special=True)]
    assert differing == []


def sentencepiece_fields(folder: Path) -> dict[str, Any]:
    """A SentencePiece BPE model with byte fallback, trained here, as a GGUF's metadata has it."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    lines = [f"{text} {prompt}" for text in TEXTS for prompt in PROMPTS]
    corpus.write_text("\n".join(line.replace("\n", " ") for line in lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), vocab_size=600, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    types = []
    for i in range(len(model)):
        kind = gguf.TokenType.NORMAL
        if model.is_unknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif model.is_control(i):
            kind = gguf.TokenType.CONTROL
        elif model.is_byte(i):
            kind = gguf.TokenType.BYTE
        elif model.id_to_piece(i).startswith("<|"):
            kind = gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    return TINY | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(len(model))],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(model))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("leading", [True, False])
def test_sentencepiece_vocabulary_cuts_as_llama_cpp(
    leading: bool, tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    fields = sentencepiece_fields(tmp_path) | {"tokenizer.ggml.add_space_prefix": leading}
    write_f32(tmp_path / "tiny.gguf", fields, tiny_tensors(600))
    peer = llama_cpp(tmp_path / "tiny.gguf")
    tokenizer = build_tokenizer(Vocabulary.read(fields))
    differing = [t for t in TEXTS if tokenizer.encode(t).ids != peer.tokenize(t, add_special=True)]
    assert differing == []


def test_special_tokens_of_phi3_take_the_space_after_them_as_in_llama_cpp(
    tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    fields = sentencepiece_fields(tmp_path) | {"general.name": "Phi-3 mini", "tokenizer.ggml.add_space_prefix": False}
    fields["tokenizer.ggml.tokens"][-1], fields["tokenizer.ggml.token_type"][-1] = "<|endoftext|>", 3
    write_f32(tmp_path / "tiny.gguf", fields, tiny_tensors(600))
    peer = llama_cpp(tmp_path / "tiny.gguf")
    tokenizer = build_tokenizer(Vocabulary.read(fields))
    texts = ("<|im_start|>user\n Hi<|im_end|>\n\n<|im_start|>assistant\n", "</s> \t x", "<s>  x", "<unk> x<|im_end|> ")
    for text in (*texts, *TEXTS):
        assert tokenizer.encode(text).ids == peer.tokenize(text, add_special=True), text
    assert tokenizer.encode("<|im_end|> x").ids == tokenizer.encode("<|im_end|>x").ids


SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    "yarn": {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    },
    "llama3": {"llama.rope.freq_base": 500000.0},
}  # fmt: skip


@pytest.mark.parametrize("scaling", sorted(SCALINGS))
def test_rope_scaling_equals_llama_cpp(scaling: str, tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]) -> None:
    """Random weights, 400 tokens: a rotation that is off by little already gives other probabilities."""
    tensors = tiny_tensors(600)
    if scaling == "llama3":
        waves = 2 * np.pi * 500000.0 ** (np.arange(0, 32, 2) / 32)
        smooth = np.clip((8192 / waves - 1) / 3, 0, 1)
        tensors["rope_freqs.weight"] = 1 / ((1 - smooth) / 8 + smooth)
    file = tmp_path / "tiny.gguf"
    write_f32(file, sentencepiece_fields(tmp_path) | SCALINGS[scaling], tensors)
    import_gguf(file, tmp_path / "out", dtype="float32")
    model, _ = load_float32(tmp_path / "out")
    ids = np.random.default_rng(1).integers(300, 600, 400).tolist()
    (_, theirs), *_ = llama_cpp(file).greedy(ids, 1)
    logits = model(mx.array([ids]))[0, -1]
    ours = logits - mx.logsumexp(logits)
    for token, expected in theirs.items():
        assert float(ours[token]) == pytest.approx(expected, abs=2e-4)
