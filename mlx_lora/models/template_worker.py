"""The process behind `template.py`: reads requests, renders each as transformers does, answers. Run as a script.

Lengths are 8 bytes, little-endian; what follows is JSON. It imports nothing of this package, and ends with its input.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO


def serve(requests: BinaryIO, answers: BinaryIO, most_characters: int) -> None:
    """Answer each request with its `text`, the `error` the template raised, or `characters` where they are too many."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _send(answers, {"ready": True})
    while length := int.from_bytes(requests.read(8), "little"):
        request = json.loads(requests.read(length))
        try:
            text = render_jinja_template(**request)[0][0]  # of the only conversation
            answer = {"text": text} if len(text) <= most_characters else {"characters": len(text)}
        except Exception as error:  # jinja's own errors, and whatever a template raises
            answer = {"error": str(error)[:1000]}
        _send(answers, answer)


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode()
    answers.write(len(content).to_bytes(8, "little") + content)
    answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
