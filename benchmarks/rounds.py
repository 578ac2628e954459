"""Rounds of N workers on D devices against the same updates one after another."""

import json
import os
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from benchmarks.harness import interleave, ratio, spread
from benchmarks.pod_model import UTILISATION, model_rows
from benchmarks.report import num_cores
from benchmarks.result import BenchOptions, Goal, Result, Table, TableRow, goal
from benchmarks.workers import start
from experiments.claims import at_least, at_most

TITLE = "rounds: N workers at once on D devices, against delayed SGD one update after another"

_BUDGET = 10.0  # seconds a case
_SERIAL, _ONE_CORE = "one by one", "one by one, one core"
_ROUNDS = "rounds, a device a core"
_POD = 8  # devices of the program that is looked at


class Case(NamedTuple):
    """A model, the samples of a worker, and how many workers."""

    name: str
    model: str
    model_options: dict[str, Any]
    image_shape: tuple[int, ...]
    batch_size: int
    num_workers: int


def _mlp(units: int, batch_size: int) -> Case:
    options = {"hidden": (units, units), "activation": "relu"}
    return Case(f"MLP 784-{units}-{units}-10", "mlp", options, (28, 28, 1), batch_size, 32)


CASES = (
    *(Case("LeNet", "mnist_cnn", {}, (28, 28, 1), size, 32) for size in (8, 64)),
    *(
        Case("VGG-11, width 1/4", "vgg11", {"width": 0.25}, (32, 32, 3), size, 32)
        for size in (8, 64)
    ),
    *(_mlp(units, size) for units in (64, 256, 1024) for size in (8, 64)),
)
QUICK_CASES = (_mlp(8, 2)._replace(num_workers=4),)
LOOKED_AT = (CASES[1]._replace(num_workers=_POD), _mlp(1024, 64)._replace(num_workers=_POD))


def run(options: BenchOptions) -> Result:
    """Looks at the program on eight devices, measures on this machine's cores, models a pod."""
    rows, goals = list[TableRow](), list[Goal]()
    for case in QUICK_CASES if options.quick else CASES:
        case_rows, case_goals = measure_rounds(case)
        rows += case_rows
        goals += case_goals
    looked, look_goals = list[TableRow](), list[Goal]()
    for case in QUICK_CASES if options.quick else LOOKED_AT:
        row, found = look_at(case)
        looked.append(row)
        look_goals += found
    return Result(
        tables=[
            Table("what a device receives and computes in a round, as compiled", looked),
            Table("updates a second", rows),
            Table(
                "MODEL, not measured: ResNet-50, 32 workers of 256 images, milliseconds of 32 "
                "updates",
                model_rows(32, 256, 16) + model_rows(32, 256, 32),
            ),
        ],
        goals=look_goals + goals,
        notes=[
            "One by one: `delayed(optax.sgd, N - 1)` in a compiled loop, one device that has all "
            "cores (or a process that has one). A round: `asgd_jax.rounds` with a device a core. "
            "Same samples, same updates.",
            f"The model: TPU v4 (275 TFLOP/s, 1.2 TB/s to memory, 300 GB/s to other chips), "
            f"{UTILISATION:.0%} of the peak for every way; it leaves out that 256 / 16 images "
            "a chip use it worse than 256 do, which would speak for rounds.",
        ],
    )


def measure_rounds(case: Case) -> tuple[list[TableRow], list[Goal]]:
    """Times rounds against the serial loop in turns; returns the rows and, of LeNet, the goal."""
    cores = num_cores()
    layouts = {_SERIAL: 1, _ONE_CORE: 1, "rounds, one device": 1, _ROUNDS: cores}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                _start(
                    case,
                    devices,
                    serial=name in (_SERIAL, _ONE_CORE),
                    cores=1 if name == _ONE_CORE else cores,
                )
            )
            for name, devices in layouts.items()
        }
        calls = {name: partial(worker.ask, rounds=1) for name, worker in workers.items()}
        times = interleave(calls, 9, budget=_BUDGET)
    rows: list[TableRow] = [
        {
            "model": case.name,
            "samples": case.batch_size,
            "workers": case.num_workers,
            "way": name,
            "updates/s": case.num_workers / spread(times[name]).median,
            "speed / one by one": ratio(times, _SERIAL, name).median,
        }
        for name in layouts
    ]
    if case.model != "mnist_cnn":
        return rows, []
    faster, alone = ratio(times, _SERIAL, _ROUNDS), ratio(times, _SERIAL, _ONE_CORE).median
    claim = at_least(
        f"{case.name}, batch {case.batch_size}: {_ROUNDS} over {_SERIAL}", faster.median, 1.6
    )
    reason = (
        f"{cores} cores could give {cores * alone:.2f} at most, since one makes {alone:.2f} of the "
        "serial speed: the serial step uses them all by now. A round has to move every worker's "
        f"parameters and gradient besides; quartiles {faster.low:.2f} to {faster.high:.2f}"
    )
    return rows, [goal(claim, reason)]


def look_at(case: Case) -> tuple[TableRow, list[Goal]]:
    """Returns what the compiled round says of itself, and the goals on it."""
    with _start(case, case.num_workers, serial=False, cores=num_cores()) as worker:
        facts = worker.ask(look=True)
    name = f"{case.name}, {case.num_workers} workers on as many devices"
    sent = facts["received"] / facts["all_reduce"]
    work = facts["flops"] / facts["gradient_flops"]
    return {"case": name, **facts, "bytes / all-reduce's": sent, "FLOPs / a gradient's": work}, [
        goal(
            at_most(f"{name}: bytes received over a synchronous all-reduce's", sent, 1.1),
            f"{facts['whole_leaves']:.1%} of the parameters are in leaves that {case.num_workers} "
            "devices do not divide, whose gradients go to all of them",
        ),
        goal(at_most(f"{name}: collectives inside the gradient", facts["inside_gradient"], 0)),
        goal(at_most(f"{name}: FLOPs of a device over those of one gradient", work, 1.02)),
    ]


def _start(case: Case, devices: int, *, serial: bool, cores: int) -> Any:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    task = json.dumps(case._asdict() | {"serial": serial, "devices": devices, "cores": cores})
    return start("rounds_worker", task, environment={"XLA_FLAGS": flags})
