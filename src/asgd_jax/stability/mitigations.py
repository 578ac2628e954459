"""What the command line says of pipelines and of what is done against staleness."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax import compensate, predict
from asgd_jax.delays import pipeline
from asgd_jax.stability.arguments import Delay
from asgd_jax.stability.linearize import OptimizerOptions, optimizer_max_learning_rate
from asgd_jax.stability.rules import mean_delay
from asgd_jax.stability.stages import stages_max_learning_rate
from asgd_jax.stability.thresholds import max_learning_rate
from asgd_jax.transforms import delayed, momentum_of

Threshold = tuple[str, float]  # what, and its largest stable learning rate


class _Method(NamedTuple):
    """How a mitigation is made, and what of its state is held: values that depend on the noise."""

    make: Callable[[Any, int], optax.GradientTransformation]  # of learning rate and mean delay
    held: dict[str, float] | None = None
    in_sharpness: bool = False  # whether these values are in units of the sharpness


MITIGATIONS: dict[str, _Method] = {
    "staleness-scaling": _Method(lambda rate, delay: compensate.staleness_scaling()),
    "delay-adaptive": _Method(lambda rate, delay: compensate.delay_adaptive(delay + 1)),
    "power": _Method(lambda rate, delay: compensate.power_scaling()),
    "dc-asgd": _Method(lambda rate, delay: compensate.dc_asgd()),
    # Linear at a held mean of squared gradients; here half of what cancels the delay.
    "dc-ema": _Method(lambda rate, delay: compensate.dc_ema(), {"square_mean": 0.5}, True),
    # Of gradients with noise of 1: at a minimum the gap is small against the usual step.
    "gap-aware": _Method(lambda rate, delay: compensate.gap_aware(rate), {"square_mean": 1.0}),
}
PREDICTION, DROP = "prediction", "drop"
UNMITIGATED_ROW = "no mitigation"


def mitigation(name: str, learning_rate: Any, delay: int) -> optax.GradientTransformation:
    """Returns the transform that goes before the optimizer, inside `delayed`.

    Args:
      name: of `MITIGATIONS`.
      learning_rate: the optimizer's.
      delay: the mean delay, one less than there are workers.

    Raises:
      ValueError: for an unknown name.

    >>> tx = mitigation("power", 0.1, 3)
    >>> float(tx.update(jnp.array(6.0), tx.init(None), staleness=3)[0])
    3.0
    """
    if name not in MITIGATIONS:
        known = ", ".join([*MITIGATIONS, PREDICTION, DROP])
        raise ValueError(f"unknown method {name!r}: use {known}, or all")
    return MITIGATIONS[name].make(learning_rate, delay)


def predicted_sgd(
    learning_rate: Any, delay: int, *, momentum: float, dampening: bool
) -> optax.GradientTransformationExtraArgs:
    """Returns delayed heavy ball whose workers pull the parameters that its momentum predicts.

    Raises:
      ValueError: without momentum.

    >>> tx = predicted_sgd(0.1, 3, momentum=0.9, dampening=True)
    """
    if momentum == 0.0:
        raise ValueError("prediction needs --momentum above 0, which it looks ahead with")
    # As a trace, whose velocity prediction reads; the rate carries the damping.
    rate = (1.0 - momentum) * learning_rate if dampening else learning_rate
    ahead = predict.momentum(rate, decay=momentum)
    return delayed(optax.sgd(rate, momentum=momentum), delay, predict=ahead)


def held_state(
    name: str, optimizer: optax.GradientTransformation, sharpness: float
) -> optax.OptState | None:
    """Returns the state at which an optimizer with a mitigation in it is linear; None for any.

    Args:
      name: of `MITIGATIONS`.
      optimizer: of one scalar parameter.
      sharpness: that some held values are in units of.

    >>> float(held_state("dc-ema", mitigation("dc-ema", 1.0, 3), 20.0).square_mean)
    10.0
    """
    method = MITIGATIONS[name]
    if not method.held:
        return None
    unit = sharpness if method.in_sharpness else 1.0
    values = {key: jnp.array(unit * value) for key, value in method.held.items()}
    state: optax.OptState = optax.tree.set(optimizer.init(jnp.zeros(())), **values)
    return state


def mitigated_max_learning_rate(
    name: str,
    delay: Delay,
    *,
    sharpness: float,
    momentum: float,
    dampening: bool,
    **options: Unpack[OptimizerOptions],
) -> float:
    """Returns the threshold of heavy ball with a mitigation, read off its code.

    Args:
      name: of `MITIGATIONS`.
      delay, **options: as in `optimizer_max_learning_rate`.
      sharpness, momentum, dampening: of heavy ball, as in `max_learning_rate`.

    Raises:
      ValueError: for an unknown name, and as `optimizer_max_learning_rate` does.

    >>> heavy_ball = {"sharpness": 1.0, "momentum": 0.0, "dampening": True}
    >>> round(mitigated_max_learning_rate("power", 3, **heavy_ball), 4)
    0.8901
    """
    mean = round(mean_delay(delay))

    def make(rate: Any) -> optax.GradientTransformation:
        direction = momentum_of(momentum, mean, dampening=dampening)
        before = mitigation(name, rate, mean)
        return optax.chain(before, direction, optax.scale_by_learning_rate(rate))

    held = held_state(name, make(1.0), sharpness)
    if held is not None:
        options["optimizer_state"] = held
    return optimizer_max_learning_rate(make, delay, sharpness=sharpness, **options)


def method_rows(
    names: list[str], delay: int, *, sharpness: float, momentum: float, dampening: bool
) -> list[Threshold]:
    """Returns the threshold without a mitigation, and with each of these, from the code.

    Args:
      names: of `MITIGATIONS`, or "prediction" of heavy-ball momentum.
      delay: int >= 0.
      sharpness, momentum, dampening: of heavy ball, as in `max_learning_rate`.

    Raises:
      ValueError: for an unknown name, prediction without momentum, or dropping.

    >>> rows = method_rows(["power"], 3, sharpness=1.0, momentum=0.0, dampening=True)
    >>> [(name, round(rate, 4)) for name, rate in rows]
    [('no mitigation', 0.445), ('power', 0.8901)]
    """
    options: dict[str, Any] = {"momentum": momentum, "dampening": dampening}
    rows = [(UNMITIGATED_ROW, max_learning_rate(delay, sharpness=sharpness, **options))]

    def foresee(rate: Any) -> optax.GradientTransformation:
        return predicted_sgd(rate, delay, **options)

    for name in names:
        if name == DROP:
            raise ValueError(f"{DROP} needs random delays: of a constant one all or none are late")
        if name == PREDICTION:
            found = optimizer_max_learning_rate(foresee, 0, sharpness=sharpness)
        else:
            found = mitigated_max_learning_rate(name, delay, sharpness=sharpness, **options)
        rows.append((name, found))
    return rows


def pipeline_rows(
    num_stages: int, schedule: str, *, sharpness: float, momentum: float, dampening: bool
) -> list[Threshold]:
    """Returns thresholds of a pipeline, by where the sharpest direction lies in its stages.

    Of a Hessian with one sharp direction: its share in every stage is the same, or it lies in the
    last stage, whose delay is the smallest, or in the first one. Of your own network
    `stages_max_learning_rate` says it, from `curvature.eigenpairs`.

    Raises:
      ValueError: as `delays.pipeline` and `stages_max_learning_rate` do.

    >>> rows = pipeline_rows(4, "1f1b", sharpness=1.0, momentum=0.0, dampening=True)
    >>> [(name, round(rate, 4)) for name, rate in rows][1:]
    [('all of it in the last stage', 2.0), ('all of it in the first stage', 0.445)]
    """
    ages = pipeline(num_stages, schedule)
    even = np.full((num_stages, num_stages), sharpness / num_stages)
    options: dict[str, Any] = {"momentum": momentum, "dampening": dampening}
    return [
        ("spread evenly over the stages", stages_max_learning_rate(even, ages, **options)),
        (
            "all of it in the last stage",
            max_learning_rate(ages[-1], sharpness=sharpness, **options),
        ),
        (
            "all of it in the first stage",
            max_learning_rate(ages[0], sharpness=sharpness, **options),
        ),
    ]


def format_rows(heading: list[str], rows: list[Threshold]) -> str:
    """Returns the rows as a table for the terminal.

    >>> print(format_rows(["delay  3"], [("power", 0.5)]))
    delay  3
    <BLANKLINE>
                                         largest stable
                                          learning rate
      power                                         0.5
    """
    lines = [*heading, "", f"{'largest stable':>51}", f"{'learning rate':>51}"]
    return "\n".join(lines + [f"  {name:<33}{rate:>16.5g}" for name, rate in rows])
