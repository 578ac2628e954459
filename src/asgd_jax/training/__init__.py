"""The train step, its loop, metrics and evaluation."""

from asgd_jax.training.config import default_config, validate_config
from asgd_jax.training.evaluate import make_evaluate
from asgd_jax.training.loop import train
from asgd_jax.training.setup import Setup, set_up
from asgd_jax.training.state import TrainState, init_state
from asgd_jax.training.step import Batch, StepMetrics, make_train_step

__all__ = [
    "Batch",
    "Setup",
    "StepMetrics",
    "TrainState",
    "default_config",
    "init_state",
    "make_evaluate",
    "make_train_step",
    "set_up",
    "train",
    "validate_config",
]
