"""Where staleness comes from: delay processes and a simulation of asynchronous workers.

Imports nothing of this package. Start reading at `processes.py`, whose `DelayProcess` all others
take; `workers.py` makes traces for it.
"""

from asgd_jax.delays.blocks import Blocks, rounds_of
from asgd_jax.delays.processes import (
    DelayProcess,
    as_integer,
    as_process,
    below,
    categorical,
    constant,
    discretized_normal,
    expected_staleness,
    from_trace,
    uniform,
    validate_pmf,
)
from asgd_jax.delays.stages import by_stage, pipeline
from asgd_jax.delays.workers import simulate_workers

__all__ = [
    "Blocks",
    "DelayProcess",
    "as_integer",
    "as_process",
    "below",
    "by_stage",
    "categorical",
    "constant",
    "discretized_normal",
    "expected_staleness",
    "from_trace",
    "pipeline",
    "rounds_of",
    "simulate_workers",
    "uniform",
    "validate_pmf",
]
