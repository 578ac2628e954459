"""Curvature of a loss over a fixed set of batches, for any JAX program: it forms no Hessian.

Imports jax, numpy and scipy only. Start reading at `hessian_vector.py`, which defines what is
measured, then `lanczos.py`, which finds the largest eigenvalue.
"""

from asgd_jax.curvature.hessian_vector import LossFn as LossFn
from asgd_jax.curvature.hessian_vector import hessian_vector_product
from asgd_jax.curvature.lanczos import Sharpness, make_sharpness, sharpness

__all__ = [
    "Sharpness",
    "hessian_vector_product",
    "make_sharpness",
    "sharpness",
]
