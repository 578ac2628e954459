r"""The Jacobians of an implemented train step at a minimum, and whether they describe it.

With z the parameter and all floating-point state, the update n maps z to $F_n(z, \xi)$, where
$\xi$ is noise in the gradient. A function that is linear near the minimum agrees with its Jacobian
for finite z and $\xi$ too, which is checked; and one with rings in its state is periodic in n.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.stability.quadratic_step import (
    Layout,
    Memory,
    QuadraticStep,
    is_float,
    run_user_code,
)

# Noise in the gradient at which the step is tried, relative to the largest one: |g| is not linear.
_PROBES = np.array([1.0, -1.0, 1e-3])
_LARGEST_PROBE, _LARGEST_HELD_PROBE = 1e-3, 1e-6
_NONLINEAR = 1e-4  # relative deviation that rounding does not explain
_TINY, _RELATIVE = 1e-20, 1e-5  # differences around zero, and around anything else
_SHORTEST = 4  # updates a stretch: enough for the state to act on x, and x on the state
_MOST_MEMORY = 2**30  # bytes of Jacobians
_LONGEST_WAIT = 2**16  # updates in which bias corrections and warm-ups must fade
_SETTLED, _SETTLED_AT = 1e-9, 0.1  # relative change in a period; around an update that was named
_MOST_REPEATS = 8  # stretches in a period: gradient accumulation has a period of its own


class Stretch(NamedTuple):
    """Consecutive updates, linearised.

    Attributes:
      jacobians: float64, shape (num_steps, num_alternatives, n, n + 1): the derivatives of z' with
        respect to z, of which x is the first entry, and to the noise.
      deviations: float64, shape (num_steps, 3): by how much x differs after each update when the
        gradients carry the probes as noise; nothing is linearised here.
      drifts: whether x moves without noise, so that the state is not at rest.
      hidden: whether the noise also changes state that is not floating point.
    """

    jacobians: np.ndarray
    deviations: np.ndarray
    drifts: bool
    hidden: bool


class StepJacobian(NamedTuple):
    """The linearised train step.

    Attributes:
      num_steps: length of a stretch, a common multiple of the sizes of all rings in the state.
      weights: probability of each alternative of an update, shape (num_alternatives,).
      run: `run(learning_rate, start, probe) -> Stretch`, from update `start` on, with noise of up
        to `probe` in the probes.
      noise: shape (num_steps,), the pattern of the probes.
      precision: relative precision of the coarsest floating-point number in the state.
    """

    num_steps: int
    weights: np.ndarray
    run: Callable[[float, int, float], Stretch]
    noise: np.ndarray
    precision: float


class Minimum(NamedTuple):
    """A train step that repeats with the period of `repeats` stretches, from update `start` on."""

    step: StepJacobian
    start: int
    repeats: int

    def jacobians(self, rate: float) -> np.ndarray:
        """Those of one period with respect to z, shape (T, num_alternatives, n, n)."""
        starts = (self.start + k * self.step.num_steps for k in range(self.repeats))
        stretches = [self.step.run(rate, start, 0.0).jacobians for start in starts]
        return np.concatenate(stretches)[..., :-1]


def step_jacobian(
    step: QuadraticStep, delay: int | np.ndarray, *, average: bool = True
) -> StepJacobian:
    """Linearises a train step; call it, and what it returns, inside `float64()`.

    Args:
      step: the train step.
      delay: checked delay. A mass function makes one alternative of each staleness in its support.
      average: whether to replace the alternatives by their mean.

    Raises:
      ValueError: when the optimizer does not run, or its state is too large.
    """
    choices, weights = None, np.ones(1)
    if not isinstance(delay, int):
        choices = np.flatnonzero(delay).astype(np.int32)
        weights = delay[choices]
    num_steps = _num_steps(step.layout, 1 if average else weights.size)
    noise = np.cos(1.0 + 2.0 * np.arange(num_steps))

    def stretch(rate: Any, first: Any, probe: Any) -> tuple[jax.Array, ...]:
        def alternatives(inputs: jax.Array, rest: list[jax.Array]) -> Memory:
            memory, kick = (inputs[:-1], rest), inputs[-1]
            if choices is None:
                vector, others = step.advance(rate, memory, kick)
                return vector[None], others
            each, others = jax.vmap(lambda k: step.advance(rate, memory, kick, k))(choices)
            return (jnp.asarray(weights) @ each)[None] if average else each, others

        def advance(memory: Memory) -> Memory:
            vector, rest = step.advance(rate, memory, 0.0)
            return (memory[0] if step.held else vector), rest

        def body(carry: Any, kick: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
            memory, deviations = carry
            deviations, result = _differentiate(alternatives, memory, deviations, kick, used)
            return (advance(memory), deviations), result

        memory = jax.lax.fori_loop(0, first, lambda _, m: advance(m), step.start(rate))
        deviations = jnp.zeros((_PROBES.size, memory[0].size))
        return jax.lax.scan(body, (memory, deviations), probe * noise)[1]

    used = np.ones(1) if average else weights
    traced, concrete = jax.jit(stretch), jax.jit(stretch, static_argnums=0)
    compiled = run_user_code(lambda: _first_that_lowers(traced, concrete))

    def run(rate: float, first: int, probe: float) -> Stretch:
        jacobians, deviations, drifts, hidden = map(np.asarray, compiled(rate, first, probe))
        return Stretch(jacobians, deviations, bool(drifts.any()), bool(hidden.any()))

    return StepJacobian(num_steps, used, run, noise, _precision(step.layout))


def _differentiate(
    alternatives: Callable[[jax.Array, list[jax.Array]], Memory],
    memory: Memory,
    deviations: jax.Array,
    kick: jax.Array,
    weights: np.ndarray,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The next deviations, and the fields of a `Stretch` for this update.

    Central differences of a linear function have no truncation error, and around 0 no cancellation:
    they are as good as derivatives, and see through `stop_gradient` and bit casts.
    """
    vector, rest = memory
    still = jnp.append(vector, 0.0)
    n = still.size
    sizes = jnp.where(still == 0.0, _TINY, _RELATIVE * jnp.abs(still))
    above, below = still + jnp.diag(sizes), still - jnp.diag(sizes)
    probes = still + jnp.column_stack([deviations, kick * jnp.asarray(_PROBES)])
    # All of them in one call, because compiling the step is what takes time.
    inputs = jnp.concatenate([above, below, probes, still[None]])
    after, others = jax.vmap(lambda row: alternatives(row, rest))(inputs)
    rises = jnp.moveaxis(after[:n] - after[n : 2 * n], 0, -1)
    jacobians = rises / jnp.diagonal(above - below)
    deviations = jnp.einsum("pkn,k->pn", after[2 * n : -1] - after[-1], jnp.asarray(weights))
    hidden = jnp.asarray([(leaf[2 * n : -1] != leaf[-1]).any() for leaf in others])
    drifts = (after[-1, :, 0] != 0.0).any()
    return deviations, (jacobians, deviations[:, 0], drifts, hidden.any())


