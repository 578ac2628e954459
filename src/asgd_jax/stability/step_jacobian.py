r"""The Jacobians of an implemented train step at a minimum, and its response to finite noise.

With z the parameter and all floating-point state, the update n maps z to $F_n(z, \xi)$, where
$\xi$ is noise in the gradient.
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
    hold,
    is_float,
    jit_over_rate,
    run_user_code,
)
from asgd_jax.transforms.history import Ring

# Noise in the gradient (and displacement of x, times the sharpness) at which the step is tried,
# relative to the largest one: |g| is not linear. The smallest may meet a displacement that nearly
# cancels it, and methods that divide by the squared gradient stop where that is below 2e-16.
PROBES = np.array([1.0, -1.0, 1e-2])
# Differences around zero, and around anything else. Methods that divide by the squared gradient
# stop where it is below the precision of a double; next to a held state 1e-6 may be large.
_TINY, _TINY_HELD, _RELATIVE = 1e-6, 1e-20, 1e-5
_SHORTEST = 4  # updates a stretch: enough for the state to act on x, and x on the state
_MOST_MEMORY = 2**30  # bytes of Jacobians
RANDOM_DELAYS = (
    "where the optimizer itself draws random delays, pass it without them and the process as delay"
)
_HORIZON = 2**13  # updates in which a counter that starts again must do so


class Stretch(NamedTuple):
    """Consecutive updates, linearised.

    Attributes:
      jacobians: float64, shape (num_steps, num_alternatives, n, n + 1): the derivatives of z' with
        respect to z, of which x is the first entry, and to the noise.
      deviations: float64, shape (num_steps, 3): by how much x differs after each update when it
        starts at the probes / a and the gradients carry them as noise; not linearised.
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
      step: the train step.
      num_steps: length of a stretch, a common multiple of the periods of all that repeats.
      ramp: updates after which no gradient is younger than its delay says.
      weights: probability of each alternative of an update, shape (num_alternatives,).
      noise: shape (num_steps,), the pattern of the probes.
      precision: relative precision of the coarsest floating-point number in the state.
      start: `step.start`, compiled.
      compiled: `run` with that start and whether it is held as arguments.
    """

    step: QuadraticStep
    num_steps: int
    ramp: int
    weights: np.ndarray
    noise: np.ndarray
    precision: float
    start: Callable[[float], Memory]
    compiled: Callable[..., tuple[jax.Array, ...]]

    def held_at(self, given: Memory) -> "StepJacobian":
        """The same step with its state held; it need not be compiled again."""
        held = hold(self.step, given)
        return self._replace(step=held, start=jit_over_rate(held.start))

    def run(self, rate: float, first: int, probe: float) -> Stretch:
        """From update `first` on, with noise of up to `probe` in the probes."""
        found = self.compiled(rate, first, probe, self.start(rate), self.step.held)
        jacobians, deviations, drifts, hidden = map(np.asarray, found)
        return Stretch(jacobians, deviations, bool(drifts.any()), bool(hidden.any()))


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
    num_steps = _num_steps(step, 1 if average else weights.size)
    longest = max((leaf.shape[0] for leaf in step.layout.leaves if leaf.shape), default=0)
    ramp = 2 * num_steps * (longest + 1)
    noise = np.cos(1.0 + 2.0 * np.arange(num_steps))

    def stretch(
        rate: Any, first: Any, probe: Any, start: Memory, held: Any
    ) -> tuple[jax.Array, ...]:
        def alternatives(inputs: jax.Array, rest: list[jax.Array]) -> Memory:
            memory, kick = (inputs[:-1], rest), inputs[-1]
            if choices is None:
                vector, others = step.advance(rate, memory, kick)
                return vector[None], others
            each, others = jax.vmap(lambda k: step.advance(rate, memory, kick, k))(choices)
            return (jnp.asarray(weights) @ each)[None] if average else each, others

        def keep(before: Memory, after: Memory) -> Memory:
            return jnp.where(held, before[0], after[0]), after[1]

        def advance(memory: Memory) -> Memory:
            return keep(memory, step.advance(rate, memory, 0.0))

        def body(carry: Any, kick: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
            memory, deviations = carry
            following, deviations, result = _differentiate(
                alternatives, memory, deviations, kick, used, jnp.where(held, _TINY_HELD, tiny)
            )
            # Of random delays the state knows its own, which none of the alternatives need be.
            after = keep(memory, following) if choices is None else advance(memory)
            return (after, deviations), result

        memory = jax.lax.fori_loop(0, first, lambda _, m: advance(m), start)
        deviations = (
            jnp.zeros((PROBES.size, memory[0].size)).at[:, 0].set(probe / step.sharpness * PROBES)
        )
        return jax.lax.scan(body, (memory, deviations), probe * noise)[1]

    used = np.ones(1) if average else weights
    # Parameters and gradients have different units.
    tiny = np.array([_TINY if name else _TINY / step.sharpness for name in step.layout.names])
    tiny = np.append(tiny, _TINY)
    start = jit_over_rate(step.start)
    compiled = run_user_code(lambda: jit_over_rate(stretch, 1, 0.0, start(1.0), False))
    return StepJacobian(
        step, num_steps, ramp, used, noise, _precision(step.layout), start, compiled
    )


def _differentiate(
    alternatives: Callable[[jax.Array, list[jax.Array]], Memory],
    memory: Memory,
    deviations: jax.Array,
    kick: jax.Array,
    weights: np.ndarray,
    tiny: jax.Array,
) -> tuple[Memory, jax.Array, tuple[jax.Array, ...]]:
    """The next memory (of the first alternative), the next deviations, and the fields of a
    `Stretch` for this update.

    Central differences of a linear function have no truncation error, and around 0 no cancellation:
    they are as good as derivatives, and see through `stop_gradient` and bit casts.
    """
    vector, rest = memory
    still = jnp.append(vector, 0.0)
    n = still.size
    sizes = jnp.where(still == 0.0, tiny, _RELATIVE * jnp.abs(still))
    above, below = still + jnp.diag(sizes), still - jnp.diag(sizes)
    probes = still + jnp.column_stack([deviations, kick * jnp.asarray(PROBES)])
    # All of them in one call, because compiling the step is what takes time.
    inputs = jnp.concatenate([above, below, probes, still[None]])
    after, others = jax.vmap(lambda row: alternatives(row, rest))(inputs)
    rises = jnp.moveaxis(after[:n] - after[n : 2 * n], 0, -1)
    jacobians = rises / jnp.diagonal(above - below)
    deviations = jnp.einsum("pkn,k->pn", after[2 * n : -1] - after[-1], jnp.asarray(weights))
    hidden = jnp.asarray([(leaf[2 * n : -1] != leaf[-1]).any() for leaf in others])
    drifts = (after[-1, :, 0] != 0.0).any()
    following = after[-1, 0], [leaf[-1] for leaf in others]
    return following, deviations, (jacobians, deviations[:, 0], drifts, hidden.any())


def _num_steps(step: QuadraticStep, num_alternatives: int) -> int:
    """Updates after which every counter and every foreign ring is back at its start.

    The parameter is a scalar, so whatever has an axis in the state is a ring along it.
    """
    size = sum(math.prod(leaf.shape) for leaf in step.layout.leaves if is_float(leaf))
    tree = jax.tree.unflatten(step.layout.structure, step.layout.leaves)
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Ring))
    others = [leaf for leaf in nodes if not isinstance(leaf, Ring) and is_float(leaf)]
    rings = math.lcm(*{leaf.shape[0] for leaf in others if leaf.shape} - {0})
    period = math.lcm(rings, *_counter_periods(step))
    num_steps = period * math.ceil(_SHORTEST / period)
    if 8 * num_steps * num_alternatives * size * (size + 1) > _MOST_MEMORY:
        raise ValueError(
            f"the delay is too large: the Jacobians of {num_steps} updates of a state of {size} "
            "numbers do not fit into memory; max_learning_rate knows the usual optimizers"
        )
    return num_steps


def _counter_periods(step: QuadraticStep) -> set[int]:
    """Periods of the counters that start again, as those of accumulation and lookahead do."""
    if not step.layout.counters:
        return set()

    def body(memory: Memory, _: None) -> tuple[Memory, jax.Array]:
        after = step.advance(rate, memory, 0.0)
        return after, jnp.array([after[1][k].astype(int) for k in step.layout.counters])

    rate = 1.0 / step.sharpness
    scan = jax.jit(lambda memory: jax.lax.scan(body, memory, None, length=_HORIZON)[1])
    counts = np.asarray(run_user_code(lambda: scan(step.start(rate))))
    return {_period(count) for count in counts.T if (np.diff(count) < 0).any()}


def _period(count: np.ndarray) -> int:
    tail = count[count.size // 2 :]
    for period in range(1, tail.size // 2):
        if (tail[period:] == tail[:-period]).all():
            return period
    raise ValueError(
        f"a counter in the optimizer's state does not repeat in {count.size} updates: accumulate "
        f"or synchronise more often; {RANDOM_DELAYS}"
    )


def _precision(layout: Layout) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in layout.leaves if is_float(leaf))
