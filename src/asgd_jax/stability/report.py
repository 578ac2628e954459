"""The table that answers: which learning rate is stable under this delay, for which momentum?"""

import math
from typing import Any, NamedTuple

from asgd_jax.stability.arguments import (
    Delay,
    Kind,
    MethodOptions,
    as_curvature_noise,
    as_delay,
    as_momentum,
    is_trace,
    positive,
)
from asgd_jax.stability.growth import growth_time
from asgd_jax.stability.lyapunov import lyapunov_exponent, lyapunov_max_learning_rate
from asgd_jax.stability.rules import (
    mean_delay,
    rescale_learning_rate,
    synchronous_max_learning_rate,
)
from asgd_jax.stability.thresholds import max_delay, max_learning_rate


class Question(NamedTuple):
    """What a person asks.

    Attributes:
      delay: int, mass function or DelayProcess.
      description: the delay in words.
      momentum, kind, dampening: the method in use, marked in the answer.
      sharpness: of the minimum; None to take the sharpest that `baseline` keeps stable, or else 1.
      learning_rate: the one in use, or None.
      baseline: a learning rate that works without delay, or None.
      curvature_noise: relative variance of the curvature that one update's batch sees.
    """

    delay: Delay
    description: str
    momentum: float = 0.0
    kind: Kind = "heavy_ball"
    dampening: bool = True
    sharpness: float | None = None
    learning_rate: float | None = None
    baseline: float | None = None
    curvature_noise: float = 0.0


# The names of the momentum methods, with kind and dampening.
_METHODS: dict[str, tuple[Kind, bool]] = {
    "heavy ball, damped": ("heavy_ball", True),
    "heavy ball, undamped": ("heavy_ball", False),
    "shifted": ("shifted", True),
    "shifted, undamped": ("shifted", False),
}
# Always in the table; others only for those who use them.
_COMPARED = ("no momentum", "heavy ball, damped", "heavy ball, undamped", "shifted")


def methods(momentum: float) -> dict[str, MethodOptions]:
    """All methods by name; without momentum they are one.

    >>> list(methods(0.9))
    ['no momentum', 'heavy ball, damped', 'heavy ball, undamped', 'shifted', 'shifted, undamped']
    """
    options: dict[str, MethodOptions] = {
        "no momentum": {"momentum": 0.0, "kind": "heavy_ball", "dampening": True}
    }
    if momentum > 0.0:
        for name, (kind, dampening) in _METHODS.items():
            options[name] = {"momentum": momentum, "kind": kind, "dampening": dampening}
    return options


def answer(question: Question) -> dict[str, Any]:
    """Everything the table says, as numbers; JSON-ready (None where there is no finite number).

    Raises:
      ValueError: naming the bad entry of the question.

    >>> answer(Question(32, "32 updates", sharpness=20.0))["methods"][0]["max_learning_rate"]
    0.0024163745...
    """
    momentum = as_momentum(question.momentum, question.kind, question.dampening)
    for name in ("sharpness", "learning_rate", "baseline"):
        if getattr(question, name) is not None:
            positive(getattr(question, name), name)
    noise = as_curvature_noise(question.curvature_noise, "mean_square")
    options = methods(question.momentum)
    used = next(name for name in options if as_momentum(**options[name]) == momentum)
    sharpness, source = question.sharpness, "given"
    if sharpness is None and question.baseline is not None:
        sharpness = _synchronous(question, 1.0, options[used]) / question.baseline
        source = "the sharpest that the rate without delay keeps stable"
    elif sharpness is None:
        sharpness, source = 1.0, "not given: rates are learning rate x sharpness"
    sort = "trace" if is_trace(question.delay) else "random"
    if sort != "trace" and isinstance(as_delay(question.delay), int):
        sort = "constant"
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "used": name == used, **options[name]}
        | _row(question, sort, sharpness, options[name])
        for name in options
        if name in (*_COMPARED, used)
    }
    answered = {
        "delay": question.description,
        "mean_delay": mean_delay(question.delay),
        "staleness": sort,
        "sharpness": sharpness,
        "sharpness_source": source,
        "momentum": question.momentum,
        "learning_rate": question.learning_rate,
        "baseline_learning_rate": question.baseline,
        "curvature_noise": noise,
        "methods": list(rows.values()),
    }
    if question.baseline is not None:
        # Eq. 8; for random delays `exact` keeps the mean square stable. The threshold is at hand,
        # and for a trace it is slow to find again.
        row = rows[used]
        delayed = row.get("max_learning_rate_mean_square", row["max_learning_rate"])
        undelayed = _synchronous(question, sharpness, options[used])
        answered["rules"] = {
            "inverse": rescale_learning_rate(question.baseline, question.delay),
            "exact": question.baseline * delayed / undelayed,
        }
    return answered


def _synchronous(question: Question, sharpness: float, options: MethodOptions) -> float:
    """The largest stable rate of S-SGD with the batch of all workers."""
    return synchronous_max_learning_rate(
        question.delay,
        sharpness=sharpness,
        criterion="mean_square",
        curvature_noise=question.curvature_noise,
        **options,
    )


