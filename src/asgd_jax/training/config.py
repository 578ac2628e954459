"""The configuration of a run: every field with its default, and the checks that need no data."""

import difflib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from asgd_jax.data.batches import plan_batches
from asgd_jax.training.batch_stats import MODES as BATCH_STATS_MODES
from asgd_jax.training.staleness import COMPENSATIONS, PREDICTIONS, refuse_combinations

STREAMED = ("imagenet2012",)  # data sets that are read from disk while training
_IN_MEMORY_ONLY = ("normalize", "num_train", "num_validation", "augment")
_CHOICES = {
    "delay_distribution": (
        "constant",
        "uniform",
        "normal",
        "workers",
        "trace",
        "pipeline",
        "measured",
    ),
    "learning_rate_rule": ("none", "inverse", "exact", "sqrt"),
    "momentum_kind": ("heavy_ball", "nesterov", "shifted"),
    "optimizer": ("sgd", "adam", "adamw", "nadamw"),
    "predict": PREDICTIONS,
    "compensate": ("none", *COMPENSATIONS),
    "weight_decay_on": ("all", "kernels"),
    "worker_schedule": ("random", "normal"),
    "batch_stats": BATCH_STATS_MODES,
    "worker_data": ("whole", "shard"),
    "staleness_policy": ("drop", "wait"),
    "parallelism": ("jit", "pmap", "workers"),
}
_POSITIVE = (
    "learning_rate", "epochs", "eval_every_epochs", "eval_batch_size", "divergence_loss", "width",
    "delay_std", "keep_checkpoints", "image_size", "recalibration_batches", "coordinator_timeout",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_epochs", "warmup_from", "weight_decay", "decay_factor", "checkpoint_every_epochs",
)  # fmt: skip
_POSITIVE_OR_NONE = (
    "clip_norm", "log_every_steps", "num_train", "num_validation", "checkpoint_every_steps",
)  # fmt: skip
_LARGEST = 2**31 - 1  # steps and samples are counted in int32


def default_config() -> ConfigDict:
    """Returns a small CNN on scikit-learn's digits, 32 workers, no delay; configs start from it.

    A field set to None takes the default that its comment names.

    >>> default_config().num_workers
    32
    """
    config = ConfigDict()
    config.seed = 0  # of the parameters, the batch order and the delays
    # Data.
    # digits, mnist, cifar10, cifar100, python_topics, tiny_shakespeare, imagenet2012 (streamed)
    config.dataset = "digits"
    config.image_size = 224  # pixels of a side, of streamed data sets; the others have their own
    config.data_dir = placeholder(str)  # folder or gs:// address; None: TFDS_DATA_DIR
    # The next four are not for streamed data sets, which are augmented while they are decoded.
    config.normalize = "own"  # own: each channel's mean and std; half: (x - .5) / .5
    config.num_train = placeholder(int)  # None: all
    config.num_validation = placeholder(int)
    config.augment = False  # pad-4 random crop and flip
    # Model.
    config.model = "digits_cnn"
    config.width = 1.0  # multiplier of channel counts
    config.dtype = "float32"  # of the computation
    config.conv_impl = "auto"
    config.model_options = ConfigDict(convert_dict=True)  # further arguments of the model
    config.batch_stats = "server"  # of BatchNorm: server, worker, recalibrate
    config.recalibration_batches = 16
    # Workers and delay.
    config.num_workers = 32
    config.worker_batch_size = 64  # samples of one gradient
    config.delay = 0  # updates between pull and push; (delay + 1) divides num_workers
    # constant, uniform, normal, workers, trace; pipeline: delay + 1 stages, the first one's is
    # `delay`; measured: what real workers do
    config.delay_distribution = "constant"
    config.delay_std = 1.0  # of the normal distribution, in updates
    config.worker_schedule = "random"  # of delay_distribution=workers: random or normal
    # .npy or text file of staleness, one entry an update; or the updates.csv of real workers, which
    # is replayed with its batches.
    config.delay_trace = placeholder(str)
    _add_real_workers(config)
    config.history_dtype = placeholder(str)  # None: that of the parameters
    config.predict = "none"  # what workers pull: none, optimizer (its prediction), last_update
    # What the server does to stale gradients: none, or a method of `asgd_jax.compensate`.
    config.compensate = "none"
    # Optimization. learning_rate is that of the equivalent run without delay.
    config.optimizer = "sgd"  # sgd, adam, adamw, nadamw
    config.learning_rate = 0.1
    config.learning_rate_rule = "none"  # how the delay changes it: none, inverse, exact, sqrt
    config.warmup_epochs = 0.0  # linear ramp of the learning rate ...
    config.warmup_from = 0.0  # ... from this fraction of it
    config.decay_epochs = ()  # where the learning rate is multiplied by decay_factor
    config.decay_factor = 0.1
    config.momentum = 0.0
    config.momentum_kind = "heavy_ball"  # heavy_ball, nesterov, shifted
    config.dampening = False  # scale gradients by 1 - momentum
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.weight_decay = 0.0  # on the live parameters
    config.weight_decay_on = "all"  # all, or kernels (of convolutions and dense layers)
    config.clip_norm = placeholder(float)  # global gradient norm, on the server
    config.label_smoothing = 0.0
    _add_devices(config)
    # The run.
    config.epochs = 3
    config.log_every_steps = placeholder(int)  # None: once an epoch
    config.eval_every_epochs = 1
    config.eval_batch_size = 500
    config.divergence_loss = 1e3  # a train loss above it (or not finite) ends the run
    # Checkpoints, written where a row is: at the first one when due, and at the end.
    config.checkpoint_every_epochs = 1  # 0: only at the end
    config.checkpoint_every_steps = placeholder(int)  # besides; None: only by epochs
    config.keep_checkpoints = 3  # the last ones; the one of least validation error stays too
    return config


