"""A ring buffer over a pytree: the last values of every leaf, each leaf with its own depth.

Slot `k` of a leaf lies at index `k % depth`, where the depth is the length of that leaf's first
axis; callers count slots upward for ever. Nothing here knows what the values mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

PyTree = Any


def init_history(tree: PyTree, depth: int, dtype: DTypeLike | None = None) -> PyTree:
    """Returns a ring whose every slot holds a copy of `tree`.

    Args:
      tree: pytree of arrays.
      depth: number of slots.
      dtype: storage dtype of floating-point leaves; their own by default.

    Returns:
      A pytree like `tree` with leaves of shape (depth, *leaf.shape), in fresh buffers: a caller may
      donate `tree` and the ring to the same computation.

    >>> init_history({"w": jnp.array([1.0, 2.0])}, depth=3)["w"].shape
    (3, 2)
    """

    def repeat(leaf: ArrayLike) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        return jnp.repeat(leaf[None], depth, axis=0)

    return jax.tree.map(repeat, tree)


def read_slot(history: PyTree, slot: jax.Array | int) -> PyTree:
    """Returns the pytree stored in slot `slot` (an int32 scalar, traced or not).

    >>> ring = write_slot(init_history(jnp.zeros(2), depth=3), 4, jnp.ones(2))
    >>> read_slot(ring, 4), read_slot(ring, 1)  # 1 and 4 are the same slot of three
    (Array([1., 1.], dtype=float32), Array([1., 1.], dtype=float32))
    """

    def read(ring: jax.Array) -> jax.Array:
        slots = _as_bits(ring)
        old = jax.lax.dynamic_index_in_dim(slots, slot % ring.shape[0], keepdims=False)
        return jax.lax.bitcast_convert_type(old, ring.dtype)

    return jax.tree.map(read, history)


def write_slot(history: PyTree, slot: jax.Array | int, tree: PyTree) -> PyTree:
    """Returns `history` with slot `slot` replaced by `tree`, cast to the ring's dtype.

    XLA does this in place when the ring is donated *and* what is written depends on what was read
    from the ring before. Write such values only, or write first and read the result: with a value
    that could be written early, XLA keeps the old ring alive and copies all of it.
    """

    def write(ring: jax.Array, leaf: ArrayLike) -> jax.Array:
        new = _as_bits(jnp.asarray(leaf).astype(ring.dtype))
        slots = jax.lax.dynamic_update_index_in_dim(
            _as_bits(ring), new, slot % ring.shape[0], axis=0
        )
        return jax.lax.bitcast_convert_type(slots, ring.dtype)

    return jax.tree.map(write, history, tree)


def _as_bits(ring: jax.Array) -> jax.Array:
    """Half-precision values as integers, everything else as it is.

    XLA:CPU has no half-precision arithmetic and turns a slot write into "convert the whole ring to
    float32, write, convert back": a step would then cost as much as the history is long.
    """
    if ring.dtype in (jnp.bfloat16, jnp.float16):
        return jax.lax.bitcast_convert_type(ring, jnp.uint16)
    return ring
