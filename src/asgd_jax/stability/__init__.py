"""When delayed SGD is stable: thresholds, growth times, learning-rate rules, any optimizer.

May import `delays`, `transforms`, jax, optax, numpy and scipy. Start reading at `characteristic.py`
and `thresholds.py`; the calculator for optimizers begins at `linearize.py`.
"""

from asgd_jax.stability.characteristic import characteristic_polynomial
from asgd_jax.stability.growth import growth_time, spectral_radius
from asgd_jax.stability.linearize import optimizer_max_learning_rate, optimizer_spectral_radius
from asgd_jax.stability.lyapunov import (
    LyapunovExponent,
    LyapunovLearningRate,
    lyapunov_exponent,
    lyapunov_max_learning_rate,
)
from asgd_jax.stability.rules import rescale_learning_rate
from asgd_jax.stability.stages import stages_max_learning_rate, stages_spectral_radius
from asgd_jax.stability.thresholds import max_delay, max_learning_rate, max_sharpness

__all__ = [
    "LyapunovExponent",
    "LyapunovLearningRate",
    "characteristic_polynomial",
    "growth_time",
    "lyapunov_exponent",
    "lyapunov_max_learning_rate",
    "max_delay",
    "max_learning_rate",
    "max_sharpness",
    "optimizer_max_learning_rate",
    "optimizer_spectral_radius",
    "rescale_learning_rate",
    "spectral_radius",
    "stages_max_learning_rate",
    "stages_spectral_radius",
]
