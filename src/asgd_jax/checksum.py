"""A checksum of a pytree of arrays, computed on the devices where they are."""

from typing import Any

import jax
import jax.numpy as jnp


def checksum(tree: Any) -> jax.Array:
    """Returns 32 bits, a uint32 scalar, that depend on every bit of every array and on its place.

    A hash on the host would have to fetch everything. Under `jit`, sharded arrays stay sharded.

    >>> first, second = checksum(jnp.array([0.0, 1.0])), checksum(jnp.array([1.0, 0.0]))
    >>> bool(first == checksum(jnp.array([0.0, 1.0]))), bool(first == second)
    (True, False)
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        bits = _bits(jnp.asarray(leaf))
        # Every position scrambles its bits in a way of its own, and one to one: no single change,
        # and hardly a swap, goes unnoticed.
        weight = jnp.ones(bits.shape, jnp.uint32)
        stride = 2
        for axis in reversed(range(bits.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            weight += index * jnp.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        mixed = _scramble(bits ^ (weight * jnp.uint32(0x9E3779B9)))
        total = total * jnp.uint32(1_000_003) + jnp.sum(mixed, dtype=jnp.uint32)
    return total


def _scramble(bits: jax.Array) -> jax.Array:
    """The final mix of MurmurHash3, a bijection of 32-bit words."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _bits(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