def _add_real_workers(config: ConfigDict) -> None:
    """What only real workers heed (scripts/train_async.py); a replay heeds worker_data as well."""
    config.worker_data = "whole"  # whole, shard: what a worker takes its batches from
    config.max_staleness = placeholder(int)  # in updates; None: no limit
    config.staleness_policy = "drop"  # beyond max_staleness: drop, wait
    # What a gradient takes at least, in seconds: "constant .05", "lognormal .05 .5" (mean, sigma),
    # "straggler .05 10" (worker 0 takes 10 times as long). None: no more than it takes.
    config.worker_times = placeholder(str)


def _add_devices(config: ConfigDict) -> None:
    config.parallelism = "jit"  # jit over a mesh, pmap, or workers: a worker a device
    config.num_devices = placeholder(int)  # None: all
    config.shard_history = False  # each device holds its part of every slot (jit only)
    config.multihost = False  # join the processes of several hosts
    config.coordinator = placeholder(str)  # HOST:PORT; None where JAX knows the cluster
    config.coordinator_timeout = 300  # seconds that the processes wait for one another
    config.num_processes = placeholder(int)
    config.process_id = placeholder(int)


def check_field(config: ConfigDict, path: str) -> None:
    """Refuses the name of a field that a configuration lacks, and names the nearest one.

    Raises:
      ValueError: one line with both names.

    >>> check_field(default_config(), "lr")
    Traceback (most recent call last):
    ...
    ValueError: unknown field lr: did you mean learning_rate?
    """
    node: Any = config
    for name in path.split("."):
        known = list(node) if isinstance(node, ConfigDict) else []
        if name not in known:
            initials = {"".join(word[0] for word in field.split("_")): field for field in known}
            near = [initials[name]] if name in initials else difflib.get_close_matches(name, known)
            meant = f"did you mean {near[0]}?" if near else "default_config lists all fields"
            raise ValueError(f"unknown field {path}: {meant}")
        node = node[name]


def pick_arm(arms: Mapping[str, dict[str, Any]], name: str, config_name: str) -> dict[str, Any]:
    """Returns what an arm changes in the configuration that all arms of a file share.

    Args:
      arms: field -> value, by arm.
      name: of the arm.
      config_name: of the config file, for the message.

    Returns:
      A dict of its own, for `ConfigDict.update`.

    Raises:
      ValueError: for an unknown arm, listing the known ones.

    >>> pick_arm({"ssgd": {"delay": 0}, "asgd": {"delay": 31}}, "asgd", "mnist_cnn")
    {'delay': 31}
    >>> pick_arm({"ssgd": {"delay": 0}}, "sgd", "mnist_cnn")
    Traceback (most recent call last):
    ...
    ValueError: unknown arm 'sgd' of mnist_cnn: use one of ssgd
    """
    if name not in arms:
        raise ValueError(f"unknown arm {name!r} of {config_name}: use one of {', '.join(arms)}")
    return dict(arms[name])


