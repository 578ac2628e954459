"""Optax transforms with delay: gradients at parameters from the past, and shifted momentum.

Imports `delays` only. Begin with `delayed.py` (what a loop wraps its optimizer in); `history.py` is
the ring under it, `stale.py` what the loop asks, `update.py` one update from one end to the other.
"""

from asgd_jax.transforms.delay_gradients import DelayGradientsState, delay_gradients
from asgd_jax.transforms.delayed import DelayedState, delayed
from asgd_jax.transforms.momentum import ShiftedTraceState, shifted_sgd, shifted_trace
from asgd_jax.transforms.resize import resize_history
from asgd_jax.transforms.round_server import Rounds, RoundState
from asgd_jax.transforms.rounds import rounds
from asgd_jax.transforms.stale import has_history, stale_params
from asgd_jax.transforms.stale_gradient import (
    DelayMetrics,
    distance_to_stale,
    metrics,
    value_and_grad,
)
from asgd_jax.transforms.update import delayed_sgd, momentum_of, update_params

__all__ = [
    "DelayGradientsState",
    "DelayMetrics",
    "DelayedState",
    "RoundState",
    "Rounds",
    "ShiftedTraceState",
    "delay_gradients",
    "delayed",
    "delayed_sgd",
    "distance_to_stale",
    "has_history",
    "metrics",
    "momentum_of",
    "resize_history",
    "rounds",
    "shifted_sgd",
    "shifted_trace",
    "stale_params",
    "update_params",
    "value_and_grad",
]
