"""The optimizer, the delay and the learning rate that a configuration describes."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from asgd_jax import delays, stability
from asgd_jax.predict import remember_update
from asgd_jax.training.recorded import read_updates
from asgd_jax.training.staleness import COMPENSATIONS, adam_direction, make_predictor
from asgd_jax.transforms import delayed, momentum_of
from asgd_jax.transforms.leaf_delays import LeafDelays

# In numbers of workers; fewer than one gradient in a thousand is older (random: one in e^7).
_LONGEST_STALENESS = {"random": 7, "normal": 2}


def make_delay_process(config: ConfigDict, num_updates: int) -> delays.DelayProcess:
    """Returns the staleness of a run of `num_updates` updates.

    `config.delay` is the mean staleness tau, and N = tau + 1 the number of gradients in flight:
    constant tau; uniform on {1, ..., 2 tau - 1}; normal of mean tau and `delay_std`; workers: a
    simulation of N workers under `worker_schedule`, whose gradients count as no older than 7 N
    updates (2 N under "normal"), so that the history is as deep however long the run is; trace:
    the integers of `delay_trace`, or the column of the updates.csv of real workers.

    Raises:
      ValueError: for a trace file that cannot be read, holds anything but staleness, or has a mean
        staleness that is not about `delay`.
    """
    delay, distribution = config.delay, config.delay_distribution
    if distribution == "trace":
        return _recorded(config.delay_trace, delay)
    if distribution == "measured":
        raise ValueError(
            "delay_distribution='measured' is that of real workers: run scripts/train_async.py, or "
            "replay its updates.csv by delay_distribution='trace' and delay_trace=FILE"
        )
    if distribution in ("constant", "pipeline") or delay == 0:  # of a pipeline the first stage's
        return delays.constant(delay)
    if distribution == "uniform":
        return delays.uniform(1, 2 * delay - 1)
    if distribution == "normal":
        return delays.discretized_normal(delay, config.delay_std)
    limit = _longest_staleness(config)
    trace = np.minimum(_simulated(config, num_updates), limit)
    return delays.from_trace(trace, max_delay=limit)


def count_clipped(config: ConfigDict, num_updates: int) -> int:
    """Returns how many of the first gradients were older than `make_delay_process` lets them be."""
    if config.delay_distribution != "workers" or config.delay == 0:
        return 0
    return int(np.sum(_simulated(config, num_updates) > _longest_staleness(config)))


def _simulated(config: ConfigDict, num_updates: int) -> np.ndarray:
    return delays.simulate_workers(
        config.delay + 1, num_updates, schedule=config.worker_schedule, seed=config.seed
    )


def _longest_staleness(config: ConfigDict) -> int:
    return _LONGEST_STALENESS[config.worker_schedule] * (config.delay + 1)


def _recorded(file: str, delay: int) -> delays.DelayProcess:
    if Path(file).suffix == ".csv":  # of real workers: their number is the configuration's
        return delays.from_trace(read_updates(file).staleness)
    trace = _read_trace(file)
    try:
        process = delays.from_trace(trace)
    except ValueError as error:
        raise ValueError(f"delay_trace={file!r}: {error}") from error
    mean = trace.mean()
    if not delay / 2 <= mean <= 2 * delay:
        raise ValueError(
            f"delay_trace={file!r} has a mean staleness of {mean:.3g} and delay={delay}, which "
            f"batches and learning_rate_rule go by: set delay={round(mean)}"
        )
    return process


def _read_trace(file: str) -> np.ndarray:
    try:
        if Path(file).suffix == ".npy":
            return np.load(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, whose trace is refused
            return np.loadtxt(file, dtype=np.int64, ndmin=1)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"delay_trace={file!r} cannot be read ({reason}): pass a .npy file or a text file "
            "with one integer a line"
        ) from error


def effective_learning_rate(config: ConfigDict) -> float:
    """Returns the learning rate under the delay: `learning_rate` after `learning_rate_rule`.

    The rules are those without momentum (eq. 8 of the paper), whatever the momentum of the run, so
    that arms which differ in momentum share a learning rate.

    >>> from asgd_jax.training.config import default_config
    >>> config = default_config()
    >>> config.update(learning_rate=0.32, learning_rate_rule="inverse", delay=31)
    >>> round(effective_learning_rate(config), 5)
    0.01032
    """
    return stability.rescale_learning_rate(
        config.learning_rate, config.delay, rule=config.learning_rate_rule
    )


def make_multiplier(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the regime: what the learning rate is multiplied by at each update.

    A linear ramp from `warmup_from` to 1 over `warmup_epochs`, times `decay_factor` from each of
    `decay_epochs` on. It multiplies whatever learning rate was asked for and replaces none.
    """
    ramp = optax.constant_schedule(1.0)
    if config.warmup_epochs:
        warmup_steps = config.warmup_epochs * steps_per_epoch
        ramp = optax.linear_schedule(config.warmup_from, 1.0, warmup_steps)
    # What is beyond int32 no count of updates reaches; two decays may round to one update.
    steps = [round(epoch * steps_per_epoch) for epoch in config.decay_epochs]
    scales = {step: config.decay_factor ** steps.count(step) for step in steps if step < 2**31}
    decays = optax.piecewise_constant_schedule(1.0, scales)
    return lambda count: ramp(count) * decays(count)