def find_minimum(
    step: StepJacobian, rate: float, *, sharpness: float, held: bool, at_update: int | None
) -> Minimum:
    """Checks that the step is linear, and waits until it is periodic.

    Args:
      step: the linearised train step.
      rate: a learning rate to try. Where x explodes, a smaller one is taken, because the probes
        would grow to gradients that may be clipped.
      sharpness: of the quadratic.
      held: whether floating-point state is held.
      at_update: where to read the state, or None for wherever it settles.

    Raises:
      ValueError: when the step is not linear or does not settle.
    """
    first = max(2 * step.num_steps, at_update or 0)
    for _ in range(300):
        predicted = _respond(step, step.run(rate, first, 0.0))
        if not sharpness * abs(predicted).max() > 10.0:
            break
        rate /= 4.0
    _check_linear(step, rate, first, predicted, held)
    if at_update is not None:
        return _settle(step, rate, [first], _SETTLED_AT)
    octaves = max(1, math.ceil(math.log2(_LONGEST_WAIT / first)))
    return _settle(step, rate, [first << k for k in range(0, octaves + 1, 2)], _SETTLED)


def _check_linear(
    step: StepJacobian, rate: float, start: int, predicted: np.ndarray, held: bool
) -> None:
    """Raises unless finite noise acts as the Jacobian says."""
    remedy = (
        "its optimizer_state must keep the step smooth (no zero preconditioner)"
        if held
        else "pass optimizer_state=, a warmed-up state for a scalar parameter, to hold its "
        "preconditioner fixed"
    )
    if not np.isfinite(predicted).all():
        raise ValueError(
            f"the optimizer is not linear near a minimum, its Jacobian is not finite: {remedy}"
        )
    probe = _LARGEST_HELD_PROBE if held else _LARGEST_PROBE
    stretch = step.run(rate, start, probe)
    if stretch.drifts:
        raise ValueError(
            "the optimizer moves the parameter without any gradient: leave out what adds noise, "
            "and set momenta in optimizer_state= to zero, as in optax.tree.set(state, mu=...)"
        )
    if stretch.hidden:
        raise ValueError(
            "the optimizer keeps values in integers (a half-precision history, quantised state), "
            "which have no Jacobian: use full precision here"
        )
    found = stretch.deviations / (probe * _PROBES)
    error = abs(found - predicted[:, None]).max()
    scale = max(abs(predicted).max(), abs(found).max())
    if not error <= max(_NONLINEAR, 8.0 * step.precision) * scale:
        raise ValueError(
            f"the optimizer is not linear near a minimum: gradients of {probe:g} and less move the "
            f"parameter otherwise than its Jacobian says, by {error / scale:.0%}; {remedy}"
        )


