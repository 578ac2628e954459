"""What a configuration does about staleness: stages of a pipeline, prediction, compensation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from asgd_jax import compensate, delays, predict
from asgd_jax.models.stages import layer_stages
from asgd_jax.predict import Predict

PREDICTIONS = ("none", "optimizer", "last_update")


def adam_direction(config: ConfigDict) -> optax.GradientTransformation:
    """Returns what a configuration's Adam, or NAdam, does to gradients."""
    nesterov = config.optimizer == "nadamw"
    return optax.scale_by_adam(config.adam_b1, config.adam_b2, nesterov=nesterov)


def _gap_aware(config: ConfigDict, rate: Any) -> optax.GradientTransformation:
    if config.optimizer == "sgd":
        return compensate.gap_aware(rate, momentum=config.momentum, dampening=config.dampening)
    return compensate.gap_aware(rate, direction=adam_direction(config))


# Of a configuration and the learning rate under the delay.
COMPENSATIONS: dict[str, Callable[[ConfigDict, Any], optax.GradientTransformation]] = {
    "staleness_scaling": lambda config, rate: compensate.staleness_scaling(),
    # As many gradients are in flight as updates pass in a round.
    "delay_adaptive": lambda config, rate: compensate.delay_adaptive(config.delay + 1),
    "power_scaling": lambda config, rate: compensate.power_scaling(),
    "dc_asgd": lambda config, rate: compensate.dc_asgd(),
    "dc_asgd_adaptive": lambda config, rate: compensate.dc_asgd(2.0, adaptive=True),
    "dc_ema": lambda config, rate: compensate.dc_ema(),
    "gap_aware": _gap_aware,
}

_CONFLICTS = (
    ("delay_distribution", "pipeline", "momentum_kind", "shifted", "stages have no worker each"),
    ("delay_distribution", "pipeline", "batch_stats", "worker", "stages have no worker each"),
    ("delay_distribution", "pipeline", "parallelism", "workers", "a worker has all stages there"),
    ("predict", "optimizer", "parallelism", "workers", "rounds do not predict"),
    ("predict", "last_update", "parallelism", "workers", "rounds do not predict"),
    ("delay_distribution", "measured", "predict", "optimizer", "real workers pull what there is"),
    ("delay_distribution", "measured", "predict", "last_update", "real workers pull what there is"),
    ("predict", "optimizer", "momentum_kind", "shifted", "no prediction of it is known"),
    ("predict", "optimizer", "optimizer", "nadamw", "no prediction of it is known"),
    ("predict", "optimizer", "dampening", True, "its momentum is read as the undamped one"),
    ("predict", "optimizer", "weight_decay_on", "kernels", "it predicts one decay for all leaves"),
)


def is_pipeline(config: ConfigDict) -> bool:
    """Whether leaves have delays of their own, those of a pipeline's stages."""
    return bool(config.delay_distribution == "pipeline" and config.delay > 0)


def pipeline_delays(
    config: ConfigDict, model: nn.Module, image_shape: tuple[int, ...]
) -> Callable[[tuple[Any, ...]], int]:
    """Returns the delay of every leaf when the model is a pipeline of `config.delay` + 1 stages.

    Stage l of S is S - 1 - l updates old (`delays.pipeline`); `layer_stages` says where it is cut.

    Raises:
      ValueError: when a stage would be left without parameters.
    """
    stages = layer_stages(model, image_shape, config.delay + 1)
    ages = delays.pipeline(config.delay + 1)
    return lambda path: ages[stages[path[0].key]]


def make_predictor(config: ConfigDict, multiplier: optax.Schedule) -> Predict | None:
    """Returns what `delayed(predict=)` takes.

    Args:
      config: `predict` is "none"; "optimizer" for the prediction of its optimizer; "last_update".
      multiplier: the regime of the learning rate, read at the server's count of updates: a worker
        looks ahead with the rate of the moment.
    """
    if config.predict == "none":
        return None
    if config.predict == "last_update":
        return predict.last_update()

    def foresee(params: Any, inner_state: Any, staleness: Any) -> Any:
        rate = inner_state.hyperparams["learning_rate"] * multiplier(inner_state.count)
        if config.optimizer == "sgd":
            nesterov = config.momentum_kind == "nesterov"
            ahead = predict.momentum(rate, decay=config.momentum, nesterov=nesterov)
        else:
            decay = config.weight_decay if config.optimizer == "adamw" else 0.0
            ahead = predict.adamw(rate, b1=config.adam_b1, b2=config.adam_b2, weight_decay=decay)
        return ahead(params, inner_state, staleness)

    return foresee


def refuse_combinations(config: ConfigDict) -> None:
    """Refuses fields that contradict one another.

    Raises:
      ValueError: one line that names both and the reason.
    """
    for field, value, other, refused, reason in _CONFLICTS:
        if config[field] == value and config[other] == refused:
            raise ValueError(f"{other}={refused!r} does not go with {field}={value!r}: {reason}")
    if config.predict == "optimizer" and config.optimizer == "sgd" and not config.momentum:
        raise ValueError("predict='optimizer' looks ahead with momentum: set momentum above 0")
