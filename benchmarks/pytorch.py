"""Against PyTorch: the same parameter server, with its data pipeline, on one core and on all."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asgd_jax import data
from benchmarks.harness import Times, interleave, ratio, spread
from benchmarks.jax_worker import count_flops
from benchmarks.report import num_cores
from benchmarks.result import BenchOptions, Goal, Result, Skipped, Table, TableRow, goal
from benchmarks.workers import MALLOC, Worker, start
from experiments.claims import at_least

TITLE = "the same parameter server in PyTorch, data pipeline included"
INSTALL = "pip install 'asgd-jax[bench]', or name an interpreter that has it with --torch-python"


class Case(NamedTuple):
    """A task for both sides, how much of it is a repetition, and the goal."""

    name: str
    model: str
    model_options: dict[str, Any]
    image_shape: tuple[int, int, int] | None  # of random images; None for digits
    num_workers: int
    batch_size: int
    batches: int | None  # in an epoch; None for all there are
    epochs: int
    rounds: int
    at_least: float | None
    learning_rate: float = 0.01


_BUDGET = 30.0  # seconds a case and number of cores: on a busy machine there are fewer rounds
_MNIST, _CIFAR = (28, 28, 1), (32, 32, 3)
_HIDDEN = {"hidden": [64]}
CASES = (
    Case("LeNet, batch 64", "mnist_cnn", {}, _MNIST, 33, 64, 33, 2, 7, 1.0),
    Case("mnist_cnn_bn, batch 128", "mnist_cnn_bn", {}, _MNIST, 8, 128, 8, 1, 5, 1.0),
    Case("VGG-11 at 1/8, batch 32", "vgg11", {"width": 0.125}, _CIFAR, 8, 32, 40, 1, 7, 1.0),
    Case("VGG-11 at 1/2, batch 32", "vgg11", {"width": 0.5}, _CIFAR, 8, 32, 16, 1, 5, 1.0),
    Case("ResNet-20, batch 32", "resnet20", {}, _CIFAR, 8, 32, 8, 1, 5, 1.0),
    Case("ResNet-20, batch 128", "resnet20", {}, _CIFAR, 8, 128, 8, 1, 5, 1.0),
    Case("digits MLP 64-64-10, batch 8", "mlp", _HIDDEN, None, 33, 8, None, 5, 9, 10.0),
    Case("digits MLP 64-64-10, batch 64", "mlp", _HIDDEN, None, 33, 64, None, 30, 9, None),
)
QUICK_CASES = (Case("digits MLP 64-64-10, batch 8", "mlp", _HIDDEN, None, 33, 8, 32, 1, 1, 10.0),)

# What was found when a goal missed, by a profile of whole steps on one core (EPYC, a product of
# large matrices 105 GFLOP/s); shown only where it does.
_REASONS: dict[str, str] = {
    "mnist_cnn": "two thirds of the time are products of patches, 20 and 50 rows wide, at half of "
    "the peak, a third is building patches and pooling; PyTorch's direct convolutions need none",
    "mnist_cnn_bn": "output, input gradient and weight gradient take 28 % each, at 75 to 95 % of "
    "the peak; BatchNorm and pooling 17 %",
    "vgg11": "output and both gradients run near the peak from 64 channels on, products of patches "
    "(45 % at half width) too; with 8 to 32 channels Eigen's convolution reaches half of it, and "
    "transposes for the weight gradient are 6 (half width) to 15 % (an eighth)",
    "resnet20": "three quarters are convolutions of 16 to 64 channels, which Eigen runs at 45 to "
    "60 % of the peak and oneDNN at 80; transposes for the weight gradient are 9 %, BatchNorm 8 %",
    "mlp": "PyTorch with its updates fused, on one thread, is quicker than the plain loop that the "
    "goal was set for",
}


def run(options: BenchOptions) -> Result:
    """Times both sides in turns, in processes with the same cores and malloc settings.

    Raises:
      Skipped: where the interpreter has no PyTorch.
    """
    version = torch_version(options.torch_python)
    rows, goals, peaks = list[TableRow](), list[Goal](), list[TableRow]()
    for cores in sorted({1, num_cores()}):
        peak = ask_for_peak(cores)
        peaks.append({"cores": cores, "GFLOP/s": peak / 1e9})
        for case in QUICK_CASES if options.quick else CASES:
            times, losses = time_both(case, options.torch_python, cores)
            row, case_goals = judge(case, cores, peak, times)
            rows.append(row | {"loss, JAX": losses["jax"], "loss, PyTorch": losses["torch"]})
            goals += case_goals
    notes = [
        f"PyTorch {version}. Both sides are kept to the same cores, with as many threads. PyTorch "
        "keeps images as NCHW and, where there are convolutions, as NHWC (channels_last) too: the "
        "faster of both counts in every round. Where operations are too small for threads, it is "
        "the one-core row that is quicker.",
        "Both sides draw a new order of the samples every epoch, pick batches of uint8 from "
        "memory, normalise, take the gradient at a worker's copy of the parameters, step on the "
        "server and pull. Processes that stay, asked in turns; glibc's "
        "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised in all.",
        "PyTorch's side is eager, with fused updates (`torch._foreach_*`) and the copies used as "
        "they are, without loading them into a module; see torch_worker.py.",
        "GFLOP/s: operations of the gradient as XLA counts them on plain convolutions, over the "
        "time of the whole update. Peak: a product of two 2048x2048 matrices in float32.",
        "The losses are those after the first request, of equally many epochs on both sides.",
    ]
    tables = [Table("updates", rows), Table("a large matrix product", peaks)]
    return Result(tables, goals, notes)


def ask_for_peak(cores: int) -> float:
    """Returns the operations a second of a large matrix product on so many cores."""
    with start("jax_worker", json.dumps({"cores": cores}), environment=MALLOC) as worker:
        return float(worker.ask()["peak"])


def torch_version(python: str) -> str:
    """Returns the version of PyTorch that an interpreter has.

    Raises:
      Skipped: for none.
    """
    command = [python, "-c", "import torch; print(torch.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"{python} has no PyTorch: {INSTALL}") from error
    return done.stdout.strip()


def write_arrays(case: Case, file: Path) -> int:
    """Writes the samples of a case for both sides; returns how many.

    Digits are real; other images are random, as no time depends on what they show.
    """
    count = None if case.batches is None else case.batches * case.batch_size
    if case.image_shape is None:
        digits = data.load("digits", num_train=count)
        images, labels = digits.train_images, digits.train_labels
    else:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (count or 0, *case.image_shape), np.uint8)
        labels = random.integers(0, 10, count, np.int32)
    np.savez(file, images=images, labels=labels)
    return len(labels)


def time_both(case: Case, torch_python: str, cores: int) -> tuple[Times, dict[str, float]]:
    """Returns seconds per update of both sides by round, and their last losses."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "arrays.npz"
        updates = case.epochs * (write_arrays(case, file) // case.batch_size)
        task = _task(case) | {"arrays": str(file), "cores": cores}

        def begin(module: str, python: dict[str, str], **more: Any) -> Worker:
            words = json.dumps(task | more)
            return stack.enter_context(start(module, words, environment=MALLOC, **python))

        sides = {"jax": begin("jax_worker", {})}
        interpreter = {"python": torch_python}
        sides["torch"] = begin("torch_worker", interpreter, channels_last=False)
        if case.image_shape is not None:
            sides["torch, NHWC"] = begin("torch_worker", interpreter, channels_last=True)
        return alternate(sides, case, updates)


def _task(case: Case) -> dict[str, Any]:
    fields = ("model", "model_options", "num_workers", "batch_size", "learning_rate")
    return {field: getattr(case, field) for field in fields}


def alternate(sides: dict[str, Worker], case: Case, updates: int) -> tuple[Times, dict[str, float]]:
    """Asks the sides in turns.

    The first round is not timed. Once the seconds of the budget are spent no further one begins.
    """
    losses = dict[str, float]()  # of the first request, when all sides have made equal epochs
    spent = 0.0  # by the workers' own clocks, which the pipe between us is no part of

    def asking(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal spent
            reply = sides[name].ask(epochs=case.epochs)
            losses.setdefault(name, reply["loss"])
            spent += reply["seconds"]

        return call

    variants = {name: asking(name) for name in sides}
    times = interleave(variants, case.rounds, budget=_BUDGET, clock=lambda: spent)
    return {name: [each / updates for each in times[name]] for name in times}, losses


def judge(case: Case, cores: int, peak: float, times: Times) -> tuple[TableRow, list[Goal]]:
    """Returns the row of a case and its goal, if it has one.

    PyTorch's time of a round is that of its faster form.
    """
    theirs = [values for name, values in times.items() if name != "jax"]
    best = [min(round_) for round_ in zip(*theirs, strict=True)]
    faster = ratio({"jax": times["jax"], "best": best}, "best", "jax")
    flops = count_flops(_task(case), case.image_shape or (8, 8, 1))
    ours, torch = spread(times["jax"]).median, spread(best).median
    row: TableRow = {
        "case": case.name,
        "cores": cores,
        "speed / PyTorch": faster.median,
        "low quartile": faster.low,
        "high quartile": faster.high,
        "rounds": len(best),
        "JAX (ms)": 1e3 * ours,
        "PyTorch (ms)": 1e3 * torch,
        "JAX (GFLOP/s)": flops / ours / 1e9,
        "PyTorch (GFLOP/s)": flops / torch / 1e9,
        "JAX / peak": flops / ours / peak,
    }
    if case.at_least is None:
        return row, []
    reason = f"quartiles {faster.low:.2f} to {faster.high:.2f}"
    if case.model in _REASONS:
        reason += f"; {_REASONS[case.model]}"
    claim = f"{case.name}, {cores} core{'s' * (cores > 1)}: updates/s over PyTorch's"
    return row, [goal(at_least(claim, faster.median, case.at_least), reason)]
