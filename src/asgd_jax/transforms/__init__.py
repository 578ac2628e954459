"""Optax transforms with delay."""

from asgd_jax.transforms.delay_gradients import DelayGradientsState, delay_gradients
from asgd_jax.transforms.delayed import DelayedState, delayed, stale_params
from asgd_jax.transforms.momentum import ShiftedTraceState, shifted_sgd, shifted_trace

__all__ = [
    "DelayGradientsState",
    "DelayedState",
    "ShiftedTraceState",
    "delay_gradients",
    "delayed",
    "shifted_sgd",
    "shifted_trace",
    "stale_params",
]
