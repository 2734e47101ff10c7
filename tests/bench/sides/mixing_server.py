"""mlx_lm.server on the requests of `mixing`: it loads the model again for another adapter.

Its model is cast to float32, which is its best on a processor. The server runs in a process of its own, reached over
loopback; its adapters are files as it writes them itself.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.bench.sides.mixing import ANSWER, RANK, _adapter

# Any word of one token: a prompt of 32 tokens.
PROMPT = " ".join(["the"] * 32)
SECONDS_TO_START = 120


def in_turn(*, model: str, adapters: int = 8) -> dict[str, Any]:
    """Seconds of `adapters` requests at once, each with its own adapter, and all with one."""
    with tempfile.TemporaryDirectory(prefix="mlx-lora-bench-") as folder:
        base, paths = _written(Path(folder), model, adapters)
        port = _free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(base), "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _wait(server, port)
                _together(port, base, paths[:1])
                own = _together(port, base, paths)
                _together(port, base, paths[:1])
                same = _together(port, base, paths[:1] * adapters)
            finally:
                server.kill()
    count = adapters * ANSWER
    return {"tokens_per_second": {"mixed": count / own, "same": count / same}, "rows": adapters}


def _written(folder: Path, model: str, count: int) -> tuple[Path, list[Path]]:
    """The base in float32, and adapters, in mlx_lm's files."""
    from mlx_lm import utils

    network, tokenizer, config = utils.load(model, return_config=True)
    network.set_dtype(mx.float32)
    base, paths = folder / "base", []
    for index in range(count):
        path = folder / f"adapter-{index}"
        path.mkdir()
        wrappers = _adapter(network, index, RANK)
        arrays = {f"{at}.{name}": array for at, one in wrappers.items() for name, array in one.stored_arrays().items()}
        mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
        keys = sorted({at.partition("layers.")[2].partition(".")[2] for at in wrappers})
        settings = {"rank": RANK, "scale": next(iter(wrappers.values())).scale, "dropout": 0.0, "keys": keys}
        adapter = {"fine_tune_type": "lora", "num_layers": len(network.layers), "lora_parameters": settings}
        (path / "adapter_config.json").write_text(json.dumps(adapter))
        paths.append(path)
    utils.save(base, model, network, tokenizer, {**config, "torch_dtype": "float32"})  # which empties the network
    return base, paths


def _together(port: int, base: Path, adapters: list[Path]) -> float:
    """Seconds until requests of these adapters, all at once, are answered."""

    def ask(adapter: Path) -> int:
        body = {
            "model": str(base), "adapters": str(adapter), "prompt": PROMPT, "max_tokens": ANSWER, "temperature": 0.0,
            "logit_bias": {"0": -1e9, "2": -1e9},
        }  # fmt: skip
        address = f"http://127.0.0.1:{port}/v1/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    start = time.perf_counter()
    with ThreadPoolExecutor(len(adapters)) as pool:
        counts = list(pool.map(ask, adapters))
    assert counts == [ANSWER] * len(adapters), counts
    return time.perf_counter() - start


def _wait(server: Any, port: int) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and server.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("mlx_lm.server didn't start")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
