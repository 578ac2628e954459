"""Compilation of every model's update, cold and cached; the start of train.py.

Run as a program it is its own worker, with JAX's persistent cache set by environment variables: it
compiles the update of the model that each request names, and says how long it took.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from asgd_jax.training import default_config
from asgd_jax.training.plan import abstract_step
from benchmarks.result import BenchOptions, Goal, Result, Table, TableRow, goal
from benchmarks.workers import checkout, serve, start
from experiments.claims import at_most

TITLE = "compile time, cold and with the persistent cache; from the shell to the first update"

# Sizes as trained, but ResNet-50: as in the reduced runs on a CPU.
COMPILED: dict[str, dict[str, Any]] = {
    "mlp": {"dataset": "digits"},
    "digits_cnn": {"dataset": "digits"},
    "mnist_cnn": {"dataset": "mnist"},
    "mnist_cnn_bn": {"dataset": "mnist"},
    "vgg11": {"dataset": "cifar10"},
    "resnet20": {"dataset": "cifar10"},
    "resnet44": {"dataset": "cifar10"},
    "resnet50": {"dataset": "imagenet2012", "image_size": 64, "width": 0.25},
}
_START_COLD, _START_WARM = 10.0, 2.0
_START_SECONDS = 120.0
_POLL_SECONDS = 0.01


def run(options: BenchOptions) -> Result:
    """Compiles every model twice in processes of their own, then starts train.py so."""
    names = ["mlp"] if options.quick else list(COMPILED)
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = compile_models(names, Path(cache)), compile_models(names, Path(cache))
    rows: list[TableRow] = [
        {
            "model": name,
            **{f"{key} (s)": cold[name][key] for key in ("trace", "compile")},
            "compile, cached (s)": warm[name]["compile"],
            "cached / cold": warm[name]["compile"] / cold[name]["compile"],
        }
        for name in names
    ]
    starts, goals = measure_starts(1 if options.quick else 3)
    notes = [
        "An update with delay 7 and SGD, traced and compiled without data, each model once in one "
        "process with an empty cache folder and once in another with the folder it left; every "
        "program is cached, however quickly it compiles.",
        "Start: `scripts/train.py --config=configs/digits.py:asgd` with a row after every update, "
        "from the shell's command to the first row in metrics.csv; JAX_COMPILATION_CACHE_DIR names "
        "an empty folder (cold), then the same one (warm).",
    ]
    tables = [
        Table("compilation of an update, single measurements", rows),
        Table("seconds from the command to the first update, median of the starts", starts),
    ]
    return Result(tables, goals, notes)


def compile_models(names: list[str], cache: Path) -> dict[str, dict[str, float]]:
    """Returns the seconds of tracing and compiling each model, in a fresh process.

    Raises:
      ValueError: when the process fails.
    """
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with start("compile_time", environment=environment) as worker:
        return {name: worker.ask(model=name, **COMPILED[name]) for name in names}


def measure_starts(rounds: int) -> tuple[list[TableRow], list[Goal]]:
    """Starts train.py cold and warm in turns; returns the rows and goals."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state, each in seconds.items():
                each.append(time_start(Path(folder), Path(folder) / state))
    rows: list[TableRow] = [
        {"cache": state, "median (s)": statistics.median(each), "fastest (s)": min(each)}
        for state, each in seconds.items()
    ]
    goals = []
    for (state, each), bound in zip(seconds.items(), (_START_COLD, _START_WARM), strict=True):
        text = f"train.py on digits, seconds to the first update, {state}"
        reason = f"fastest of {rounds} starts {min(each):.1f} s"
        goals.append(goal(at_most(text, statistics.median(each), bound), reason))
    return rows, goals


def time_start(cache: Path, workdir: Path) -> float:
    """Returns the seconds from starting train.py to the first row of its metrics.csv; ends it then.

    Raises:
      ValueError: when it ends, or the time is up, before there is a row.
    """
    root = checkout()
    command = [sys.executable, "scripts/train.py", "--config=configs/digits.py:asgd"]
    command += ["--config.log_every_steps=1", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache / "cache")}
    metrics = workdir / "metrics.csv"
    before = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while time.perf_counter() - before < _START_SECONDS:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                return time.perf_counter() - before
            if process.poll() is not None:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        process.terminate()
        _, said = process.communicate()
    last = (said.decode().strip().splitlines() or ["no message"])[-1]
    raise ValueError(f"train.py made no update (exit code {process.returncode}): {last}")


def time_compilation(request: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds of tracing and of compiling one donated update.

    >>> sorted(time_compilation({"model": "mlp", "dataset": "digits"}))
    ['compile', 'trace']
    """
    config = default_config()
    config.update(num_workers=8, delay=7, worker_batch_size=16, num_devices=1, **request)
    step, state, batch = abstract_step(config)
    before = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    between = time.perf_counter()
    lowered.compile()
    return {"trace": between - before, "compile": time.perf_counter() - between}


if __name__ == "__main__":
    serve(time_compilation)
