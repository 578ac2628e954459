"""Curvature of a loss over a fixed set of batches, for any JAX program: it forms no Hessian.

Imports jax, numpy, scipy and optax only. Start reading at `hessian_vector.py`, which defines what
is measured, then `lanczos.py`, which finds the largest eigenvalue; `eigenpairs.py` has the top
ones, `spectrum.py` trace and density of all.
"""

from asgd_jax.curvature.eigenpairs import Eigenpairs, eigenpairs
from asgd_jax.curvature.hessian_vector import GaussNewton, hessian_vector_product
from asgd_jax.curvature.hessian_vector import LossFn as LossFn
from asgd_jax.curvature.lanczos import Sharpness, make_sharpness, sharpness
from asgd_jax.curvature.preconditioner import adam_preconditioner
from asgd_jax.curvature.spectrum import Density, Trace, spectral_density, trace

__all__ = [
    "Density",
    "Eigenpairs",
    "GaussNewton",
    "Sharpness",
    "Trace",
    "adam_preconditioner",
    "eigenpairs",
    "hessian_vector_product",
    "make_sharpness",
    "sharpness",
    "spectral_density",
    "trace",
]
