"""Delayed (asynchronous) SGD in JAX, and the theory of when it is stable."""

from asgd_jax import delays

__all__ = ["delays"]
