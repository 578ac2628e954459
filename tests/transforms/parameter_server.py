"""The oracle: a parameter server in plain Python that keeps every parameter set in a list."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax


def simulate(
    inner: optax.GradientTransformation,
    staleness: Sequence[int],
    params: object,
    gradient: Callable[[object, int], object],
    *,
    tell: bool = False,
) -> list[object]:
    """Returns [x_0, x_1, ...]: update t applies the gradient of batch t at x_{t - staleness[t]}.

    With `tell` the optimizer is told staleness= and stale_params=.
    """
    trajectory = [params]
    state = inner.init(params)
    apply = _apply(inner.update)
    for step, age in enumerate(staleness):
        assert age <= step, "no gradient is older than the run"
        grads = gradient(trajectory[step - age], step)
        told = {"staleness": jnp.int32(age), "stale_params": trajectory[step - age]} if tell else {}
        new_params, state = apply(grads, state, trajectory[-1], told)
        trajectory.append(new_params)
    return trajectory


@functools.cache
def _apply(update: Callable):
    """Jitted only because the oracle would otherwise take most of the suite's time."""

    def apply(grads, state, params, told):
        updates, state = update(grads, state, params, **told)
        return optax.apply_updates(params, updates), state

    return jax.jit(apply)


def simulate_worker_momentum(
    schedule: Sequence[int],
    params: jax.Array,
    gradient: Callable[[jax.Array, int], jax.Array],
    learning_rate: float,
    momentum: float,
    dampening: bool,
) -> tuple[list[jax.Array], list[int]]:
    """One momentum buffer per worker; `schedule` names the worker of each push.

    Returns the trajectory and the staleness of each push.
    """
    pulled: dict[int, tuple[int, jax.Array]] = {}
    buffers: dict[int, jax.Array] = {}
    trajectory, staleness = [params], []
    for step, worker in enumerate(schedule):
        version, old = pulled.get(worker, (0, trajectory[0]))
        staleness.append(step - version)
        gain = 1 - momentum if dampening else 1.0
        buffers[worker] = momentum * buffers.get(worker, jnp.zeros_like(params)) + gain * gradient(
            old, step
        )
        trajectory.append(trajectory[-1] - learning_rate * buffers[worker])
        pulled[worker] = (step + 1, trajectory[-1])
    return trajectory, staleness
