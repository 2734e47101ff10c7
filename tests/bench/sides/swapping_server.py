"""mlx_lm.server asked with another adapter than before, and with the same one: it loads its model again for a swap."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.sides.mixing_server import _free_port, _wait, _written


def run(*, model: str, runs: int = 6) -> dict[str, Any]:
    """Milliseconds to an answer of one token, medians: after a swap, with the same adapter, and the difference."""
    with tempfile.TemporaryDirectory(prefix="mlx-lora-bench-") as folder:
        base, paths = _written(Path(folder), model, 2)
        port = _free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(base), "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _wait(server, port)
                for number in range(2):
                    _first_token(port, base, paths[number], number)
                swapped, same = [], []
                for number in range(runs):
                    swapped.append(_first_token(port, base, paths[number % 2], 2 * number + 2))
                    same.append(_first_token(port, base, paths[number % 2], 2 * number + 3))
            finally:
                server.kill()
    return {
        "swap_ms": median(swapped) - median(same),
        "first_token_ms": {"swapped": median(swapped), "same": median(same)},
    }


def _first_token(port: int, base: Path, adapter: Path, number: int) -> float:
    """Milliseconds of a request for one token; each has words of its own, so that no cache knows the prompt."""
    words = " ".join([str(number), *["the"] * 30])
    body = {"model": str(base), "adapters": str(adapter), "prompt": words, "max_tokens": 1, "temperature": 0.0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        json.load(response)
    return 1000 * (time.perf_counter() - start)
