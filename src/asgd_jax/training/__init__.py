"""Training: a configuration becomes a `Run`, pure functions that `train` or `sweep` drive.

It may import everything else of the library. Begin with `program.py` (the run), then `loop.py`
(one run, with files) and `sweep.py` (many, compiled together); `config.py` lists every field.
"""

from asgd_jax.training.config import default_config, validate_config
from asgd_jax.training.loop import train
from asgd_jax.training.program import Run, build_run
from asgd_jax.training.setup import Setup, set_up
from asgd_jax.training.state import TrainState, init_state
from asgd_jax.training.step import Batch, StepMetrics, make_train_step

__all__ = [
    "Batch",
    "Run",
    "Setup",
    "StepMetrics",
    "TrainState",
    "build_run",
    "default_config",
    "init_state",
    "make_train_step",
    "set_up",
    "train",
    "validate_config",
]
