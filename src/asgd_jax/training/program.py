"""A configuration turned into pure functions: `Run(init, advance, measure)`.

Whoever drives a run (`loop`, `sweep`) compiles these three; nothing here reads files or data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax import data, models
from asgd_jax.delays import DelayProcess
from asgd_jax.training import optimizer
from asgd_jax.training.batch_stats import make_chains
from asgd_jax.training.evaluate import Sums, make_measure
from asgd_jax.training.mesh import AXIS, make_mesh
from asgd_jax.training.recorded import make_number_of
from asgd_jax.training.rounds_step import make_round_step
from asgd_jax.training.staleness import is_pipeline, pipeline_delays
from asgd_jax.training.state import PyTree, TrainState, make_init
from asgd_jax.training.step import Preprocess, make_train_step
from asgd_jax.transforms import stale_params


class DataSpec(NamedTuple):
    """What a run must know of its data set.

    Attributes:
      plan: batch arithmetic of an epoch.
      num_classes: number of labels.
      image_shape: (height, width, channels) of the model's input, (characters,) of text.
      preprocess: `preprocess(key, raw images)`: augmentation and normalisation, on the device.
      normalize: `normalize(raw images)`: normalisation alone, for evaluation.
    """

    plan: data.BatchPlan
    num_classes: int
    image_shape: tuple[int, ...]
    preprocess: Preprocess
    normalize: Callable[[jax.Array], jax.Array]


class Run(NamedTuple):
    """What a configuration computes, without data, devices or a state.

    Attributes:
      process: the staleness.
      model: a Linen module.
      init: `init(key, params=None) -> TrainState` before the first update; given parameters take
        the place of the key's and fill the history.
      advance: `advance(state, batch) -> (state, metrics)`: one update, of a `Batch` to
        `StepMetrics`; under `parallelism="workers"` a round, of a `RoundBatch` to `RoundMetrics`.
      stale: `stale(state)`: the parameters that the next gradient is taken at.
      statistics: `statistics(state)`: BatchNorm's running statistics for evaluation.
      measure: `measure(params, statistics, batches) -> Sums`: sums of loss and errors.
    """

    process: DelayProcess
    model: nn.Module
    init: Callable[..., TrainState]
    advance: Callable[[TrainState, Any], tuple[TrainState, Any]]
    stale: Callable[[TrainState], PyTree]
    statistics: Callable[[TrainState], PyTree]
    measure: Callable[[PyTree, PyTree, tuple[jax.Array, jax.Array]], Sums]


def build_run(
    config: ConfigDict,
    facts: DataSpec,
    *,
    process: DelayProcess | None = None,
    values: optimizer.Values | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """Returns the run of a configuration, checked by `validate_config` before.

    Args:
      config: see `default_config`.
      facts: of its data set.
      process: the staleness, if not what the configuration says.
      values: learning rate and momentum, if not the configuration's; may be traced.
      mesh: devices that share every update under `parallelism="jit"`.
    """
    if process is None:
        num_updates = facts.plan.steps_per_epoch * config.epochs
        process = optimizer.make_delay_process(config, num_updates)
    model = make_model(config, facts.num_classes)
    chains = make_chains(config.batch_stats, process.max_delay)
    arguments = config, process, facts.plan.steps_per_epoch, values
    init_optimizer: Callable[[PyTree], Any]
    advance: Callable[..., Any]
    stale: Callable[[TrainState], PyTree]
    if config.parallelism == "workers":
        init_optimizer, advance, stale = make_round_step(
            model,
            optimizer.make_server(*arguments),
            process,
            facts.plan,
            facts.preprocess,
            config.label_smoothing,
            chains=chains,
            mesh=make_mesh(config.num_devices) if mesh is None else mesh,
            divergence_loss=config.divergence_loss,
            number_of=make_number_of(config),
        )
    else:
        leaf_delays = None
        if is_pipeline(config):
            leaf_delays = pipeline_delays(config, model, facts.image_shape)
        tx = optimizer.make_optimizer(*arguments, leaf_delays=leaf_delays)
        init_optimizer, stale = tx.init, _stale_of
        advance = make_train_step(
            model,
            tx,
            facts.preprocess,
            config.label_smoothing,
            chains=chains,
            axis_name=AXIS if config.parallelism == "pmap" else None,
            mesh=mesh if config.parallelism == "jit" else None,
            number_of=make_number_of(config),
        )

    def init(key: jax.Array, params: PyTree | None = None) -> TrainState:
        state = make_init(model, init_optimizer, facts.image_shape, chains.init)(key)
        if params is None:
            return state
        return state._replace(params=params, opt_state=init_optimizer(params))

    return Run(
        process=process,
        model=model,
        init=init,
        advance=advance,
        stale=stale,
        statistics=lambda state: chains.live(state.batch_stats, state.step),
        measure=make_measure(model, facts.normalize),
    )


def _stale_of(state: TrainState) -> PyTree:
    return stale_params(state.opt_state, state.params)


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


def shape_of_params(config: ConfigDict, facts: DataSpec) -> PyTree:
    """Returns the shapes of a configuration's parameters, without computing them."""
    model, image = make_model(config, facts.num_classes), jnp.zeros((1, *facts.image_shape))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return variables["params"]