def _respond(step: StepJacobian, stretch: Stretch) -> np.ndarray:
    """By how much unit noise changes x after each update, to first order."""
    if not np.isfinite(stretch.jacobians).all():
        return np.array([np.nan])
    memory = np.zeros(stretch.jacobians.shape[2])
    response = []
    for jacobians, kick in zip(stretch.jacobians, step.noise, strict=True):
        memory = step.weights @ (jacobians @ np.append(memory, kick))
        response.append(memory[0])
    return np.array(response)


def _settle(step: StepJacobian, rate: float, starts: list[int], tolerance: float) -> Minimum:
    """The first of the starts from which the step repeats with a period."""
    for start in starts:
        stretches: list[np.ndarray] = []
        for repeats in range(1, _MOST_REPEATS + 1):
            for k in range(len(stretches), 2 * repeats):
                stretches.append(step.run(rate, start + k * step.num_steps, 0.0).jacobians)
            pairs = zip(stretches[:-repeats], stretches[repeats:], strict=True)
            if all(_close(a, b, tolerance) for a, b in pairs):
                return Minimum(step, start, repeats)
    raise ValueError(
        f"the train step still changes after {starts[-1]} updates: give a schedule that ends, or "
        "at_update=, the update around which to take it as constant; where the optimizer itself "
        "draws random delays, pass it without them and the process as delay"
    )


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Entry by entry: parameters and momenta may have very different units."""
    return bool((abs(a - b) <= tolerance * np.maximum(abs(a), abs(b))).all())


def _num_steps(layout: Layout, num_alternatives: int) -> int:
    """Updates after which every ring is back at its first slot.

    The parameter is a scalar, so whatever has an axis in the state is a ring along it.
    """
    floats = [leaf for leaf in layout.leaves if is_float(leaf)]
    size = sum(math.prod(leaf.shape) for leaf in floats)
    period = math.lcm(*{leaf.shape[0] for leaf in floats if leaf.shape} - {0})
    num_steps = period * math.ceil(_SHORTEST / period)
    if 8 * num_steps * num_alternatives * size * (size + 1) > _MOST_MEMORY:
        raise ValueError(
            f"the delay is too large: the Jacobians of {num_steps} updates of a state of {size} "
            "numbers do not fit into memory; max_learning_rate knows the usual optimizers"
        )
    return num_steps


def _precision(layout: Layout) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in layout.leaves if is_float(leaf))


def _first_that_lowers(traced: Any, concrete: Any) -> Any:
    """`traced` if make_optimizer takes a traced learning rate: then one compilation is enough."""
    try:
        traced.lower(1.0, 1, 0.0)
    except jax.errors.JAXTypeError:
        concrete.lower(1.0, 1, 0.0)
        return concrete
    return traced