def validate_config(config: ConfigDict) -> None:
    """Refuses what can be refused before data is read or a folder made.

    Raises:
      ValueError: one line that names the field, its value and what to use instead.

    >>> config = default_config()
    >>> config.delay = 30
    >>> validate_config(config)
    Traceback (most recent call last):
    ...
    ValueError: delay=30 with num_workers=32: delay + 1 must divide num_workers; ...
    """
    defaults = default_config()
    _fields(config, defaults)
    _refuse_unused(config, defaults)
    for field, known in _CHOICES.items():
        if config[field] not in known:
            raise ValueError(f"unknown {field}={config[field]!r}: use one of {', '.join(known)}")
    _refuse_parallelism(config)
    plan_batches(
        1 << 60,
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )
    _number(config, "seed", at_least=0, below=2**32)  # PRNGKey drops the bits above
    for field in _POSITIVE:
        _number(config, field, above=0)
    for field in _NOT_NEGATIVE:
        _number(config, field, at_least=0)
    for field in ("momentum", "label_smoothing", "adam_b1", "adam_b2"):
        _number(config, field, at_least=0, below=1)
    for field in _POSITIVE_OR_NONE:
        if config[field] is not None:
            _number(config, field, above=0)
    _increasing(config, "decay_epochs")
    if config.delay_distribution == "trace" and not config.delay_trace:
        raise ValueError("delay_distribution='trace' needs delay_trace=FILE with the staleness")
    if config.optimizer != "sgd" and config.momentum:
        raise ValueError(
            f"momentum={config.momentum} has no meaning for optimizer={config.optimizer!r}: "
            "use optimizer='sgd' or momentum=0"
        )
    refuse_combinations(config)
    _dtype(config, "dtype")
    if config.history_dtype is not None:
        _dtype(config, "history_dtype")


def _fields(config: ConfigDict, known: ConfigDict) -> None:
    for field, value in config.items():
        check_field(known, field)
        if isinstance(value, int) and value > _LARGEST and field != "seed":
            raise ValueError(f"{field}={value} is too large: at most {_LARGEST}")
    for field in known:
        if field not in config:
            raise ValueError(f"the configuration has no field {field}: start from default_config()")


def _refuse_unused(config: ConfigDict, defaults: ConfigDict) -> None:
    """Refuses a field that has been changed and that this data, or optimizer, does not heed."""
    streamed = config.dataset in STREAMED
    for field in _IN_MEMORY_ONLY if streamed else ("image_size",):
        if config[field] != defaults[field]:
            kind = "streamed" if streamed else "in memory"
            raise ValueError(
                f"{field}={config[field]!r} has no meaning for dataset={config.dataset!r}, which "
                f"is {kind}: leave it at {defaults[field]!r}"
            )
    for field in ("adam_b1", "adam_b2"):
        if config.optimizer == "sgd" and config[field] != defaults[field]:
            raise ValueError(
                f"{field}={config[field]!r} has no meaning for optimizer='sgd': leave it at "
                f"{defaults[field]!r}"
            )


def _refuse_parallelism(config: ConfigDict) -> None:
    """Refuses what the way of using the devices cannot do."""
    if config.parallelism == "pmap" and config.shard_history:
        raise ValueError("shard_history=True needs parallelism='jit': pmap keeps whole replicas")
    if config.parallelism == "workers":
        for field in ("shard_history", "history_dtype"):
            if config[field]:
                raise ValueError(
                    f"{field}={config[field]!r} has no meaning for parallelism='workers', where "
                    "each device has its part of every version: leave it out"
                )


def _number(
    config: ConfigDict,
    field: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    value: Any = config[field]
    number = isinstance(value, (int, float)) and (isinstance(value, int) or math.isfinite(value))
    if not (number and value > above and at_least <= value < below):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), (">=", at_least), ("<", below))
            if math.isfinite(bound)
        ]
        raise ValueError(f"{field} must be a number {' and '.join(bounds)}, got {value!r}")


def _increasing(config: ConfigDict, field: str) -> None:
    values = tuple(config[field])
    numbers = all(isinstance(value, (int, float)) and 0 <= value <= _LARGEST for value in values)
    if not (numbers and all(left < right for left, right in itertools.pairwise(values))):
        raise ValueError(f"{field} must be increasing numbers in 0, ..., {_LARGEST}, got {values}")


def _dtype(config: ConfigDict, field: str) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(config[field]), jnp.floating)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses what looks like a list of fields
        floating = False
    if not floating:
        raise ValueError(f"{field}={config[field]!r} is no floating-point dtype: use float32")
