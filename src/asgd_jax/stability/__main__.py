"""Which learning rate is stable under my delay? A table for the terminal.

python -m asgd_jax.stability --delay 32 --momentum 0.9 --kind shifted --sharpness 20
python -m asgd_jax.stability --uniform 1 64 --learning-rate 0.01 --sharpness 20
python -m asgd_jax.stability --workers 16 --schedule normal --baseline-learning-rate 0.8
python -m asgd_jax.stability --stages 8 --momentum 0.9 --sharpness 20
python -m asgd_jax.stability --delay 8 --momentum 0.9 --method all
python -m asgd_jax.stability --workers 8 --schedule random --method drop --drop-stale 16
python -m asgd_jax.stability --delay 8 --optimizer adam --sharpness 300  # the preconditioned one
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asgd_jax import delays
from asgd_jax.command_line import OneLineParser
from asgd_jax.stability.arguments import KINDS, Delay
from asgd_jax.stability.mitigations import (
    DROP,
    MITIGATIONS,
    PREDICTION,
    format_rows,
    method_rows,
    pipeline_rows,
)
from asgd_jax.stability.plot import plot_thresholds
from asgd_jax.stability.random_mitigations import (
    CriteriaRow,
    format_criteria_rows,
    random_method_rows,
)
from asgd_jax.stability.report import Question, answer, render

# The console script of the wheel, which is the same program.
_INSTALLED_AS = "asgd-stability"

_DEFAULT_MOMENTUM = 0.9  # of the table's comparison, when none is given


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    installed = Path(sys.argv[0]).stem == _INSTALLED_AS
    parser = OneLineParser(
        prog=_INSTALLED_AS if installed else "python -m asgd_jax.stability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_delay(parser)
    parser.add_argument(
        "--momentum", type=float, help=f"in [0, 1); {_DEFAULT_MOMENTUM} to compare, if absent"
    )
    parser.add_argument(
        "--kind", choices=KINDS, default="heavy_ball", help="of your momentum (default heavy_ball)"
    )
    parser.add_argument(
        "--no-dampening",
        action="store_true",
        help="your momentum adds the whole gradient, as torch and optax do by default",
    )
    parser.add_argument("--sharpness", type=float, help="largest eigenvalue of the Hessian")
    parser.add_argument(
        "--preconditioned-sharpness",
        type=float,
        help="that of D^(-1/2) H D^(-1/2), with --optimizer=adam",
    )
    parser.add_argument(
        "--learning-rate", type=float, help="yours: is it stable, up to which delay"
    )
    parser.add_argument(
        "--baseline-learning-rate",
        type=float,
        help="one that works without delay: print what eq. 8 makes of it; without --sharpness, "
        "assume the sharpest minimum that it keeps stable",
    )
    parser.add_argument(
        "--curvature-noise",
        type=float,
        default=0.0,
        metavar="C",
        help="variance over mean squared of the curvature that one update's batch sees: that of "
        "single samples over the batch size (default 0, the full batch)",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="what a mitigation does to the threshold of heavy ball, read off its code: "
        f"{', '.join([*MITIGATIONS, PREDICTION, DROP])}, or all; of random delays in the mean, in "
        "mean square and in a typical run",
    )
    parser.add_argument(
        "--drop-stale",
        type=int,
        metavar="K",
        help="--method drop drops gradients of this staleness or more (default: what is older than "
        "the mean, and than twice the mean)",
    )
    parser.add_argument(
        "--optimizer",
        choices=("sgd", "adam"),
        default="sgd",
        help="adam: a damped heavy ball of momentum --momentum (0.9), with the sharpness of "
        "D^-1/2 H D^-1/2 as --sharpness",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw 1/h* against the delay")
    return parser


def _add_delay(parser: argparse.ArgumentParser) -> None:
    """The options that say what the delay is."""
    group = parser.add_argument_group("delay (one of these)").add_mutually_exclusive_group(
        required=True
    )
    group.add_argument("--delay", type=int, metavar="N", help="every gradient is N updates old")
    group.add_argument(
        "--uniform", type=int, nargs=2, metavar=("LOW", "HIGH"), help="uniform on LOW, ..., HIGH"
    )
    group.add_argument(
        "--normal", nargs="+", metavar=("MEAN", "STD"), help="Gaussian, rounded; STD is 1 if absent"
    )
    group.add_argument(
        "--pmf", metavar="P", help="probabilities of delay 0, 1, ...: 0,0.5,0.5 or a text file"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="simulate N workers of one parameter server"
    )
    group.add_argument(
        "--stages", type=int, metavar="S", help="an asynchronous pipeline of S stages"
    )
    parser.add_argument(
        "--schedule",
        help="of --workers: round_robin (default), random or normal; of --stages: 1f1b (default) "
        "or gpipe-async",
    )
    parser.add_argument(
        "--updates", type=int, default=50_000, help="simulated with --workers (default 50000)"
    )


def _read_adam(options: argparse.Namespace) -> None:
    """Turns what is said of Adam into the damped heavy ball that it is."""
    if options.preconditioned_sharpness is not None:
        if options.optimizer != "adam" or options.sharpness is not None:
            raise ValueError(
                "--preconditioned-sharpness is for --optimizer=adam, in the place of --sharpness"
            )
        options.sharpness = options.preconditioned_sharpness
    if options.optimizer == "adam":
        if options.kind != "heavy_ball" or options.no_dampening:
            raise ValueError("--optimizer=adam is a damped heavy ball: leave out the other kind")
        options.momentum = _DEFAULT_MOMENTUM if options.momentum is None else options.momentum


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 for bad input."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        _read_adam(options)
        if options.drop_stale is not None and options.method not in (DROP, "all"):
            raise ValueError(f"--drop-stale={options.drop_stale} needs --method {DROP}")
        if options.stages is not None or options.method is not None:
            print(_answer_rows(options))
            return 0
        delay, description = _read_delay(options)
        question = Question(
            delay,
            description,
            momentum=_DEFAULT_MOMENTUM if options.momentum is None else options.momentum,
            kind=options.kind,
            dampening=not options.no_dampening,
            sharpness=options.sharpness,
            learning_rate=options.learning_rate,
            baseline=options.baseline_learning_rate,
            curvature_noise=options.curvature_noise,
        )
        answered = answer(question)
        if options.plot is not None:
            plot_thresholds(question, answered, options.plot)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(json.dumps(answered, indent=2, allow_nan=False) if options.json else render(answered))
    return 0


def _answer_rows(options: argparse.Namespace) -> str:
    """The answer for a pipeline, or for a mitigation."""
    if options.kind != "heavy_ball" or options.plot is not None or options.curvature_noise:
        raise ValueError("--stages and --method know heavy ball only, and draw nothing")
    method: dict[str, Any] = {
        "sharpness": 1.0 if options.sharpness is None else options.sharpness,
        "momentum": options.momentum or 0.0,
        "dampening": not options.no_dampening,
    }
    heading = [f"sharpness  {method['sharpness']:g}", f"momentum   {method['momentum']:g}"]
    if options.stages is None and options.delay is None:
        return _answer_random(options, method, heading)
    if options.stages is not None:
        if options.method is not None:
            raise ValueError("--method needs one delay of all leaves: a stage has its own")
        schedule = options.schedule or "1f1b"
        rows = pipeline_rows(options.stages, schedule, **method)
        ages = delays.pipeline(options.stages, schedule)
        heading.insert(0, f"pipeline   {options.stages} stages ({schedule}), delays {ages}")
        heading.append("the sharpest direction is")
    else:
        names = [*MITIGATIONS, *([PREDICTION] if options.momentum else [])]
        chosen = names if options.method == "all" else [options.method]
        rows = method_rows(chosen, delays.as_integer(options.delay, "delay"), **method)
        heading.insert(0, f"delay      {options.delay} updates (constant)")
    if options.json:
        return json.dumps({**method, "largest stable learning rate": dict(rows)}, indent=2)
    return format_rows(heading, rows)


def _answer_random(options: argparse.Namespace, method: dict[str, Any], heading: list[str]) -> str:
    """The answer for a mitigation under random delays."""
    delay: Any
    if options.workers is None:
        delay, description = _read_delay(options)
    else:
        delay, description = _simulate(options)
    chosen = [*MITIGATIONS, DROP] if options.method == "all" else [options.method]
    rows = random_method_rows(chosen, delay, drop_stale=options.drop_stale, **method)
    if options.json:
        thresholds = {row.name: _numbers(row) for row in rows}
        return json.dumps({**method, "largest stable learning rate": thresholds}, indent=2)
    return format_criteria_rows([f"delay      {description}", *heading], rows)


def _numbers(row: CriteriaRow) -> dict[str, float]:
    return {name: value for name, value in row._asdict().items() if name != "name"}


def _simulate(options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The trace of the workers that the options name, and its description."""
    schedule = options.schedule or "round_robin"
    trace = delays.simulate_workers(options.workers, options.updates, schedule=schedule, seed=0)
    return trace, f"{options.workers} workers, {schedule} schedule"


