"""What the command line says of pipelines and of what is done against staleness."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax import compensate, predict
from asgd_jax.delays import pipeline
from asgd_jax.stability.linearize import optimizer_max_learning_rate
from asgd_jax.stability.stages import stages_max_learning_rate
from asgd_jax.stability.thresholds import max_learning_rate
from asgd_jax.transforms import delayed, momentum_of

Threshold = tuple[str, float]  # what, and its largest stable learning rate


class _Method(NamedTuple):
    """How a mitigation is made, and what of its state is held: values that depend on the noise."""

    make: Callable[[Any, int, optax.GradientTransformation], optax.GradientTransformation]
    held: dict[str, float] | None = None


def _before(transform: Callable[[Any, int], optax.GradientTransformation]) -> Any:
    return lambda rate, delay, inner: optax.chain(transform(rate, delay), inner)


MITIGATIONS: dict[str, _Method] = {
    "staleness-scaling": _Method(_before(lambda rate, delay: compensate.staleness_scaling())),
    "delay-adaptive": _Method(_before(lambda rate, delay: compensate.delay_adaptive(delay + 1))),
    "power": _Method(_before(lambda rate, delay: compensate.power_scaling())),
    "dc-asgd": _Method(_before(lambda rate, delay: compensate.dc_asgd())),
    # Of gradients with noise of 1: at a minimum the gap is small against the usual step.
    "gap-aware": _Method(
        _before(lambda rate, delay: compensate.gap_aware(rate)), {"square_mean": 1.0}
    ),
}
PREDICTION = "prediction"


def method_rows(
    names: list[str], delay: int, *, sharpness: float, momentum: float, dampening: bool
) -> list[Threshold]:
    """Returns the threshold without a mitigation, and with each of these, from the code.

    Args:
      names: of `MITIGATIONS`, or "prediction" of heavy-ball momentum.
      delay: int >= 0.
      sharpness, momentum, dampening: of heavy ball, as in `max_learning_rate`.

    Raises:
      ValueError: for an unknown name, or prediction without momentum.

    >>> rows = method_rows(["power"], 3, sharpness=1.0, momentum=0.0, dampening=True)
    >>> [(name, round(rate, 4)) for name, rate in rows]
    [('no mitigation', 0.445), ('power', 0.8901)]
    """
    options: dict[str, Any] = {"momentum": momentum, "dampening": dampening}
    rows = [("no mitigation", max_learning_rate(delay, sharpness=sharpness, **options))]
    gain = 1.0 - momentum if dampening else 1.0

    def inner(rate: Any) -> optax.GradientTransformation:
        direction = momentum_of(momentum, delay, dampening=dampening)
        return optax.chain(direction, optax.scale_by_learning_rate(rate))

    for name in names:
        if name == PREDICTION:
            if momentum == 0.0:
                raise ValueError("prediction needs --momentum above 0, which it looks ahead with")

            def foresee(rate: Any) -> optax.GradientTransformation:
                ahead = predict.momentum(gain * rate, decay=momentum)
                return delayed(optax.sgd(gain * rate, momentum=momentum), delay, predict=ahead)

            rows.append((name, optimizer_max_learning_rate(foresee, 0, sharpness=sharpness)))
            continue
        if name not in MITIGATIONS:
            known = ", ".join([*MITIGATIONS, PREDICTION])
            raise ValueError(f"unknown method {name!r}: use {known}, or all")
        method = MITIGATIONS[name]

        def make(rate: Any, method: _Method = method) -> optax.GradientTransformation:
            return method.make(rate, delay, inner(rate))

        state = None
        if method.held is not None:
            held = {key: jnp.array(value) for key, value in method.held.items()}
            state = optax.tree.set(make(1.0).init(jnp.zeros(())), **held)
        found = optimizer_max_learning_rate(make, delay, sharpness=sharpness, optimizer_state=state)
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
