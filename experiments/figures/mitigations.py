r"""What theory says of every mitigation: by how much it raises the largest stable learning rate.

The thresholds are those of the implemented code, linearised
(`stability.optimizer_max_learning_rate`); for some methods they are measured as well, at a real
minimum: full-batch descent starts beside it and is, or is not, still there in the end.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
import pandas as pd

import asgd_jax
from asgd_jax import predict, stability
from asgd_jax.stability.mitigations import held_state, mitigation, predicted_sgd
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.transforms import delayed_sgd
from experiments import style
from experiments.claims import Claim, at_most, near
from experiments.edges.fullbatch import measure_edge
from experiments.edges.minimum import digits_problem, find_minimum

CAPTION = (
    "Of what is done against staleness, scaling gradients by it is another learning rate, "
    "correcting them to second order changes no threshold, correcting them by a held curvature "
    "undoes the delay, predicting the parameters from the "
    "momentum buys back what momentum costs, and repeating the last update costs more; a real "
    "minimum is left where the linearised code says."
)

UNMITIGATED, DAMPED_MOMENTUM = "no mitigation", "damped momentum .9"
SCALING, POWER = "gradient / staleness", "gradient / sqrt(1 + staleness)"
DC_ASGD, PREDICTED = "DC-ASGD", "damped momentum .9, predicted"
NESTEROV, REPEATED = "damped Nesterov .99", "last update repeated"
DC_EMA = "DC-EMA, lambda v = a / 2"
SHIFTED_MOMENTUM = "shifted momentum .9"
COMPUTED, MEASURED = "computed", "measured"  # the column series


class Config(NamedTuple):
    """Delays of the curves and of the measurements, the methods that are measured."""

    delays: tuple[int, ...]
    measured_delays: tuple[int, ...]
    measured: tuple[str, ...]
    num_train: int = 256


_MEASURED = (UNMITIGATED, SCALING, SHIFTED_MOMENTUM, PREDICTED)
PRESETS = {
    "smoke": Config((1, 4), (2,), (UNMITIGATED,), 64),
    "cpu": Config((1, 2, 4, 8, 16, 32), (2, 4, 8, 16), _MEASURED),
    "paper": Config((1, 2, 4, 8, 16, 32, 64), (2, 4, 8, 16), _MEASURED, 1024),
}

_CLOSE = 0.05  # of measured over computed
_RESOLUTION = 0.02
_DECAY = 0.9


def _damped(rate: Any) -> optax.GradientTransformation:
    return optax.sgd((1.0 - _DECAY) * rate, momentum=_DECAY)


def _predicted(rate: Any, delay: int) -> optax.GradientTransformation:
    return predicted_sgd(rate, delay, momentum=_DECAY, dampening=True)


def _repeated(rate: Any, delay: int) -> optax.GradientTransformation:
    inner = optax.chain(optax.sgd(rate), predict.remember_update())
    return asgd_jax.delayed(inner, delay, predict=predict.last_update())


def _with(name: str) -> Callable[[Any, int], optax.GradientTransformation]:
    def make(rate: Any, delay: int) -> optax.GradientTransformation:
        return asgd_jax.delayed(optax.chain(mitigation(name, rate, delay), optax.sgd(rate)), delay)

    return make


METHODS: dict[str, Callable[[Any, int], optax.GradientTransformation]] = {
    UNMITIGATED: lambda rate, delay: delayed_sgd(rate, delay),
    SCALING: _with("staleness-scaling"),
    POWER: _with("power"),
    DC_ASGD: _with("dc-asgd"),
    DC_EMA: _with("dc-ema"),
    DAMPED_MOMENTUM: lambda rate, delay: asgd_jax.delayed(_damped(rate), delay),
    PREDICTED: _predicted,
    SHIFTED_MOMENTUM: lambda rate, delay: delayed_sgd(rate, delay, momentum=_DECAY, kind="shifted"),
    NESTEROV: lambda rate, delay: delayed_sgd(rate, delay, momentum=0.99, kind="nesterov"),
    REPEATED: _repeated,
}
_COLOURS = dict(
    zip(METHODS, (*style.COLOURS, style.BLACK, "0.5", "#8B4513", "#4B0082"), strict=True)
)


def run(config: Config, work: Path) -> list[Record]:
    """Returns computed and measured thresholds; what is finished is kept in `work`."""
    table = open_table(work / "mitigations", config._asdict())
    points = [(COMPUTED, method, delay) for method in METHODS for delay in config.delays]
    points += [(MEASURED, method, d) for method in config.measured for d in config.measured_delays]
    minimum = None
    keys = []
    for series, method, delay in points:
        keys.append(run_key({"series": series, "method": method, "delay": delay}))
        if keys[-1] in table.runs:
            continue
        if series == MEASURED and minimum is None:
            problem = digits_problem(num_train=config.num_train)
            minimum = find_minimum(*problem, optax.sgd(0.05, momentum=0.98)), problem
        found = minimum if series == MEASURED else None
        row = {"series": series, "method": method, "delay": delay, **_edge(method, delay, found)}
        table = add_runs(table, {keys[-1]: [row]})
    return [record for key in keys for record in table.runs[key]]


def _edge(method: str, delay: int, found: Any) -> Record:
    """The threshold of h = rate x sharpness; measured where a minimum is given."""

    def make(rate: Any) -> optax.GradientTransformation:
        return METHODS[method](rate, delay)

    held = held_state("dc-ema", make(1.0), 1.0) if method == DC_EMA else None
    computed = stability.optimizer_max_learning_rate(make, 0, optimizer_state=held)
    row = {"threshold": computed, "plain": stability.max_learning_rate(delay)}
    if found is None:
        return {**row, "measured": math.nan, "sharpness": math.nan}
    minimum, problem = found
    just_above = (1.0 + _RESOLUTION) * computed
    growth = stability.optimizer_spectral_radius(make, 0, learning_rate=just_above)
    lower, upper = measure_edge(
        minimum,
        make,
        problem.loss_fn,
        problem.batches,
        steps=math.ceil(1.0 / math.log(growth)),
        resolution=_RESOLUTION,
    )
    measured = math.sqrt(lower * upper) * minimum.sharpness
    return {**row, "measured": measured, "sharpness": minimum.sharpness}


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks what each method does to the threshold, and the measurements."""
    computed = records[records.series == COMPUTED]
    gain = computed.assign(gain=computed.threshold / computed.plain)
    largest = int(computed.delay.max())

    def at(method: str) -> pd.DataFrame:
        return gain[gain.method == method]

    def last(method: str) -> float:
        return float(at(method).gain[at(method).delay == largest].iloc[0])

    scaled = at(SCALING).gain / at(SCALING).delay
    measured = records[records.series == MEASURED]
    off = np.abs(measured.measured / measured.threshold - 1.0)
    return [
        at_most(
            "gradient / staleness is another learning rate: gain over the delay, furthest from 1",
            float(np.max(np.abs(scaled - 1.0))),
            1e-6,
        ),
        at_most(
            "DC-ASGD changes no threshold: gain, furthest from 1",
            float(np.max(np.abs(at(DC_ASGD).gain - 1.0))),
            1e-3,
        ),
        at_most(
            "DC-EMA at half the curvature: threshold of h, furthest from the 2 of no delay",
            float(np.max(np.abs(at(DC_EMA).threshold - 2.0))),
            1e-3,
        ),
        near(
            f"at tau = {largest}, shifted momentum's gain",
            last(SHIFTED_MOMENTUM),
            4.0 / math.pi,
            0.05,
        ),
        at_most(
            f"at tau = {largest}, gain of damped momentum over that of the same with prediction",
            last(DAMPED_MOMENTUM) / last(PREDICTED),
            0.95,
        ),
        at_most(
            f"at tau = {largest}, repeating the last update costs threshold: its gain",
            last(REPEATED),
            1.0,
        ),
        at_most(
            f"a real minimum is left where the code says: furthest of {len(off)} from 1",
            float(np.max(off.to_numpy())),
            _CLOSE,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: the gain of each method, and measured over computed."""
    figure, (left, right) = style.new_figure(2, width=6.4, height=5.6)
    computed = records[records.series == COMPUTED]
    order: Sequence[str] = list(dict.fromkeys(computed.method))
    for method in order:
        rows = computed[computed.method == method]
        look = {"color": _COLOURS[method], "marker": "o", "markersize": 4}
        left.plot(rows.delay, rows.threshold / rows.plain, label=method, **look)
    left.axhline(1.0, color=style.BLACK, linewidth=0.8)
    left.set(xlabel="delay τ", ylabel="largest stable rate over that of no mitigation")
    style.plain_log(left, "x", "y")
    left.set_title("computed from the code: above 1 helps")
    left.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    measured = records[records.series == MEASURED]
    right.axhspan(1.0 - _CLOSE, 1.0 + _CLOSE, color="0.9", label=f"within {_CLOSE:.0%}")
    right.axhline(1.0, color=style.BLACK, linewidth=0.8)
    for number, method in enumerate(dict.fromkeys(measured.method)):
        rows = measured[measured.method == method]
        right.plot(
            rows.delay * (1.0 + 0.03 * (number - 1)),
            rows.measured / rows.threshold,
            color=_COLOURS[method],
            marker=style.MARKERS[number],
            linestyle="",
            label=method,
        )
    right.set(xlabel="delay τ", ylabel="measured over computed", ylim=(0.8, 1.2))
    style.plain_log(right, "x")
    right.set_title("measured at a minimum (digits)")
    right.legend(fontsize=9)
    return figure
