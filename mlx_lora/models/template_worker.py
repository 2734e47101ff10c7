"""The process behind `template.py`: reads requests, renders each conversation as transformers does, answers.

A script for `machine.confined.start`, which says what it can reach: nothing, once its imports are done. A message is 8
bytes of length, little-endian, and JSON. The process ends with its input.
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
    """Answer each request with a list: for each of its jobs what `_rendered` gives.

    A request that computes for more than `most_seconds` ends the process.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(Exception):  # jinja and Python import these parts when first used; later no module can be read
        render_jinja_template(conversations=[[]], chat_template=FIRST)
    confined.close()
    _send(answers, {"ready": True})
    while length := int.from_bytes(requests.read(8), "little"):
        request = json.loads(requests.read(length))
        confined.limit_processor_time(most_seconds)
        shared = request["shared"]
        _send(answers, [_rendered(render_jinja_template, shared, job, most_characters) for job in request["jobs"]])


def _rendered(render: Any, shared: dict[str, Any], job: dict[str, Any], most_characters: int) -> dict[str, Any]:
    """`texts` of a job's views, or the `error` the template raised, or `characters` where they are too many.

    A view is [messages, prompt, arguments]: the first messages of the conversation, and whether an answer follows.
    """
    texts = []
    try:
        for count, prompt, arguments in job["views"]:
            text = render(
                conversations=[job["messages"][:count]],
                tools=job["tools"],
                add_generation_prompt=prompt,
                **{**shared, **arguments},
            )[0][0]
            if len(text) > most_characters:
                return {"characters": len(text)}
            texts.append(text)
    except Exception as error:  # jinja's own errors, and whatever a template raises
        return {"error": str(error)[:1000]}
    return {"texts": texts}


def _send(answers: BinaryIO, answer: Any) -> None:
    content = json.dumps(answer).encode()
    answers.write(len(content).to_bytes(8, "little") + content)
    answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]), float(sys.argv[2]))
