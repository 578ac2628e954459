"""Benchmarks: python scripts/bench.py [--out=DIR] [--only=ITEM,...] [--quick]."""

import sys
from pathlib import Path

# The laboratory is no part of the installed library.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Measures what the command line asks for; a mistake of the user's is one line and code 2."""
    from asgd_jax.command_line import OneLineParser

    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="results/bench", help="default: results/bench")
    parser.add_argument("--only", default="all", metavar="ITEM,...", help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, numbers without meaning")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has PyTorch"
    )
    options = parser.parse_args()

    from asgd_jax.training.command import named_folder
    from benchmarks.result import BenchOptions
    from benchmarks.run import item_names, run_items

    try:
        out = named_folder(options.out, "out")
        run_items(item_names(options.only), out, BenchOptions(options.quick, options.torch_python))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"see {out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
