"""What `mlx-lora selftest` compares the embedded base with: `python -m tests.selftest` writes data/base/selftest.json.

To be run after `python -m data.make`, on a machine whose selftest passes otherwise.
"""

from __future__ import annotations

import json

from mlx_lora.machine import blas

if __name__ == "__main__":
    blas.load_blas()  # before anything that imports mlx

    from mlx_lora import paths
    from mlx_lora.tasks.checks import record
    from mlx_lora.tasks.subject import RECORD

    file = paths.bundled("data", "base", RECORD)
    file.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
