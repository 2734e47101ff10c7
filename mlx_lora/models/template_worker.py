"""The process behind `template.py`: reads requests, renders each as transformers does, answers.

A script for `machine.confined.start`, which says what it can reach: nothing, once its imports are done. Lengths are 8
bytes, little-endian; what follows is JSON. It ends with its input.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from mlx_lora.machine import confined

# A template that uses what is imported late: text with escapes, two filters, and the traceback of an error.
FIRST = r"{{ lipsum() }}{{ 'a\n' | pprint }}{{ raise_exception('done') }}"


def serve(requests: BinaryIO, answers: BinaryIO, most_characters: int, most_seconds: float) -> None:
    """Answer each request with its `text`, the `error` the template raised, or `characters` where they are too many.

    A conversation that computes for more than `most_seconds` ends the process.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(Exception):  # jinja and Python import these parts when first used; later no module can be read
        render_jinja_template(conversations=[[]], chat_template=FIRST)
    confined.close()
    _send(answers, {"ready": True})
    while length := int.from_bytes(requests.read(8), "little"):
        request = json.loads(requests.read(length))
        confined.limit_processor_time(most_seconds)
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
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]), float(sys.argv[2]))
