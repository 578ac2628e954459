"""Optax transforms with delay."""

from asgd_jax.transforms.delay_gradients import DelayGradientsState, delay_gradients
from asgd_jax.transforms.delayed import DelayedState, delayed
from asgd_jax.transforms.momentum import ShiftedTraceState, shifted_sgd, shifted_trace
from asgd_jax.transforms.resize import resize_history
from asgd_jax.transforms.stale import stale_params

__all__ = [
    "DelayGradientsState",
    "DelayedState",
    "ShiftedTraceState",
    "delay_gradients",
    "delayed",
    "resize_history",
    "shifted_sgd",
    "shifted_trace",
    "stale_params",
]
