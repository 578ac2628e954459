"""A run on its devices and data, ready for its first update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax.training import mesh as devices
from asgd_jax.training.batch_stats import recalibrate
from asgd_jax.training.config import STREAMED, validate_config
from asgd_jax.training.evaluate import Sums, pad_to_batches, round_up
from asgd_jax.training.feed import Feed, first_inputs, open_feed, plan_of
from asgd_jax.training.placement import Placement, by_worker, jitted, pmapped
from asgd_jax.training.program import Run, build_run, make_model
from asgd_jax.training.recorded import refuse_real_workers
from asgd_jax.training.rounds_step import check_workers, round_sharding
from asgd_jax.training.state import PyTree, TrainState


class Setup(NamedTuple):
    """Data, program, devices and first state of a run."""

    feed: Feed
    run: Run
    mesh: Mesh
    placement: Placement
    state: TrainState


def set_up(config: ConfigDict) -> Setup:
    """Checks the configuration, opens the data and builds program and first state.

    Raises:
      ValueError: one line that names the field, the value and the remedy.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    validate_config(config)
    refuse_real_workers(config)
    make_model(config, num_classes=1)  # a bad name or option is refused before data is read
    mesh = devices.make_mesh(config.num_devices)
    if config.parallelism == "pmap" and jax.process_count() > 1:
        raise ValueError(
            f"parallelism='pmap' is for the devices of one process and this run has "
            f"{jax.process_count()} processes: use parallelism='jit'"
        )
    shared = config.dataset in STREAMED and jax.process_count() > 1
    if config.batch_stats == "recalibrate" and shared:
        raise ValueError(
            "batch_stats='recalibrate' needs all of a batch in every process, and streams give "
            "each its share: use batch_stats='server'"
        )
    workers = config.parallelism == "workers"
    if not workers or shared:
        devices.check_divisible(config.worker_batch_size, mesh.size)
    if workers:
        check_workers(plan_of(config, 1 << 60), mesh.size)
    feed = open_feed(config)
    run = build_run(config, feed.facts, mesh=mesh)
    key = np.asarray(jax.random.PRNGKey(config.seed))
    shapes = jax.eval_shape(run.init, key)
    sharding = (
        round_sharding(shapes, mesh)
        if workers
        else devices.state_sharding(shapes, mesh, shard_history=config.shard_history)
    )
    state = jax.jit(run.init, out_shardings=sharding)(key)
    ways = {"jit": jitted, "workers": by_worker, "pmap": lambda mesh, _: pmapped(mesh)}
    placement = ways[config.parallelism](mesh, sharding)
    return Setup(feed, run, mesh, placement, state)


def make_validation(
    config: ConfigDict, setup: Setup
) -> Callable[[TrainState], tuple[jax.Array, jax.Array]]:
    """Returns `validate(state)`: loss and error over the whole validation set, live parameters."""
    feed, run, mesh = setup.feed, setup.run, setup.mesh
    measure = jax.jit(run.measure, out_shardings=devices.replicated(mesh))
    split = devices.batch_sharding(mesh)

    def params_of(state: TrainState) -> PyTree:  # whole, also where a device has pieces of them
        return jax.device_put(state.params, devices.replicated(mesh))

    def statistics(state: TrainState) -> PyTree:
        live = run.statistics(state)
        if config.batch_stats != "recalibrate" or not jax.tree.leaves(live):
            return live
        inputs = first_inputs(config, feed, config.recalibration_batches)
        return recalibrate(run.model, params_of(state), live, inputs)

    if feed.samples is not None:
        arrays = feed.samples.validation_images, feed.samples.validation_labels
        padded = pad_to_batches(*arrays, config.eval_batch_size, mesh.size)
        batches = jax.device_put(padded, split)
        return lambda state: measure(params_of(state), statistics(state), batches).means()

    def validate(state: TrainState) -> tuple[jax.Array, jax.Array]:
        assert feed.stream is not None, "a feed has samples or a stream"
        batch_size = round_up(config.eval_batch_size, mesh.size)
        params, stats, total = params_of(state), statistics(state), None
        for batch in feed.stream.validation(batch_size):
            one = tuple(
                jax.make_array_from_process_local_data(split, array[None]) for array in batch
            )
            sums = measure(params, stats, one)
            total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
        assert isinstance(total, Sums), "a validation set has samples"
        return total.means()

    return validate
