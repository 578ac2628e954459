"""How cost grows with the delay, the parameters, the batch, the runs and the devices.

Run as a program it is its own worker, which has a mesh of fake devices.
"""

from typing import Any, NamedTuple

import jax
import optax

import asgd_jax
from asgd_jax.training import default_config
from asgd_jax.training.setup import set_up
from benchmarks.harness import exponent, interleave, spread, tree_bytes
from benchmarks.loops import Loop, make_loop, make_workload
from benchmarks.result import BenchOptions, Result, Table, TableRow
from benchmarks.workers import serve, start

TITLE = "how time and memory grow, with fitted exponents"

_LEARNING_RATE = 1e-3
_BUDGET = 15.0  # seconds an axis


class Axis(NamedTuple):
    """One quantity that grows, the others being fixed.

    Attributes:
      name: of the quantity, as the column's head.
      values: its sizes.
      updates: of one timed loop.
    """

    name: str
    values: tuple[int, ...]
    updates: int


AXES = (
    Axis("delay", (1, 4, 16, 64, 256), 20),
    Axis("width", (64, 128, 256, 512, 1024), 20),
    Axis("batch", (16, 64, 256, 1024), 10),
)
QUICK_AXES = (Axis("delay", (1, 4), 2),)
RUNS = (1, 2, 4, 8, 16, 32)
DEVICES = (1, 2, 4, 8)


def run(options: BenchOptions) -> Result:
    """Measures every axis; see the module."""
    tables, fits = list[Table](), list[TableRow]()
    for axis in QUICK_AXES if options.quick else AXES:
        rows = measure_axis(axis, rounds=1 if options.quick else 7)
        tables.append(Table(f"against the {axis.name}", rows))
        fits += fit(axis.name, rows, ("us/update", "history (bytes)", "temp (bytes)"))
    if not options.quick:
        from benchmarks.sweeps import measure_growth

        rows = measure_growth(RUNS)
        tables.append(Table("against the number of runs of a sweep, all in one vmap", rows))
        fits += fit("runs", rows, ("us/update", "temp (bytes)"))
    rows = history_on_devices((1, 2) if options.quick else DEVICES)
    tables.append(Table("against the number of devices, the history being sharded", rows))
    fits += fit("devices", rows, ("history (bytes/device)",))
    notes = [
        "An MLP 784-width-width-10 with one ring: delay 32, width 256 and batch 64, where they are "
        "not the axis. us/update: one update of a loop, or one of each run of a sweep.",
        "Exponent: p of the least-squares fit y = c x^p in logarithms; 0 where x does not matter, "
        "1 where cost is proportional. At the small end fixed costs flatten the fit.",
        "Devices are fake ones on the host: memory is theirs, time would mean nothing. Leaves that "
        "no axis of which the devices divide stay whole on each.",
    ]
    return Result([Table("exponents", fits), *tables], [], notes)


def make_size(axis: str, value: int) -> Loop:
    """Returns the loop in which one quantity has this value."""
    sizes: dict[str, Any] = {"delay": 32, "width": 256, "batch": 64, axis: value}
    hidden = (sizes["width"], sizes["width"])
    workload = make_workload("mlp", sizes["batch"], hidden=hidden, activation="relu")
    tx = asgd_jax.delayed(optax.sgd(_LEARNING_RATE), sizes["delay"])
    updates = next(one.updates for one in AXES if one.name == axis)
    return make_loop(workload, tx, updates)


def measure_axis(axis: Axis, rounds: int) -> list[TableRow]:
    """Times the sizes of an axis in turns; returns a row a size."""
    loops = {str(value): make_size(axis.name, value) for value in axis.values}
    times = interleave({name: loop.run for name, loop in loops.items()}, rounds, budget=_BUDGET)
    updates = next(one.updates for one in AXES if one.name == axis.name)
    rows = list[TableRow]()
    for name, loop in loops.items():
        seconds = spread(times[name]).median / updates
        rows.append(
            {
                axis.name: int(name),
                "parameters": loop.parameter_bytes // 4,
                "us/update": 1e6 * seconds,
                "updates/s": 1 / seconds,
                "history (bytes)": loop.history_bytes,
                "temp (bytes)": loop.temp_bytes,
            }
        )
    return rows


def fit(axis: str, rows: list[TableRow], columns: tuple[str, ...]) -> list[TableRow]:
    """Returns the exponent of each column against the first one.

    The width's are against the number of parameters, which is what it stands for.
    """
    against = "parameters" if axis == "width" else axis
    return [
        {
            "against": against,
            "quantity": column,
            "exponent": exponent([row[against] for row in rows], [row[column] for row in rows]),
        }
        for column in columns
    ]


def history_on_devices(counts: tuple[int, ...]) -> list[TableRow]:
    """Returns the bytes of the history that a device holds, from the shardings of the state.

    Raises:
      ValueError: when the process with the fake devices fails.
    """
    fake = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(counts)}"}
    with start("growth", environment=fake | {"JAX_PLATFORMS": "cpu"}) as worker:
        return [worker.ask(devices=count) for count in counts]


def history_bytes(devices: int) -> dict[str, int]:
    """Returns the bytes of the ring in all and on the device that holds most."""
    config = default_config()
    config.update(
        model="mlp",
        num_devices=devices,
        shard_history=True,
        num_workers=33,
        delay=32,
        worker_batch_size=8,
    )
    config.model_options.hidden = (256, 256)
    history = set_up(config).state.opt_state.history
    on_device = dict[int, int]()
    for leaf in jax.tree.leaves(history):
        for shard in leaf.addressable_shards:
            on_device[shard.device.id] = on_device.get(shard.device.id, 0) + shard.data.nbytes
    return {
        "devices": devices,
        "history (bytes/device)": max(on_device.values()),
        "history (bytes)": tree_bytes(history),
    }


if __name__ == "__main__":
    serve(lambda request: history_bytes(**request))
