"""Delayed (asynchronous) SGD in JAX, and the theory of when it is stable.

>>> import asgd_jax, optax
>>> tx = asgd_jax.delayed(optax.sgd(0.01), delay=32)
"""

from asgd_jax import compensate, curvature, delays, predict, stability
from asgd_jax.delays import Blocks, DelayProcess
from asgd_jax.transforms import (
    DelayedState,
    DelayGradientsState,
    DelayMetrics,
    Rounds,
    RoundState,
    ShiftedTraceState,
    delay_gradients,
    delayed,
    metrics,
    resize_history,
    rounds,
    shifted_sgd,
    shifted_trace,
    stale_params,
    value_and_grad,
)

__version__ = "0.2.0"

__all__ = [
    "Blocks",
    "DelayGradientsState",
    "DelayMetrics",
    "DelayProcess",
    "DelayedState",
    "RoundState",
    "Rounds",
    "ShiftedTraceState",
    "compensate",
    "curvature",
    "delay_gradients",
    "delayed",
    "delays",
    "metrics",
    "predict",
    "resize_history",
    "rounds",
    "shifted_sgd",
    "shifted_trace",
    "stability",
    "stale_params",
    "value_and_grad",
]
