"""Runs a recorded run again: python -m asgd_jax.cluster.replay RUN.

Twice: by the same two programs in the recorded order, which must end with the same bits (on a CPU
of the same kind), and in the simulator's compiled loop, to rounding. Prints how stale the gradients
were and would have been in a simulation with the measured compute times, and the sharpness that the
learning rate can bear under this very trace.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import delays, stability
from asgd_jax.cluster.log import UPDATES_FILE
from asgd_jax.cluster.programs import Pushed, apply_update, make_programs, pull_state
from asgd_jax.cluster.real_run import load_real_config
from asgd_jax.cluster.session import worker_environment
from asgd_jax.cluster.summary import describe_staleness, distance_of, simulate_measured
from asgd_jax.data import make_batch_of
from asgd_jax.training.advance import make_advance
from asgd_jax.training.feed import Feed, open_feed
from asgd_jax.training.folder.checkpoint import last_step, open_checkpoints
from asgd_jax.training.folder.rerun import data_fingerprint, fingerprint
from asgd_jax.training.loop import chunk_bounds
from asgd_jax.training.optimizer import effective_learning_rate
from asgd_jax.training.recorded import RecordedUpdates, num_shards_of, read_updates
from asgd_jax.training.setup import set_up
from asgd_jax.training.state import PyTree, TrainState

# Of a compiled loop's parameters, relative: sums of float32 in another order, over a whole run.
_ROUNDING = 1e-3


class Comparison(NamedTuple):
    """Two sets of parameters: whether all bits are equal, and |x - y| / |x|."""

    equal: bool
    distance: float


def replay_config(config: ConfigDict, trace: Path) -> ConfigDict:
    """Returns the configuration of the simulator that reruns a real run.

    Args:
      config: of the real run.
      trace: its updates.csv.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(delay_distribution="trace", delay_trace=str(trace))
        config.update(max_staleness=None, worker_times=None, staleness_policy="drop")
    return config


def replay_programs(config: ConfigDict, feed: Feed, updates: RecordedUpdates) -> TrainState:
    """Returns the state after the recorded updates, by the two programs of the real run.

    Args:
      config: of the real run.
      feed: its data.
      updates: what it recorded.
    """
    assert feed.samples is not None, "the data of real workers is in memory"
    programs = make_programs(config, feed.facts)
    batch_of = make_batch_of(config.seed, feed.facts.plan, num_shards_of(config))
    images, labels = feed.samples.train_images, feed.samples.train_labels
    last_use = dict(zip(updates.version.tolist(), updates.update.tolist(), strict=True))
    state = programs.init()
    kept = {0: pull_state(state, 0)}
    rows = zip(
        *(column.tolist() for column in (updates.update, updates.version, updates.batch)),
        strict=True,
    )
    for update, version, number in rows:
        pulled, samples = kept[version], batch_of(number)
        pushed: Pushed = jax.device_get(
            programs.gradient(pulled.params, images[samples], labels[samples], np.int32(number))
        )
        state = apply_update(programs, state, pulled, pushed, update - version)
        if last_use[version] == update:
            del kept[version]
        if update + 1 in last_use:
            kept[update + 1] = pull_state(state, update + 1)
    return state


def replay_loop(config: ConfigDict, trace: Path, num_updates: int) -> TrainState:
    """Returns the state after the recorded updates, by the simulator's compiled loop.

    Args:
      config: of the real run.
      trace: its updates.csv.
      num_updates: how many it holds.
    """
    config = replay_config(config, trace)
    setup = set_up(config)
    advance, steps_per_epoch = make_advance(config, setup), setup.feed.facts.plan.steps_per_epoch
    placed = setup.placement.put(setup.state)
    for epoch, start, stop in chunk_bounds(config, steps_per_epoch, 0):
        stop = min(stop, num_updates - epoch * steps_per_epoch)
        if start < stop:
            placed, _ = advance(placed, epoch, start, stop)
    state: TrainState = setup.placement.get(placed)
    return state


def final_params(workdir: Path, config: ConfigDict, feed: Feed) -> PyTree:
    """Returns the parameters that a real run ended with.

    Raises:
      ValueError: where the last checkpoint is not that of the last update.
    """
    found = fingerprint(config) | data_fingerprint(config, feed.facts.plan)
    checkpoints = open_checkpoints(workdir, found, keep=config.keep_checkpoints)
    try:
        restored = checkpoints.restore(make_programs(config, feed.facts).init())
    finally:
        checkpoints.close()
    assert restored is not None, "open_checkpoints found the last one"
    return jax.device_get(restored[0].params)