def _row(question: Question, sort: str, sharpness: float, options: MethodOptions) -> dict[str, Any]:
    delay, noise = question.delay, question.curvature_noise
    row: dict[str, Any] = {}
    if is_trace(delay):
        if noise:
            raise ValueError("--curvature-noise takes no simulated workers: give a distribution")
        estimate = lyapunov_max_learning_rate(delay, sharpness=sharpness, **options)
        row["max_learning_rate"], row["standard_error"] = estimate
    else:
        row["max_learning_rate"] = max_learning_rate(delay, sharpness=sharpness, **options)
    if sort == "random" or noise:
        row["max_learning_rate_mean_square"] = max_learning_rate(
            delay,
            sharpness=sharpness,
            criterion="mean_square",
            curvature_noise=noise,
            **options,
        )
    if question.learning_rate is not None:
        time = _growth_time(question, question.learning_rate * sharpness, options)
        row["stable"] = math.isinf(time)
        row["growth_time"] = None if math.isinf(time) else time
    if question.learning_rate is not None and not noise:  # whose largest delay is not known
        row["max_constant_delay"] = max_delay(
            question.learning_rate, sharpness=sharpness, **options
        )
    return row


def _growth_time(question: Question, step: float, options: MethodOptions) -> float:
    """Steps per e-fold: of the trajectory for a trace, of the root mean square otherwise."""
    delay = question.delay
    if not is_trace(delay):
        noise = question.curvature_noise
        return growth_time(
            delay, step=step, criterion="mean_square", curvature_noise=noise, **options
        )
    exponent = lyapunov_exponent(delay, step=step, **options).value
    return 1.0 / exponent if exponent > 0.0 else math.inf


def render(answered: dict[str, Any]) -> str:
    """The answer as an aligned table.

    >>> print(render(answer(Question(32, "32 updates", sharpness=20.0))))
    delay      32 updates (constant)
    sharpness  20 (given)
    <BLANKLINE>
                   largest stable
                    learning rate
    * no momentum       0.0024164
    <BLANKLINE>
    * your method
    """
    head = [
        ("delay", f"{answered['delay']} ({answered['staleness']})"),
        ("sharpness", f"{answered['sharpness']:.5g} ({answered['sharpness_source']})"),
    ]
    if answered["momentum"]:
        head.append(("momentum", f"{answered['momentum']:g}"))
    if answered["staleness"] != "constant":
        head.append(("mean delay", f"{answered['mean_delay']:.5g} updates"))
    if answered["curvature_noise"]:
        noise = f"{answered['curvature_noise']:.5g} of the curvature squared, an update"
        head.append(("noise", noise))
    width = max(len(name) for name, _ in head)
    lines = [f"{name:<{width}}  {text}" for name, text in head]
    return "\n".join([*lines, "", *_align(_columns(answered)), "", *_notes(answered)])


def _columns(answered: dict[str, Any]) -> list[list[str]]:
    """Columns of text; the first two entries of each are its title."""
    rows = answered["methods"]
    names = [("* " if row["used"] else "  ") + row["name"] for row in rows]
    columns = [["", "", *names]]
    rates = [_number(row["max_learning_rate"]) for row in rows]
    if "max_learning_rate_mean_square" in rows[0]:
        squares = [_number(row["max_learning_rate_mean_square"]) for row in rows]
        columns.append(["largest stable", "in mean square", *squares])
        columns.append(["(in the mean", "only)", *rates])
    else:
        columns.append(["largest stable", "learning rate", *rates])
    if answered["staleness"] == "trace":
        columns.append(["standard", "error", *(f"{row['standard_error']:.1g}" for row in rows)])
    if answered["learning_rate"] is not None:
        rate = f"{answered['learning_rate']:g}"
        times = ["stable" if row["stable"] else f"{row['growth_time']:,.3g}" for row in rows]
        columns.append(["steps per", f"e-fold at {rate}", *times])
    if "max_constant_delay" in rows[0]:
        delays = [row["max_constant_delay"] for row in rows]
        texts = ["none" if delay is None else f"{delay}" for delay in delays]
        columns.append(["largest constant", f"delay at {rate}", *texts])
    return columns


def _align(columns: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for texts in zip(*columns, strict=True):
        cells = [texts[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
        lines.append("   ".join(cells).rstrip())
    return lines


def _notes(answered: dict[str, Any]) -> list[str]:
    notes = ["* your method"]
    if "rules" in answered:
        rules = answered["rules"]
        notes.append(
            f"eq. 8, from {answered['baseline_learning_rate']:g} without delay: inverse "
            f"{_number(rules['inverse'])}, exact {_number(rules['exact'])}"
        )
    if "max_learning_rate_mean_square" in answered["methods"][0]:
        notes.append("Act on the mean square: E[x] can settle while E[x^2] diverges.")
    if answered["staleness"] == "trace":
        notes.append("Monte-Carlo estimates from the growth of x along the simulated staleness.")
    if any(row.get("max_constant_delay", 0) is None for row in answered["methods"]):
        notes.append("none: this learning rate is unstable even without delay.")
    return notes


def _number(value: float) -> str:
    return f"{value:.5g}"
