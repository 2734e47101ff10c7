"""Remake the data: `python -m data.make [--seed 7] [tasks everyday tokenizer base]`, by default everything.

Run it at the top of the repository. Task sets and tokenizer come out byte for byte the same with the same seed; the
base's weights depend on the machine's arithmetic in their last digits.
"""

import argparse
from pathlib import Path

from mlx_lora.machine import blas

blas.load_blas()  # has to come before anything that imports mlx

from .everyday import make_everyday  # noqa: E402
from .pretrain import make_base  # noqa: E402
from .tasks import make_tasks  # noqa: E402
from .tokenizer import make_tokenizer  # noqa: E402

DATA = Path(__file__).parent.parent
PARTS = ("tasks", "everyday", "tokenizer", "base")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.make", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"what to make: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known parts: {', '.join(PARTS)}")
    parts = arguments.parts or PARTS
    if "tasks" in parts:
        make_tasks(DATA / "tasks", arguments.seed)
        print("task sets written", flush=True)
    if "everyday" in parts:
        make_everyday(DATA / "tasks", arguments.seed)
        print("task sets for real models written", flush=True)
    if "tokenizer" in parts:
        count = make_tokenizer(DATA / "base", arguments.seed)
        print(f"tokenizer written, both files agree on {count} texts", flush=True)
    if "base" in parts:
        make_base(DATA / "base", arguments.seed)
        print("base written", flush=True)


if __name__ == "__main__":
    main()
