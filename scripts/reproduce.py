"""Reproduces figures: python scripts/reproduce.py --figure=N|all --preset=smoke|cpu|paper."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

# The laboratory is no part of the installed library.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Reproduces what the command line asks for; returns the exit code, see `run_command`."""
    from asgd_jax.command_line import OneLineParser

    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--figure",
        required=True,
        metavar="N|NAME|all",
        help="of the paper by number, or beyond it by name (eos, stages, ...); several with commas",
    )
    parser.add_argument("--preset", default="cpu", help="smoke, cpu (default) or paper")
    parser.add_argument(
        "--redraw", action="store_true", help="draw and check again what is in --out; train nothing"
    )
    parser.add_argument("--out", default="results", help="default: results")
    parser.add_argument(
        "--address",
        metavar="auto|local|HOST:PORT",
        help="spread sweeps over a Ray cluster; local: over the cores of this machine",
    )
    options = parser.parse_args(arguments)

    from asgd_jax.cluster.sweeps import on_cluster
    from asgd_jax.training.command import (
        named_folder,
        run_command,
        use_a_device_a_core,
        use_compilation_cache,
        use_threaded_convolutions,
    )
    from experiments import reproduce as figures
    from experiments.results_page import write_page

    use_compilation_cache()
    use_threaded_convolutions()
    use_a_device_a_core()

    def make() -> None:
        with contextlib.ExitStack() as stack:
            if options.address is not None:
                stack.enter_context(on_cluster(options.address))
            make_figures()

    def make_figures() -> None:
        out = named_folder(options.out, "out")
        for figure in figures.figure_names(options.figure):
            if options.redraw:
                summary = figures.redraw(figure, out)
            else:
                summary = figures.reproduce(figure, options.preset, out)
            print(figures.describe(summary, out), flush=True)
            write_page(out)
        if not options.redraw:
            figures.clean_work(out)

    return run_command("reproduce.py", make)


if __name__ == "__main__":
    sys.exit(main())
