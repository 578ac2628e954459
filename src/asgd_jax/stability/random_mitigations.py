"""What is done against staleness that is random: every method by every sense of stability."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax.delays import DelayProcess, below, categorical, from_trace
from asgd_jax.stability.arguments import OPTIMIZER_CRITERIA, as_delay, as_pmf
from asgd_jax.stability.lyapunov import lyapunov_max_learning_rate
from asgd_jax.stability.mitigations import (
    DROP,
    PREDICTION,
    UNMITIGATED_ROW,
    mitigated_max_learning_rate,
    mitigation,
)
from asgd_jax.stability.rules import mean_delay
from asgd_jax.stability.thresholds import max_learning_rate


class CriteriaRow(NamedTuple):
    """A method under random delays: its largest stable learning rates, and what they are worth.

    Attributes:
      name: of the method.
      mean, mean_square, lyapunov: thresholds by the criterion of `optimizer_max_learning_rate`. Of
        a recorded trace the first two take its staleness as drawn afresh at every update.
      mean_factor: mean of what an arriving gradient is multiplied with, 0 where it is dropped.
      gain: `mean_square` x `mean_factor`, over that of no mitigation: how much further a gradient
        may move x.
    """

    name: str
    mean: float
    mean_square: float
    lyapunov: float
    mean_factor: float
    gain: float = 1.0


class _Staleness(NamedTuple):
    """Random delays in both forms: as a distribution, and in the order of a run."""

    distribution: DelayProcess
    order: DelayProcess

    @property
    def pmf(self) -> np.ndarray:
        return as_pmf(as_delay(self.distribution))


def random_method_rows(
    names: list[str],
    delay: DelayProcess | np.ndarray,
    *,
    sharpness: float,
    momentum: float,
    dampening: bool,
    drop_stale: int | None = None,
) -> list[CriteriaRow]:
    """Returns what each of these methods does to the thresholds of heavy ball, and what none does.

    Args:
      names: of `MITIGATIONS` (n of delay-adaptive is the rounded mean delay plus 1), or "drop".
      delay: a process with a distribution, or a recorded trace, int of shape (num_updates,).
      sharpness, momentum, dampening: of heavy ball, as in `max_learning_rate`.
      drop_stale: of "drop", see `delayed`; by default those that drop what is older than the mean,
        and than twice the mean, if anything is.

    Raises:
      ValueError: for an unknown name, prediction, or a `drop_stale` that leaves nothing.

    >>> from asgd_jax.delays import uniform
    >>> heavy_ball = {"sharpness": 1.0, "momentum": 0.0, "dampening": True}
    >>> rows = random_method_rows(["drop"], uniform(1, 4), **heavy_ball)
    >>> [(row.name, round(row.mean_square, 2), row.mean_factor) for row in rows]
    [('no mitigation', 0.54, 1.0), ('drop from 3', 0.76, 0.5)]
    """
    if isinstance(delay, DelayProcess):
        staleness = _Staleness(delay, delay)
    else:
        staleness = _of_trace(delay)
    options: dict[str, Any] = {
        "sharpness": sharpness,
        "momentum": momentum,
        "dampening": dampening,
    }
    rows = [_plain_row(UNMITIGATED_ROW, staleness, 1.0, options)]
    for name in names:
        if name == PREDICTION:
            raise ValueError(
                "prediction needs --delay: with what it remembers a random delay has no Jacobian "
                "of its own"
            )
        if name == DROP:
            rows += _drop_rows(delay, staleness, drop_stale, options)
        else:
            rows.append(_mitigated_row(name, staleness, options))
    plain = rows[0].mean_square
    return [row._replace(gain=row.mean_square * row.mean_factor / plain) for row in rows]


def _of_trace(trace: np.ndarray) -> _Staleness:
    return _Staleness(categorical(np.bincount(trace) / trace.size), from_trace(trace))


def _plain_row(
    name: str, staleness: _Staleness, factor: float, options: dict[str, Any]
) -> CriteriaRow:
    where = staleness.distribution
    return CriteriaRow(
        name,
        max_learning_rate(where, **options),
        max_learning_rate(where, criterion="mean_square", **options),
        lyapunov_max_learning_rate(staleness.order, **options).value,
        factor,
    )


def _drop_rows(
    delay: DelayProcess | np.ndarray,
    staleness: _Staleness,
    drop_stale: int | None,
    options: dict[str, Any],
) -> list[CriteriaRow]:
    """Heavy ball knows nothing of what is dropped: these are the thresholds of what is left."""
    if drop_stale is not None:
        limits = [drop_stale]
    else:
        mean = mean_delay(staleness.distribution)
        multiples = [math.floor(multiple * mean) + 1 for multiple in (1, 2)]
        limits = [limit for limit in multiples if limit < staleness.pmf.size]
    rows = []
    for limit in limits:
        # Of a trace too, this refuses a limit that leaves nothing.
        left = _Staleness(*2 * (below(staleness.distribution, limit),))
        if not isinstance(delay, DelayProcess):
            left = _of_trace(delay[delay < limit])
        share = float(staleness.pmf[:limit].sum())
        rows.append(_plain_row(f"drop from {limit}", left, share, options))
    return rows


def _mitigated_row(name: str, staleness: _Staleness, options: dict[str, Any]) -> CriteriaRow:
    mean = round(mean_delay(staleness.distribution))
    factor = staleness.pmf @ _factors(mitigation(name, 1.0, mean), staleness.pmf.size)
    thresholds = {
        criterion: mitigated_max_learning_rate(
            name,
            staleness.order if criterion == "lyapunov" else staleness.distribution,
            criterion=criterion,
            **options,
        )
        for criterion in OPTIMIZER_CRITERIA
    }
    return CriteriaRow(name, **thresholds, mean_factor=float(factor))


def _factors(transform: optax.GradientTransformation, size: int) -> np.ndarray:
    """What gradients of staleness 0, 1, ... are multiplied with where parameters stand still."""
    zero, one = jnp.zeros(()), jnp.ones(())
    update = optax.with_extra_args_support(transform).update

    def factor(staleness: jax.Array) -> jax.Array:
        made, _ = update(one, transform.init(zero), zero, staleness=staleness, stale_params=zero)
        return made

    return np.asarray(jax.vmap(factor)(jnp.arange(size, dtype=jnp.int32)), np.float64)


def format_criteria_rows(heading: list[str], rows: list[CriteriaRow]) -> str:
    """Returns the rows as a table for the terminal.

    >>> text = format_criteria_rows(["delay  uniform"], [CriteriaRow("power", 0.9, 0.7, 0.8, 0.5)])
    >>> print(text.split("Act")[0].rstrip())
    delay  uniform
    <BLANKLINE>
                       largest stable learning rate
                         mean square      (mean)  typical run   mean factor    gain
      power                      0.7         0.9          0.8           0.5       1
    """
    lines = [
        *heading,
        "",
        f"{'largest stable learning rate':>46}",
        f"{'mean square':>30}{'(mean)':>12}{'typical run':>13}{'mean factor':>14}{'gain':>8}",
    ]
    for row in rows:
        rates = f"{row.mean_square:>12.5g}{row.mean:>12.5g}{row.lyapunov:>13.4g}"
        lines.append(f"  {row.name:<16}{rates}{row.mean_factor:>14.3g}{row.gain:>8.3g}")
    notes = [
        "Act on the mean square: a typical run (Lyapunov, a Monte-Carlo estimate) and the mean can",
        "shrink while it grows. Mean factor: of a gradient, 0 where it is dropped. Gain: of the",
        "largest stable rate x mean factor.",
    ]
    return "\n".join([*lines, "", *notes])
