"""`python -m tests.bench [NAME …] [--quick]` measures; `python -m tests.bench --tables` redraws README and plots."""

from __future__ import annotations

import argparse
import sys

from tests.bench import results, tables
from tests.bench.inputs import Inputs
from tests.bench.process import Failed


def main() -> None:
    known = results.names()
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, all by default: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="fewer steps and runs; not written to results")
    parser.add_argument("--write", action="store_true", help="write the results of a quick run too")
    parser.add_argument("--only", metavar="PART", help="of one benchmark: only this further part, keep the rest")
    parser.add_argument("--tables", action="store_true", help="only draw the README's table and the plots")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    further = [part for name in asked.names for part in getattr(results.case(name), "FURTHER", ())]
    if asked.only and (len(asked.names) != 1 or asked.only not in further):
        parser.error(f"--only goes with one benchmark that has further parts; it has: {', '.join(further) or 'none'}")
    if asked.tables:
        tables.write()
        return
    with Inputs() as inputs:
        failed = [name for name in asked.names or known if not run(name, inputs, asked)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, inputs: Inputs, asked: argparse.Namespace) -> bool:
    """Measure, record and show one benchmark; one that fails doesn't keep the others from running."""
    print(f"== {name}", flush=True)
    case = results.case(name)
    try:
        options = {"only": asked.only} if asked.only else {}
        figures = case.measure(inputs, asked.quick, **options)
    except Failed as fault:
        print(fault, file=sys.stderr, flush=True)
        return False
    if asked.write or not asked.quick:
        results.write(name, figures, quick=asked.quick, renewed=bool(asked.only))
    print("\n".join(tables.markdown(*table) for table in case.tables(figures)))
    print(results.one_line(name, figures), flush=True)
    return True


if __name__ == "__main__":
    main()
