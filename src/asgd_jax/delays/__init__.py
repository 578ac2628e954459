"""Where staleness comes from: delay processes and a simulation of asynchronous workers."""

from asgd_jax.delays.processes import (
    DelayProcess,
    as_integer,
    as_process,
    categorical,
    constant,
    discretized_normal,
    from_trace,
    uniform,
    validate_pmf,
)

__all__ = [
    "DelayProcess",
    "as_integer",
    "as_process",
    "categorical",
    "constant",
    "discretized_normal",
    "from_trace",
    "uniform",
    "validate_pmf",
]