def compare(first: PyTree, second: PyTree) -> Comparison:
    """Returns how two sets of parameters compare.

    >>> compare({"w": np.float32([3, 4])}, {"w": np.float32([3, 4])})
    Comparison(equal=True, distance=0.0)
    """
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    arrays = [(np.asarray(left), np.asarray(right)) for left, right in pairs]
    equal = all(left.tobytes() == right.tobytes() for left, right in arrays)
    squares = [float(np.sum(np.square(left - right, dtype=np.float64))) for left, right in arrays]
    size = sum(float(np.sum(np.square(left, dtype=np.float64))) for left, _ in arrays)
    return Comparison(equal, float(np.sqrt(sum(squares) / max(size, 1e-300))))


def describe_trace(config: ConfigDict, updates: RecordedUpdates) -> list[str]:
    """Returns the lines on staleness, stability and speed of a recorded run."""
    measured = describe_staleness(updates.staleness)
    simulated = describe_staleness(simulate_measured(updates, config.num_workers))
    distance = distance_of(measured["histogram"], simulated["histogram"])
    lines = [
        "staleness                mean   max   share of 0, 1, 2, ...",
        f"  measured           {_staleness_line(measured)}",
        f"  measured times     {_staleness_line(simulated)}",
        f"  distance of the two (total variation): {distance:.3f}",
    ]
    return [*lines, *_stability_lines(config, updates), _speed_line(updates)]


def _staleness_line(found: dict[str, Any]) -> str:
    total = max(sum(found["histogram"]), 1)
    shares = " ".join(f"{count / total:.3f}" for count in found["histogram"][:8])
    return f"{found['mean']:8.3f} {found['max']:5d}   {shares}"


def _stability_lines(config: ConfigDict, updates: RecordedUpdates) -> list[str]:
    """Sharpness that the rate used can bear: mean square of these delays, and along the trace."""
    rate = effective_learning_rate(config)
    lines = [f"learning rate used: {rate:.4g}"]
    if config.optimizer != "sgd" or config.momentum_kind == "nesterov":
        return [*lines, "  no threshold for this optimizer"]
    method = {"momentum": config.momentum, "kind": config.momentum_kind,
              "dampening": config.dampening}  # fmt: skip
    shares = np.bincount(updates.staleness) / updates.staleness.size
    try:
        largest = stability.max_sharpness(
            rate, delays.categorical(shares), criterion="mean_square", **method
        )
        lines += [f"  it can stay in minima of sharpness up to {largest:.4g} (mean square)"]
        edge = stability.lyapunov_max_learning_rate(updates.staleness, sharpness=1.0, **method)
        lines += [f"  and up to {edge.value / rate:.4g} along this very trace (Lyapunov)"]
    except ValueError as error:
        lines += [f"  no threshold: {error}"]
    return lines


def _speed_line(updates: RecordedUpdates) -> str:
    seconds = max(float(updates.seconds[-1]), 1e-9)
    count = updates.update.size
    return f"{count} updates in {seconds:.1f} s: {count / seconds:.1f} a second"


def replay(workdir: Path) -> bool:
    """Prints what the module says; returns whether both replays agree with the run.

    Raises:
      ValueError: where the folder holds no finished run of real workers.
    """
    config = load_real_config(workdir)
    trace = workdir / UPDATES_FILE
    updates = read_updates(trace)
    print(f"{workdir}: {config.num_workers} workers, {config.model} on {config.dataset}")
    print("\n".join(describe_trace(config, updates)))
    if last_step(workdir) != updates.update.size:
        raise ValueError(
            f"{workdir} has {updates.update.size} updates and its last checkpoint is that of step "
            f"{last_step(workdir)}: only runs that were completed can be compared"
        )
    feed = open_feed(config)
    params = final_params(workdir, config, feed)
    same = compare(params, jax.device_get(replay_programs(config, feed, updates).params))
    print(f"replay by the same programs: {'equal bit by bit' if same.equal else 'NOT EQUAL'}, "
          f"|x - y| / |x| = {same.distance:.3g}")  # fmt: skip
    loop = compare(params, jax.device_get(replay_loop(config, trace, updates.update.size).params))
    fine = loop.distance <= _ROUNDING
    print(f"replay in the compiled loop: {'equal to rounding' if fine else 'NOT EQUAL'}, "
          f"|x - y| / |x| = {loop.distance:.3g}")  # fmt: skip
    return same.equal and fine


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays the run that the command line names; 0 where it agrees, 1 where not, 2 a mistake."""
    from asgd_jax.training.command import exit_code, named_folder, use_compilation_cache

    parser = argparse.ArgumentParser(prog="asgd_jax.cluster.replay", description=__doc__)
    parser.add_argument("run", help="workdir of scripts/train_async.py")
    options = parser.parse_args(arguments)
    # Before JAX has met its devices: sums are to be shared among as many threads as they were.
    os.environ.update(worker_environment())
    use_compilation_cache()
    agrees = False
    with exit_code("replay") as code:
        agrees = replay(named_folder(options.run, "run"))
    return code[0] or int(not agrees)


if __name__ == "__main__":
    sys.exit(main())
