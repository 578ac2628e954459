"""Sweeps: updates a second of all runs, by vmap and one by one; a grid against single processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from asgd_jax.training.feed import load_dataset
from asgd_jax.training.sweep import sweep
from asgd_jax.training.sweep_groups import default_runs_at_once, group_runs, stack_values
from asgd_jax.training.sweep_program import compile_runs, make_whole_run, put_samples
from benchmarks.harness import interleave, ratio, spread
from benchmarks.report import num_cores
from benchmarks.result import BenchOptions, Goal, Result, Table, TableRow, goal
from benchmarks.workers import Worker, checkout, start
from configs.digits import get_config
from experiments.claims import at_least, at_most

TITLE = "runs of a sweep together, one by one, and as processes of their own"

_DELAY = 32
_LEARNING_RATE = 1e-3  # small: no run diverges and ends before the others
_BUDGET = 8.0  # seconds a case: on a busy machine there are fewer rounds


_RESNET_8: dict[str, Any] = {"stage_sizes": (1, 1, 1), "width": 0.25}


class Case(NamedTuple):
    """A model on digits, how many runs of it, and how many of them at once."""

    name: str
    model: str
    model_options: dict[str, Any]
    runs: int
    at_once: tuple[int, ...]
    epochs: int
    rounds: int
    num_train: int | None = None


_AT_ONCE = (1, 2, 4, 8)
CASES = (
    Case("MLP 64-64-10", "mlp", {"hidden": (64,)}, 16, _AT_ONCE, 4, 7),
    Case("MLP 64-512-512-10", "mlp", {"hidden": (512, 512)}, 16, _AT_ONCE, 1, 5),
    Case("digits CNN", "digits_cnn", {}, 16, _AT_ONCE, 1, 5),
    Case("ResNet-8, width 1/4", "resnet20", _RESNET_8, 8, (1, 2, 4), 1, 3, num_train=33 * 8),
)
QUICK_CASES = (Case("MLP 64-64-10", "mlp", {"hidden": (64,)}, 4, (1, 4), 1, 1),)

# Small enough that every run goes on to its end, on both sides.
_GRID = [
    {"learning_rate": 0.001 * number, "seed": seed} for number in range(1, 17) for seed in range(4)
]
_GRID_EPOCHS = 10
_GRID_PROCESSES = 4


def _digits(**changes: Any) -> ConfigDict:
    config = get_config("asgd_same")
    config.update(changes)
    return config


def run(options: BenchOptions) -> Result:
    """Measures both; see the module."""
    rows, goals = list[TableRow](), list[Goal]()
    for number in range(len(QUICK_CASES if options.quick else CASES)):
        case_rows, case_goal = measure_case(number, options.quick)
        rows += case_rows
        goals.append(case_goal)
    tables = [Table("runs x updates a second on digits, delay 32, batch 8", rows)]
    notes = [
        "At once: runs of one vmap, the others following in lax.map; 1 is one by one. Compilation "
        "is not in these times. The default is the sweep's own choice.",
        "A device a core: one process with as many CPU devices as cores (`use_a_device_a_core`, as "
        "scripts/reproduce.py does), over which a sweep divides its runs. A process a "
        "core: as many sweeps, each of its share of the runs and kept to a core of its own.",
    ]
    if not options.quick:
        grid_row, grid_goal = measure_grid()
        tables.append(Table("a grid of 64 runs on digits, seconds", [grid_row]))
        goals.append(grid_goal)
        notes.append(
            f"The grid: 16 learning rates, 4 seeds, delay {_DELAY}, {_GRID_EPOCHS} epochs, in one "
            "process from its start to its end, compilation included. Of the 64 train.py "
            f"processes {_GRID_PROCESSES} are run, one after the other, and their mean is taken 64 "
            "times: an extrapolation, not a measurement of all 64."
        )
    return Result(tables, goals, notes)


class CompiledRuns(NamedTuple):
    """A compiled block of runs: `call` makes them all; `temp_bytes` is its temporary memory."""

    call: Callable[[], Any]
    updates: int
    temp_bytes: int
    default_at_once: int


def make_block(
    case: Case, runs: int, at_once: int, num_train: int | None = None, num_devices: int = 1
) -> CompiledRuns:
    """Compiles `runs` runs of a case, `at_once` of them in a vmap, as a sweep would."""
    config = _config(case, num_train)
    points = [config.copy_and_resolve_references() for _ in range(runs)]
    for seed, point in enumerate(points):
        point.seed = seed
    dataset = load_dataset(config)
    (group,) = group_runs(points, range(runs), dataset, at_once, False)
    samples = put_samples(dataset, config.eval_batch_size, full_train=False)
    values = stack_values(group, float("inf"))
    jitted: Any = compile_runs(make_whole_run(group.shared), at_once, num_devices)
    program = jitted.lower(values, samples, None).compile()
    analysis = program.memory_analysis()
    return CompiledRuns(
        call=lambda: program(values, samples, None),
        updates=runs * group.shared.facts.plan.steps_per_epoch * case.epochs,
        temp_bytes=0 if analysis is None else int(analysis.temp_size_in_bytes),
        default_at_once=default_runs_at_once(config, dataset),
    )


def _config(case: Case, num_train: int | None = None) -> ConfigDict:
    config = _digits(
        delay=_DELAY, model=case.model, epochs=case.epochs, learning_rate=_LEARNING_RATE
    )
    options = dict(case.model_options)
    config.width = options.pop("width", 1.0)
    config.model_options = ConfigDict(options)
    config.num_train = num_train
    return config


_ONE = "one process"
_DEVICES = "a device a core"


def measure_case(number: int, quick: bool) -> tuple[list[TableRow], Goal]:
    """Times every layout and number of runs at once in turns; returns the rows, and the goal.

    The goal is of the default: what `use_a_device_a_core` gives, and as many runs at once as the
    sweep's own default allows.
    """
    case = (QUICK_CASES if quick else CASES)[number]
    with ExitStack() as stack:
        layouts = _start_layouts(stack, number, quick)
        calls = {
            (layout, at_once): partial(_ask_all, workers, at_once)
            for layout, workers in layouts.items()
            for at_once in case.at_once
            if at_once * len(workers) <= case.runs
        }
        facts = layouts[_ONE][0].ask(at_once=1)
        named = {f"{layout}, {at_once}": call for (layout, at_once), call in calls.items()}
        times = interleave(named, case.rounds, budget=_BUDGET * len(layouts))
    default = max(k for k in case.at_once if k <= facts["default"])
    # What scripts that sweep do.
    layout_of_scripts = _DEVICES if _DEVICES in layouts else _ONE
    chosen, base = f"{layout_of_scripts}, {default}", f"{_ONE}, 1"
    fastest = min(times, key=lambda name: spread(times[name]).median)
    rows: list[TableRow] = [
        {
            "model": case.name,
            "layout": layout,
            "runs": case.runs,
            "at once": at_once,
            "default": f"{layout}, {at_once}" == chosen,
            "runs x updates/s": facts["updates"] / spread(times[f"{layout}, {at_once}"]).median,
            "speed / one by one": ratio(times, base, f"{layout}, {at_once}").median,
        }
        for layout, at_once in calls
    ]
    slower = ratio(times, chosen, fastest)
    claim = at_most(f"sweep of {case.name}: time of the default / the fastest", slower.median, 1.1)
    reason = (
        f"{fastest} at once is the fastest, the default is {chosen}; quartiles {slower.low:.2f} to "
        f"{slower.high:.2f}"
    )
    return rows, goal(claim, reason)


def _start_layouts(stack: ExitStack, number: int, quick: bool) -> dict[str, list[Worker]]:
    """Workers of one process; of a device a core; of a process a core, which share the runs."""
    cores = num_cores()

    def begin(**task: Any) -> Worker:
        words = json.dumps({"number": number, "quick": quick, "shares": 1, "core": None} | task)
        devices = f"--xla_force_host_platform_device_count={task['devices']}"
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"}
        return stack.enter_context(start("sweep_worker", words, environment=environment))

    layouts = {_ONE: [begin(devices=1)]}
    if cores > 1:
        layouts[_DEVICES] = [begin(devices=cores)]
        layouts["a process a core"] = [
            begin(devices=1, shares=cores, core=core) for core in range(cores)
        ]
    return layouts


def _ask_all(workers: list[Worker], at_once: int) -> None:
    for worker in workers:
        worker.send(at_once=at_once)
    for worker in workers:
        worker.read()


def measure_growth(counts: Sequence[int]) -> list[TableRow]:
    """Returns time and memory of 1, 2, ... runs of the small MLP, all in one vmap."""
    case = CASES[0]
    blocks = {count: make_block(case, count, count) for count in counts}
    times = interleave({str(k): block.call for k, block in blocks.items()}, 5, budget=_BUDGET)
    return [
        {
            "runs": count,
            "us/update": 1e6 * spread(times[str(count)]).median * count / block.updates,
            "runs x updates/s": block.updates / spread(times[str(count)]).median,
            "temp (bytes)": block.temp_bytes,
        }
        for count, block in blocks.items()
    ]


def run_grid() -> None:
    """Trains the grid of 64; called in a process of its own."""
    sweep(_digits(delay=_DELAY, epochs=_GRID_EPOCHS), _GRID, progress=False)


def measure_grid() -> tuple[TableRow, Goal]:
    """Times the grid as one sweep, and a few of its runs as train.py; returns the row and goal."""
    root = checkout()
    environment = {**os.environ}
    train = [sys.executable, "scripts/train.py", "--config=configs/digits.py:asgd"]
    train += [f"--config.epochs={_GRID_EPOCHS}", "--config.learning_rate_rule=none"]
    with tempfile.TemporaryDirectory() as folder:
        # Both start with what a machine has that never ran them: an empty compilation cache each.
        # train.py's later processes find what the first one left.
        separate = []
        environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "train")
        for number, point in enumerate(_GRID[:: len(_GRID) // _GRID_PROCESSES]):
            changes = [f"--config.{field}={value}" for field, value in point.items()]
            command = [*train, *changes, f"--workdir={Path(folder) / str(number)}"]
            separate.append(_seconds(command, root, environment))
        environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "sweep")
        code = f"from {__name__} import run_grid; run_grid()"
        together = _seconds([sys.executable, "-c", code], root, environment)
    mean = sum(separate) / len(separate)
    faster = len(_GRID) * mean / together
    row: TableRow = {
        "runs": len(_GRID),
        "one sweep": together,
        "one train.py, mean": mean,
        "one train.py, fastest": min(separate),
        "64 train.py (extrapolated)": len(_GRID) * mean,
        "speed of the sweep / processes": faster,
    }
    claim = at_least("grid of 64 on digits: sweep over 64 train.py processes", faster, 5.0)
    return row, goal(claim)


def _seconds(command: list[str], root: Path, environment: dict[str, str]) -> float:
    before = time.perf_counter()
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"sweeps: {command[1]} failed ({done.returncode}): {last}")
    return time.perf_counter() - before