class Values(NamedTuple):
    """What of a configuration may differ between runs of one compiled program; floats or arrays."""

    learning_rate: Any  # under the delay
    momentum: Any
    seed: Any


def values_of(config: ConfigDict) -> Values:
    """Returns the values of a configuration."""
    return Values(effective_learning_rate(config), config.momentum, config.seed)


def make_optimizer(
    config: ConfigDict,
    process: delays.DelayProcess,
    steps_per_epoch: int,
    values: Values | None = None,
    *,
    leaf_delays: LeafDelays | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns `delayed` around the server of `make_server`, with the same arguments.

    `leaf_delays` take the place of the process where leaves have delays of their own.
    """
    values = values_of(config) if values is None else values
    return delayed(
        make_server(config, process, steps_per_epoch, values),
        process if leaf_delays is None else leaf_delays,
        history_dtype=config.history_dtype,
        seed=values.seed,
        predict=make_predictor(config, make_multiplier(config, steps_per_epoch)),
    )


def make_server(
    config: ConfigDict,
    process: delays.DelayProcess,
    steps_per_epoch: int,
    values: Values | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the server: clipping, compensation, weight decay, momentum and learning rate.

    Gradients are stale; clipping, weight decay (`add_decayed_weights`) and the schedule act on the
    server, with live parameters and the server's update count. The learning rate is a value of the
    state (`optax.inject_hyperparams`): a new one recompiles nothing.

    Args:
      config: whether there is momentum, of which kind, and all that is not in `values`.
      process: the staleness.
      steps_per_epoch: to count the regime's epochs in.
      values: to use in place of the configuration's own; may be traced.
    """
    values = values_of(config) if values is None else values

    def server(learning_rate: float) -> optax.GradientTransformation:
        decay = []
        if config.weight_decay:
            mask = kernel_mask if config.weight_decay_on == "kernels" else None
            decay = [optax.add_decayed_weights(config.weight_decay, mask)]
        clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
        direction = _direction(config, process, values.momentum)
        # AdamW decouples the decay from the preconditioner; elsewhere it is part of the gradient.
        decoupled = config.optimizer in ("adamw", "nadamw")
        method = config.compensate
        compensation = [] if method == "none" else [COMPENSATIONS[method](config, learning_rate)]
        remembered = [remember_update()] if config.predict == "last_update" else []
        coupled = [] if decoupled else decay
        # Gap-Aware shrinks an L2 term with the rest of its gradient.
        first, then = (coupled, compensation) if method == "gap_aware" else (compensation, coupled)
        return optax.chain(
            *clip,
            *first,
            *then,
            direction,
            *(decay if decoupled else []),
            optax.scale_by_schedule(make_multiplier(config, steps_per_epoch)),
            optax.scale_by_learning_rate(learning_rate),
            *remembered,
        )

    return optax.inject_hyperparams(server)(learning_rate=values.learning_rate)


def _direction(
    config: ConfigDict, process: delays.DelayProcess, momentum: float | jax.Array
) -> optax.GradientTransformation:
    if config.optimizer != "sgd":
        return adam_direction(config)
    return momentum_of(
        momentum if config.momentum else 0.0,
        process,
        kind=config.momentum_kind,
        dampening=config.dampening,
    )


def kernel_mask(params: Any) -> Any:
    """True for the kernels of convolutions and dense layers, False for biases and BatchNorm.

    >>> kernel_mask({"kernel": 1, "bias": 2})
    {'bias': False, 'kernel': True}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )
