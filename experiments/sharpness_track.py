"""Sharpness along a full-batch run of delayed descent, at the live parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from asgd_jax import curvature
from asgd_jax.curvature import LossFn
from asgd_jax.transforms import update_params
from experiments.edges.minimum import Problem

_TOLERANCE = 1e-3  # relative, of the sharpness


class Sample(NamedTuple):
    """The state of a run after `step` updates: full loss and sharpness at the live parameters."""

    step: int
    loss: float
    sharpness: float


def measuring_steps(num_steps: int, num_samples: int) -> list[int]:
    r"""Returns when to measure: denser early, where sharpness rises, than late, where it hovers.

    Sample i of n stands at $T (i / n)^{3/2}$, rounded; equal ones are dropped.

    Args:
      num_steps: T >= 1, the last one.
      num_samples: n >= 1, not counting step 0.

    Raises:
      ValueError: when either is less than 1.

    >>> measuring_steps(1000, 4)
    [0, 125, 354, 650, 1000]
    """
    if min(num_steps, num_samples) < 1:
        raise ValueError(f"num_steps={num_steps} and num_samples={num_samples} must be >= 1")
    share = np.arange(num_samples + 1) / num_samples
    return sorted({round(num_steps * part) for part in share**1.5})


def make_track(problem: Problem) -> Callable[..., list[Sample]]:
    r"""The function `track(optimizer, steps)`: trains on the whole batch and measures on the way.

    Updates run in one compiled loop between two measurements. Sharpness is the largest eigenvalue
    of the Hessian at the *live* parameters $x_t$, by `curvature.make_sharpness` (ARPACK), each from
    the eigenvector before; the gradients of the run are those at the stale parameters. A run that
    diverges gives samples that are not finite, and no exception.

    Args:
      problem: its one batch is the whole training set.

    Returns:
      `track`, of an optimizer, of the numbers of updates, rising from 0 or more, after which to
      measure, and of parameters to start from (the problem's by default): a `Sample` for each
      measurement. Measuring compiles once for all optimizers, the updates once for each.

    Raises:
      ValueError: when the problem has more than one batch; from `track`, for steps that don't rise.

    >>> import jax.numpy as jnp
    >>> from asgd_jax import delayed
    >>> problem = Problem(lambda x, batch: jnp.sum(batch * x**2), jnp.ones(1), [jnp.ones(1)])
    >>> for sample in make_track(problem)(delayed(optax.sgd(0.25), 0), [0, 1]):
    ...     print(sample)
    Sample(step=0, loss=1.0, sharpness=2.0)
    Sample(step=1, loss=0.25, sharpness=2.0)
    """
    if len(problem.batches) != 1:
        raise ValueError(f"the problem has {len(problem.batches)} batches: pass a single full one")
    loss_fn, initial, (batch,) = problem
    measure = curvature.make_sharpness(loss_fn, tol=_TOLERANCE)
    loss_of = jax.jit(loss_fn)

    def track(
        optimizer: optax.GradientTransformation, steps: Sequence[int], start: Any = None
    ) -> list[Sample]:
        if not steps or min(np.diff([-1, *steps])) < 1:
            raise ValueError(f"steps must rise from 0 or more, got {list(steps)}")
        advance = make_full_batch_advance(loss_fn, optimizer)
        params = initial if start is None else start
        state, done, vector = optimizer.init(params), 0, None
        samples = []
        for step in steps:
            params, state = advance(params, state, batch, step - done)
            top = measure(params, [batch], initial_vector=vector)
            samples.append(Sample(step, float(loss_of(params, batch)), top.value))
            done, vector = step, top.vector
        return samples

    return track


def make_full_batch_advance(
    loss_fn: LossFn, tx: optax.GradientTransformation
) -> Callable[[Any, Any, Any, int], tuple[Any, Any]]:
    """Returns `advance(params, state, batch, num_steps)`, compiled once for any number of steps."""

    @jax.jit
    def advance(params: Any, state: Any, batch: Any, num_steps: int) -> tuple[Any, Any]:
        def gradient(where: Any) -> tuple[Any, None]:
            return jax.grad(loss_fn)(where, batch), None

        def step(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state, _ = update_params(tx, gradient, *carry)
            return params, state

        return jax.lax.fori_loop(0, num_steps, step, (params, state))

    return advance