def _read_delay(options: argparse.Namespace) -> tuple[Delay, str]:
    """The delay that the options name, and its description."""
    if options.delay is not None:
        return delays.as_integer(options.delay, "delay"), f"{options.delay} updates"
    if options.uniform is not None:
        low, high = options.uniform
        return delays.uniform(low, high), f"uniform on {low}, ..., {high}"
    if options.normal is not None:
        mean, std = _read_normal(options.normal)
        return delays.discretized_normal(mean, std), f"normal, mean {mean}, std {std:g}"
    if options.pmf is not None:
        return delays.categorical(_read_pmf(options.pmf)), f"probabilities {options.pmf}"
    trace, description = _simulate(options)
    return delays.from_trace(trace), description


def _read_normal(texts: list[str]) -> tuple[int, float]:
    try:
        mean, std = int(texts[0]), float(texts[1]) if len(texts) > 1 else 1.0
    except ValueError:
        raise ValueError(f"--normal takes a whole MEAN and a number STD, got {texts}") from None
    if len(texts) > 2:
        raise ValueError(f"--normal takes MEAN and at most one STD, got {len(texts)} values")
    return mean, std


def _read_pmf(text: str) -> list[float]:
    """Numbers with commas or blanks between them, given directly or in a file."""
    path = Path(text)
    source = path.read_text() if path.is_file() else text
    try:
        return [float(number) for number in source.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"--pmf must be a file or numbers with commas between them, got {text!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
