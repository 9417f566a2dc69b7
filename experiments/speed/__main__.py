"""The benchmarks of speed and memory: python -m experiments.speed [CASE …]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import positive, script_parser
from experiments.errors import exit_code
from experiments.speed.cases import ALL_CASES, measure_speed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it, and return the exit code."""
    parser = script_parser("experiments.speed", __doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(ALL_CASES)}; default all"
    )
    parser.add_argument(
        "--pairs", type=positive, default=5, help="pairs of runs (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=40, help="turns in step (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, help="torch's (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="of step and matrix; the rest is of a CPU (default: cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="one pair, short streams")
    parser.add_argument("--data-root", type=Path, help="folder of the datasets")
    parser.add_argument("--output", type=Path, help="folder for the growth figure (default: none)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.cases) - set(ALL_CASES)):
        parser.error(f"unknown case {unknown[0]!r}; cases are {', '.join(ALL_CASES)}")
    return exit_code(lambda: measure_speed(**vars(options)), resumable=False)


if __name__ == "__main__":
    sys.exit(main())
