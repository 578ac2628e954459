"""Reproduces figures: python scripts/reproduce.py --figure=N|all --preset=smoke|cpu|paper."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print its usage too."""
        self.exit(2, f"reproduce.py: {message}\n")


def main() -> int:
    """Reproduces what the command line asks for; a mistake of the user's is one line and code 2."""
    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--figure", required=True, metavar="N|all", help="of the paper")
    parser.add_argument("--preset", default="cpu", help="smoke, cpu (default) or paper")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args()

    from asgd_jax.experiments.reproduce import describe, figure_numbers, reproduce

    try:
        for number in figure_numbers(options.figure):
            summary = reproduce(number, options.preset, options.out)
            print(describe(summary, options.out), flush=True)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
