"""Everything that a configuration determines, before the first update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax import models
from asgd_jax.data import BatchPlan
from asgd_jax.delays import DelayProcess
from asgd_jax.training import mesh as devices
from asgd_jax.training import optimizer
from asgd_jax.training.batch_stats import BatchStatsChains, make_chains, recalibrate
from asgd_jax.training.config import STREAMED, validate_config
from asgd_jax.training.feed import Feed, open_in_memory
from asgd_jax.training.state import PyTree, TrainState, init_state
from asgd_jax.training.step import Preprocess, TrainStep, make_train_step
from asgd_jax.training.streamed_feed import open_streamed


class Setup(NamedTuple):
    """Data, model, optimizer, devices and first state of a run.

    Under `parallelism="pmap"` the leaves of `state` have a leading axis of devices.
    """

    feed: Feed
    process: DelayProcess
    model: nn.Module
    tx: optax.GradientTransformationExtraArgs
    chains: BatchStatsChains
    mesh: Mesh
    train_step: TrainStep
    state: TrainState


class Program(NamedTuple):
    """What a configuration computes, without data, devices or a state."""

    process: DelayProcess
    model: nn.Module
    tx: optax.GradientTransformationExtraArgs
    chains: BatchStatsChains
    train_step: TrainStep


def build_program(
    config: ConfigDict,
    plan: BatchPlan,
    num_classes: int,
    preprocess: Preprocess,
    mesh: Mesh | None = None,
) -> Program:
    """Returns delay, model, optimizer and train step of a configuration; `mesh` shares the step."""
    model = make_model(config, num_classes)
    process = optimizer.make_delay_process(config, plan.steps_per_epoch * config.epochs)
    tx = optimizer.make_optimizer(config, process, plan.steps_per_epoch)
    chains = make_chains(config.batch_stats, process.max_delay)
    train_step = make_train_step(
        model,
        tx,
        preprocess,
        config.label_smoothing,
        chains=chains,
        axis_name=devices.AXIS if config.parallelism == "pmap" else None,
        mesh=mesh if config.parallelism == "jit" else None,
    )
    return Program(process, model, tx, chains, train_step)


def set_up(config: ConfigDict) -> Setup:
    """Checks the configuration, opens the data and builds model, optimizer, step and first state.

    Raises:
      ValueError: one line that names the field, the value and the remedy.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    validate_config(config)
    make_model(config, num_classes=1)  # a bad name or option is refused before data is read
    mesh = devices.make_mesh(config.num_devices)
    if config.parallelism == "pmap" and jax.process_count() > 1:
        raise ValueError(
            f"parallelism='pmap' is for the devices of one process and this run has "
            f"{jax.process_count()} processes: use parallelism='jit'"
        )
    devices.check_divisible(config.worker_batch_size, mesh.size)
    feed = open_streamed(config) if config.dataset in STREAMED else open_in_memory(config)
    program = build_program(config, feed.plan, feed.num_classes, feed.preprocess, mesh)
    state = init_state(
        program.model,
        program.tx,
        feed.image_shape,
        config.seed,
        keep_stats=program.chains.init,
        sharding_of=lambda shapes: devices.state_sharding(
            shapes, mesh, shard_history=config.shard_history
        ),
    )
    if config.parallelism == "pmap":
        state = devices.put_replicas(state, mesh)
    return Setup(
        feed=feed,
        process=program.process,
        model=program.model,
        tx=program.tx,
        chains=program.chains,
        mesh=mesh,
        train_step=program.train_step,
        state=state,
    )


def server_state(config: ConfigDict, state: TrainState) -> TrainState:
    """Returns the state without pmap's axis of devices: its batch statistics are averaged."""
    if config.parallelism != "pmap":
        return state
    stats = jax.tree.map(lambda leaf: leaf.mean(axis=0), state.batch_stats)
    return jax.tree.map(lambda leaf: leaf[0], state)._replace(batch_stats=stats)


def make_validation(
    config: ConfigDict, setup: Setup
) -> Callable[[TrainState], tuple[jax.Array, jax.Array]]:
    """Returns `validate(state)`: loss and error over the whole validation set, live parameters."""
    evaluate = setup.feed.make_evaluate(setup.model, setup.mesh)

    def statistics(state: TrainState) -> PyTree:
        live = setup.chains.live(state.batch_stats, state.step)
        if config.batch_stats != "recalibrate" or not jax.tree.leaves(live):
            return live
        batches = setup.feed.inputs(config.recalibration_batches)
        return recalibrate(setup.model, state.params, live, batches)

    def validate(state: TrainState) -> tuple[jax.Array, jax.Array]:
        state = server_state(config, state)
        return evaluate(state.params, statistics(state))

    return validate


def make_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """Returns the model of a configuration."""
    options: dict[str, Any] = config.model_options.to_dict()
    return models.create(
        config.model,
        num_classes=num_classes,
        width=config.width,
        dtype=config.dtype,
        conv_impl=config.conv_impl,
        **options,
    )
