"""PipeMare's learning rates: the delay is paid for at the start of training only."""

from typing import Any

import jax.numpy as jnp
import optax


def pipemare_schedule(
    learning_rate: optax.ScalarOrSchedule, delay: int, num_steps: int
) -> optax.Schedule:
    r"""A learning rate that begins at the one over tau and rises to its own.

    $$\eta_k = \eta_0 / \tau^{p_k}, \qquad p_k = 1 - \min(k / K, 1)$$

    Where stages differ in their delays, each has a schedule of its own (`optax.partition`).

    Args:
      learning_rate: eta_0, a number or a schedule.
      delay: tau, int >= 0; 0 and 1 change nothing.
      num_steps: K >= 1, steps of the first phase.

    Raises:
      ValueError: for a delay or number of steps out of range.

    >>> [round(float(pipemare_schedule(0.8, 4, 10)(step)), 6) for step in (0, 5, 10, 99)]
    [0.2, 0.4, 0.8, 0.8]

    References:
      Yang et al., "PipeMare: Asynchronous Pipeline Parallel DNN Training", MLSys 2021, technique 1.
    """
    if not (isinstance(delay, int) and delay >= 0):
        raise ValueError(f"delay must be an integer >= 0, got {delay!r}")
    if not (isinstance(num_steps, int) and num_steps >= 1):
        raise ValueError(f"num_steps must be an integer >= 1, got {num_steps!r}")

    def schedule(count: Any) -> Any:
        whole = learning_rate(count) if callable(learning_rate) else learning_rate
        power = 1.0 - jnp.minimum(jnp.asarray(count, jnp.float32) / num_steps, 1.0)
        return whole / max(delay, 1) ** power

    return schedule
