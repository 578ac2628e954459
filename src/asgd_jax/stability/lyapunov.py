"""Growth of delayed gradient descent along one recorded sequence of staleness (Monte Carlo)."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import numpy as np

from asgd_jax.delays import DelayProcess, as_integer, from_trace
from asgd_jax.stability.arguments import MethodOptions, Momentum, as_momentum, as_step, positive
from asgd_jax.stability.closed_form import constant_threshold
from asgd_jax.stability.root_finding import bracketed_root

_SHORTEST_RUN = 50_000
_RUN_PER_DELAY = 300  # near the edge the other modes fade over tens of max_delay / (1 - m) steps
_LONGEST_RUN = 2_000_000  # that the default chooses by itself: half a second
_BURN_IN = 0.2  # of the run, during which the start is forgotten
_NUM_BATCHES = 32
_SAMPLES_PER_BATCH = 8
_FEWEST_STEPS = 1000
_LARGEST_LOG = 300.0 * math.log(10.0)


class LyapunovExponent(NamedTuple):
    """Growth of log|x| a step.

    Attributes:
      value: the exponent; negative where the minimum is stable, -inf where x reaches 0.
      standard_error: of `value`, from the slopes of 32 batches of consecutive steps.
    """

    value: float
    standard_error: float


class LyapunovLearningRate(NamedTuple):
    """A learning rate where the exponent is 0.

    Attributes:
      value: the learning rate.
      standard_error: that of the exponent there, divided by the slope of the exponent.
    """

    value: float
    standard_error: float


def lyapunov_exponent(
    trace: Sequence[int] | np.ndarray | DelayProcess,
    *,
    step: float,
    num_steps: int | None = None,
    seed: int = 0,
    **method: Unpack[MethodOptions],
) -> LyapunovExponent:
    r"""Growth rate of x along a recorded sequence of staleness $s_0, s_1, \ldots$

    Runs $x_{t+1} = x_t - h x_{t - \min(s_t, t)}$, or the same with momentum, and measures
    $\lim_{t} \frac{1}{t} \log |(x_t, \ldots, x_{t - max\_delay})|$. Where delays are random this is
    the growth of a typical run, which can shrink while the mean square E[x^2], carried by rare
    runs, grows.

    Args:
      trace: integers >= 0 of shape (num_updates,), repeated when the run is longer; or a
        DelayProcess, of which `num_steps` samples are drawn.
      step: h = learning rate x sharpness, >= 0.
      num_steps: length of the run, >= 1000; by default max(len(trace), 50,000) or, if longer,
        300 max_delay / (1 - momentum) up to two million. The standard error does not see modes that
        fade more slowly than the run: close to the edge of a large delay, give it more steps.
      seed: of the samples of a DelayProcess; without effect on a trace.
      **method: momentum, kind and dampening, as in `max_learning_rate`.

    Returns:
      LyapunovExponent(value, standard_error), a step.

    Raises:
      ValueError: naming the bad argument.

    >>> estimate = lyapunov_exponent([0], step=3.0, num_steps=1000)
    >>> round(estimate.value, 6)
    0.693147
    """
    checked = as_momentum(**method)
    staleness = draw_staleness(trace, num_steps, seed, checked.value)
    return _exponent(staleness, as_step(step), checked)


def lyapunov_max_learning_rate(
    trace: Sequence[int] | np.ndarray | DelayProcess,
    *,
    sharpness: float = 1.0,
    num_steps: int | None = None,
    seed: int = 0,
    **method: Unpack[MethodOptions],
) -> LyapunovLearningRate:
    """The learning rate at which a recorded sequence of staleness neither shrinks nor grows x.

    The same staleness is used at every learning rate, so the exponent is a smooth function of it.
    The search starts at the threshold of the constant delay of equal mean and goes outward until
    the exponent changes sign.

    Args:
      trace, num_steps, seed, **method: as in `lyapunov_exponent`.
      sharpness: largest eigenvalue of the Hessian, > 0.

    Returns:
      LyapunovLearningRate(value, standard_error).

    Raises:
      ValueError: naming the bad argument.

    >>> round(lyapunov_max_learning_rate([2], num_steps=5000).value, 2)
    0.62
    """
    sharpness = positive(sharpness, "sharpness")
    checked = as_momentum(**method)
    staleness = draw_staleness(trace, num_steps, seed, checked.value)

    def exponent(log_step: float) -> float:
        # -inf (x reached 0) would break the slope.
        return max(_exponent(staleness, math.exp(log_step), checked).value, -10.0)

    low = high = math.log(constant_threshold(round(float(staleness.mean())), checked))
    while exponent(high) <= 0.0:
        low, high = high, high + 0.25
    while exponent(low) > 0.0:
        low, high = low - 0.25, low
    log_step = bracketed_root(exponent, low, high, xtol=1e-7)
    width = 0.02
    slope = (exponent(log_step + width) - exponent(log_step - width)) / (2.0 * width)
    error = _exponent(staleness, math.exp(log_step), checked).standard_error
    value = math.exp(log_step) / sharpness
    return LyapunovLearningRate(value, value * error / slope if slope > 0.0 else math.inf)


def draw_staleness(
    trace: Sequence[int] | np.ndarray | DelayProcess,
    num_steps: int | None = None,
    seed: int = 0,
    momentum: float = 0.0,
) -> np.ndarray:
    """The staleness of every update of a run, as int64; arguments of `lyapunov_exponent`.

    >>> draw_staleness([0, 1, 1], num_steps=1000)[:5]
    array([0, 1, 1, 0, 1])
    """
    # from_trace checks the entries.
    process = trace if isinstance(trace, DelayProcess) else from_trace(trace)
    recorded = None if isinstance(trace, DelayProcess) else np.asarray(trace)
    if num_steps is None:
        wanted = min(_LONGEST_RUN, int(_RUN_PER_DELAY * process.max_delay / (1.0 - momentum)))
        num_steps = max(_SHORTEST_RUN, wanted, 0 if recorded is None else recorded.size)
    if as_integer(num_steps, "num_steps") < _FEWEST_STEPS:
        raise ValueError(f"num_steps must be >= {_FEWEST_STEPS}, got {num_steps}")
    if recorded is not None:
        return np.resize(recorded, num_steps).astype(np.int64)
    import jax

    steps = jax.numpy.arange(num_steps, dtype=jax.numpy.int32)
    # Not under jit: every process is a new closure, which would be compiled at every call.
    draw = jax.vmap(process.sample, in_axes=(None, 0))
    return np.asarray(draw(jax.random.key(seed), steps), dtype=np.int64)


def _exponent(staleness: np.ndarray, step: float, momentum: Momentum) -> LyapunovExponent:
    """Batch means of the slope of the log norm.

    Least squares within each batch: the norm of a window beats with the period of the iterates, and
    the difference of two ends would carry that beat into the estimate.
    """
    lags = np.minimum(staleness, np.arange(staleness.size))
    size = int(lags.max()) + 2
    scale = math.log(2.0 + 2.0 * momentum.value + momentum.gain * step)
    shortest = lags.size // (2 * _NUM_BATCHES * _SAMPLES_PER_BATCH)
    block = max(1, min(max(size, 64), shortest, int(_LARGEST_LOG / scale)))
    log_norms = _log_norms(lags.tolist(), size, step, momentum, block)
    if log_norms[-1] == -math.inf:
        return LyapunovExponent(-math.inf, 0.0)
    samples = int((1.0 - _BURN_IN) * log_norms.size) // _NUM_BATCHES
    batches = log_norms[-samples * _NUM_BATCHES :].reshape(_NUM_BATCHES, samples)
    time = np.arange(samples) - (samples - 1) / 2.0
    slopes = batches @ time / (block * float(time @ time))
    error = float(slopes.std(ddof=1)) / math.sqrt(_NUM_BATCHES)
    return LyapunovExponent(float(slopes.mean()), error)


def _log_norms(
    lags: list[int], size: int, step: float, momentum: Momentum, block: int
) -> np.ndarray:
    """Log norm of the last `size` iterates after every `block` updates; ends early, at -inf, at 0.

    The iterates are rescaled at every block, or they would overflow; the recursion is linear, so
    the scale is free.
    """
    m, force = momentum.value, momentum.gain * step
    x = [1.0] * size
    log_scale, log_norms = 0.0, []
    for start in range(0, len(lags) - block + 1, block):
        if momentum.shifted:
            for lag in lags[start : start + block]:
                late = x[-1 - lag]
                x.append(x[-1] + m * (late - x[-2 - lag]) - force * late)
        else:
            for lag in lags[start : start + block]:
                x.append(x[-1] + m * (x[-1] - x[-2]) - force * x[-1 - lag])
        norm = math.hypot(*x[-size:])
        if norm == 0.0:
            log_norms.append(-math.inf)
            break
        log_scale += math.log(norm)
        log_norms.append(log_scale)
        x = [value / norm for value in x[-size:]]
    return np.array(log_norms)
