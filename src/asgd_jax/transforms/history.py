"""A ring buffer over a pytree: the last values of every leaf, each leaf with its own depth.

Slot `k` of a leaf lies at index `k % depth`, where the depth is the length of that leaf's first
axis; callers count slots upward for ever. Nothing here knows what the values mean.

Half-precision values are stored as their bits, in uint16: XLA:CPU has no half-precision arithmetic
and turns a slot write into "convert the whole ring to float32, write, convert back", so that a step
would cost as much as the history is long. (Gradients with respect to the parameters do not pass
through such a ring; they do through any other.)
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
      donate `tree` and the ring to the same computation. Half-precision leaves are uint16 bits.

    >>> init_history({"w": jnp.array([1.0, 2.0])}, depth=3)["w"].shape
    (3, 2)
    """
    return jax.tree.map(
        lambda leaf: jnp.repeat(_pack(jnp.asarray(leaf), dtype)[None], depth, axis=0), tree
    )


def read_slot(
    history: PyTree, slot: jax.Array | int, like: PyTree, dtype: DTypeLike | None = None
) -> PyTree:
    """Returns the pytree stored in slot `slot`, in the dtypes of `like`.

    Args:
      history: as `init_history(tree, depth, dtype)` returns.
      slot: int32 scalar, traced or not.
      like: pytree with the structure and dtypes of `tree`.
      dtype: as given to `init_history`.

    >>> zeros = jnp.zeros(2)
    >>> ring, _ = write_then_read(init_history(zeros, depth=3), 4, jnp.ones(2), 4)
    >>> read_slot(ring, 4, zeros), read_slot(ring, 1, zeros)  # the same slot of three
    (Array([1., 1.], dtype=float32), Array([1., 1.], dtype=float32))
    """
    return jax.tree.map(
        lambda leaf, ring: _unpack(_read(ring, slot), jnp.asarray(leaf), dtype), like, history
    )


def write_then_read(
    history: PyTree,
    write: jax.Array | int,
    tree: PyTree,
    read: jax.Array | int,
    dtype: DTypeLike | None = None,
) -> tuple[PyTree, PyTree]:
    """Writes `tree` into slot `write`, then reads slot `read` from the result.

    In this order a donated ring is updated in place. Read first and the slices are fused into
    whatever uses them, perhaps after the write: XLA then keeps the old ring alive by copying it.

    Args:
      history: as `init_history(tree, depth, dtype)` returns.
      write: int32 scalar.
      tree: what to store.
      read: int32 scalar; may be `write`.
      dtype: as given to `init_history`.

    Returns:
      The new ring, and the pytree in slot `read` in the dtypes of `tree`.
    """

    def turn(leaf: ArrayLike, ring: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaf = jnp.asarray(leaf)
        slots = jax.lax.dynamic_update_index_in_dim(
            ring, _pack(leaf, dtype), write % ring.shape[0], axis=0
        )
        return slots, _unpack(_read(slots, read), leaf, dtype)

    leaves, structure = jax.tree.flatten(tree)
    pairs = [turn(*pair) for pair in zip(leaves, jax.tree.leaves(history), strict=True)]
    rings, old = ([pair[k] for pair in pairs] for k in (0, 1))
    return jax.tree.unflatten(structure, rings), jax.tree.unflatten(structure, old)


def _read(ring: jax.Array, slot: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, slot % ring.shape[0], keepdims=False)


def _storage_dtype(leaf: jax.Array, dtype: DTypeLike | None) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.dtype(dtype) if dtype is not None and floating else leaf.dtype


def _pack(leaf: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    leaf = leaf.astype(_storage_dtype(leaf, dtype))
    half = leaf.dtype in (jnp.bfloat16, jnp.float16)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16) if half else leaf


def _unpack(stored: jax.Array, like: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    storage = _storage_dtype(like, dtype)
    # Only where there are bits to turn back: JAX sends no gradient through this conversion.
    value = stored if stored.dtype == storage else jax.lax.bitcast_convert_type(stored, storage)
    return value.astype(like.dtype)
