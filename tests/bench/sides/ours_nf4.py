"""Our side of `nf4`: one model packed in one mode, beside itself in half precision."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any


def run(model: str, data: str, rows: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What `quantize --verify` reports, on the whole text of the first `rows` validation rows."""
    import mlx.core as mx

    from mlx_lora.config import Data, Quantize
    from mlx_lora.data.prepare import prepare
    from mlx_lora.measure import as_dict, compare, predictions
    from mlx_lora.models.load import load, load_stored, ready
    from mlx_lora.quant.quantize import quantize

    texts = [json.loads(line) for line in (Path(data) / "valid.jsonl").read_text().splitlines()[:rows]]
    before = load(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in texts))
        encoded = prepare(file, Data(valid_fraction=0), before.tokenizer).train
    packed = load_stored(model)
    packed.model.set_dtype(mx.float16)
    chosen = Quantize(**settings).complete()
    report = quantize(packed.model, chosen)
    agreement = as_dict(compare(predictions(before.model, encoded), predictions(ready(packed).model, encoded), encoded))
    return {
        **chosen, **agreement, "bits_per_weight": report.bits_per_weight, "relative_error": report.relative_error,
        "left_alone": report.left_alone,
    }  # fmt: skip
