"""The script of a process that runs llama.cpp: what it says, and a fault inside it, stays there.

Reads one line of JSON: `file`, `adapter` (or null), `context`, `prompts` (lists of token ids), `tokens`, `count`. For
each prompt it answers one line, a list of [chosen token id, [[token id, log-probability], …]] for each generated token,
or `{"error": …}`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from typing import Any

MOST_TRIED = 64
TIME = re.compile(r"^[\d.]+ [A-Z] ")


def serve() -> None:
    with os.fdopen(os.dup(1), "w") as answers, open("log", "w+b") as log:
        for output in (1, 2):  # nothing that llama.cpp prints comes between the answers
            os.dup2(log.fileno(), output)
        request = json.loads(sys.stdin.readline())
        try:
            server = _open(request)
            for prompt in request["prompts"]:
                answers.write(json.dumps(_generated(server, prompt, request)) + "\n")
                answers.flush()
        except Exception as error:  # whatever it is, the other process tells the user
            answers.write(json.dumps({"error": _said(log) or f"{type(error).__name__}: {error}"}) + "\n")
            answers.flush()
        os._exit(0)  # without waiting for llama.cpp's threads


def _said(log: Any) -> str | None:
    """The first line of llama.cpp's own that tells of an error."""
    log.seek(0)
    lines = [TIME.sub("", line.decode(errors="replace")).strip() for line in log.readlines()]
    return next((line[:500] for line in lines if re.search(r"error|fail|invalid", line, re.IGNORECASE)), None)


def _open(request: dict[str, Any]) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = request["context"]
    parameters.n_parallel = 1
    parameters.warmup = False
    # its threads wait in a spin: more of them than cores that are free make it many times slower
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 2) // 2)
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.api_keys = [secrets.token_hex(16)]  # it listens on this machine: nobody else asks it anything
    if request["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["adapter"], 1.0
        parameters.lora_adapters = [adapter]
    return xllamacpp.Server(parameters)


def _generated(server: Any, prompt: list[int], request: dict[str, Any]) -> list[Any]:
    """The steps after a prompt. What the next token may be is always known; a longer answer may be empty.

    A server says nothing of a token that ends the answer or is half a character. Where that is the next one it is made
    to choose another, which changes no log-probability: first those of the prompt, which are mostly whole words.
    """
    steps = _steps(server, prompt, request, {})
    if not steps and request["tokens"] == 1:
        others = list(dict.fromkeys([*reversed(prompt), *range(MOST_TRIED)]))[:MOST_TRIED]
        found = (_steps(server, prompt, request, {"logit_bias": [[token, 1000.0]]}) for token in others)
        steps = next(filter(None, found), [])
    if not steps and request["tokens"] == 1:
        raise RuntimeError("it says nothing of the next token")
    return steps


def _steps(server: Any, prompt: list[int], request: dict[str, Any], more: dict[str, Any]) -> list[Any]:
    asked = {"prompt": prompt, "max_tokens": request["tokens"], "temperature": 0, "logprobs": request["count"],
             "cache_prompt": True, **more}  # fmt: skip
    answer = server.handle_completions(asked)
    if "error" in answer:
        raise RuntimeError(answer["error"].get("message", answer["error"]))
    steps = (answer["choices"][0]["logprobs"] or {}).get("content") or []
    return [[step["id"], [[top["id"], top["logprob"]] for top in step["top_logprobs"]]] for step in steps]


if __name__ == "__main__":
    serve()
