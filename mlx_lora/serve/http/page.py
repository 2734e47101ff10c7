"""The page at `/`, with a policy that lets its own script and style run, and nothing else be loaded or asked."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "page" / "index.html"
INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


def policy(page: str) -> str:
    """The Content-Security-Policy of a page whose scripts and styles stand in it."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    own = [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items() if found]
    return "; ".join(
        ["default-src 'none'", "connect-src 'self'", "img-src data:", *own, "base-uri 'none'", "form-action 'none'",
         "frame-ancestors 'none'"]
    )  # fmt: skip
