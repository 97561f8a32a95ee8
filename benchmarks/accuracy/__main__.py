"""``python -m benchmarks.accuracy prepare|run|report``."""

from __future__ import annotations

import argparse
import sys

from benchmarks.accuracy import prepare, report, run

VERBS = {"prepare": prepare, "run": run, "report": report}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, module in VERBS.items():
        module.add_options(verbs.add_parser(name, help=module.__doc__.splitlines()[0]))
    return VERBS[(options := parser.parse_args(arguments)).verb].main(options)


if __name__ == "__main__":
    sys.exit(main())
