"""A ring buffer over a pytree: the last values of every leaf.

Slot `k` lies at index `k % depth` of every leaf's first axis; callers count slots upward for ever.
Nothing here knows what the values mean.

The slot axis is the first one, where a write moves one contiguous block and a read another. Tools
that derive an optimizer state's shardings from those of the parameters would put the parameter's
first mesh axis on it; `Ring` and `init_ring` see to it that they leave it whole.

Half-precision values are stored as their bits, bfloat16 in uint16 and float16 in int16: XLA:CPU has
no half-precision arithmetic and turns a slot write into "convert the whole ring to float32, write,
convert back", so that a step would cost as much as the history is long. (Gradients with respect to
the parameters do not pass through such a ring; they do through any other.)
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

PyTree = Any


class Ring(NamedTuple):
    """The slots of every leaf.

    A pytree node of its own, so that `optax.tree.map_params`, asked for the shardings of an
    optimizer state, gives every slot the parameter's own and the slot axis none.

    Attributes:
      slots: pytree like the stored one, with leaves of shape (depth, *leaf.shape); half-precision
        leaves are bits. (What `map_params` is to make of them must be the shardings alone, by
        `lambda _, sharding: sharding`: a function that places arrays sees the slot axis first.)
    """

    slots: PyTree


class _Template:
    """Whether a ring holds no leaves, as one made by optax's placeholder for parameters does."""

    def __init__(self, empty: bool):
        self.empty = empty

    def __eq__(self, other: object) -> bool:  # to JAX, all rings have one structure
        return isinstance(other, _Template)

    def __hash__(self) -> int:
        return hash(_Template)

    def __repr__(self) -> str:  # structures are compared as text, too
        return "Ring"


def _flatten_with_keys(ring: Ring) -> tuple[tuple[Any, ...], _Template]:
    return ((jax.tree_util.GetAttrKey("slots"), ring.slots),), _Template(_is_empty(ring.slots))


def _flatten(ring: Ring) -> tuple[tuple[Any, ...], _Template]:
    return (ring.slots,), _Template(_is_empty(ring.slots))


def _unflatten(template: _Template, children: Iterable[Any]) -> Ring:
    (slots,) = children
    if template.empty:
        # `map_params` replaces the placeholder by what it is asked to make of the slots.
        slots = jax.tree.map(_with_slot_axis, slots, is_leaf=_is_sharding)
    return Ring(slots)


jax.tree_util.register_pytree_with_keys(Ring, _flatten_with_keys, _unflatten, _flatten)


def _is_empty(slots: PyTree) -> bool:
    return not jax.tree.leaves(slots, is_leaf=is_none)


def _is_sharding(node: Any) -> bool:
    return isinstance(node, (PartitionSpec, NamedSharding))


def _with_slot_axis(leaf: Any) -> Any:
    if isinstance(leaf, PartitionSpec):
        return PartitionSpec(None, *leaf)
    return leaf.update(spec=_with_slot_axis(leaf.spec)) if _is_sharding(leaf) else leaf


def init_ring(tree: PyTree, depth: int | PyTree, dtype: DTypeLike | None = None) -> Ring:
    """Returns a ring whose every slot holds a copy of `tree`.

    Args:
      tree: pytree of arrays, or of `jax.ShapeDtypeStruct`s for the shapes of the ring alone. Flax's
        boxes with names of axes (Linen) and variables with a sharding (NNX) get a nameless first
        axis.
      depth: number of slots; or a pytree of ints like `tree`, each leaf's own.
      dtype: storage dtype of floating-point leaves; their own by default.

    Returns:
      A ring in fresh buffers: a caller may donate `tree` and the ring to the same computation.

    >>> init_ring({"w": jnp.array([1.0, 2.0])}, depth=3).slots["w"].shape
    (3, 2)
    """

    def stack(leaf: Any, depth: int) -> Any:
        leaf = jnp.asarray(leaf)
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(jax.dtypes.canonicalize_dtype(dtype))
        return jnp.repeat(_to_bits(leaf)[None], depth, axis=0)

    def stack_node(node: Any, depths: Any) -> Any:
        slots = jax.tree.map(
            lambda leaf, depth: of_shape(partial(stack, depth=depth), leaf), node, depths
        )
        if hasattr(slots, "get_metadata"):  # a variable of Flax NNX
            # The second is that of the optimizer's copies, where it is another.
            for field in ("out_sharding", "optimizer_sharding"):
                if names := slots.get_metadata(field, None):
                    slots.set_metadata(field, (None, *names))
        elif hasattr(slots, "add_axis"):  # a box of Flax Linen
            slots = slots.add_axis(0, {"partition_name": None})
        return slots

    depths = jax.tree.map(lambda _: depth, tree) if isinstance(depth, int) else depth
    is_box = lambda node: hasattr(node, "add_axis")  # noqa: E731
    return Ring(jax.tree.map(stack_node, tree, depths, is_leaf=is_box))


def of_shape(function: Callable[[Any], Any], leaf: Any) -> Any:
    """`function(leaf)`; of a `ShapeDtypeStruct`, the shape of that.

    >>> of_shape(jnp.sum, jax.ShapeDtypeStruct((2,), jnp.float32)).shape
    ()
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(function, leaf)
    return function(leaf)


def write_slot(ring: Ring, slot: jax.Array | int, tree: PyTree) -> Ring:
    """Returns the ring with `tree` in slot `slot`.

    Args:
      ring: as `init_ring` returns.
      slot: int32 scalar, traced or not.
      tree: what to store, in the ring's precision; None for leaves that stay.

    Raises:
      ValueError: for a tree of other leaves than the ring's.
    """

    def write(leaf: Any, slots: jax.Array) -> jax.Array:
        if leaf is None:
            return slots
        leaf, value = jnp.asarray(leaf), _value_dtype(slots, leaf)
        stored = _to_bits(leaf if leaf.dtype == value else leaf.astype(value))
        return jax.lax.dynamic_update_index_in_dim(slots, stored, slot % slots.shape[0], axis=0)

    leaves, _, rings, structure = _paired(tree, ring)
    return Ring(jax.tree.unflatten(structure, map(write, leaves, rings)))


def read_slot(
    ring: Ring, slot: jax.Array | int | Callable[[int], jax.Array | int], like: PyTree
) -> PyTree:
    """Returns the pytree stored in slot `slot`, with the structure and dtypes of `like`.

    Args:
      ring: as `init_ring` returns.
      slot: int32 scalar, traced or not; or a function to it from a leaf's own depth.
      like: pytree with the leaves of what is stored; None in it gives None.

    Raises:
      ValueError: for a tree of other leaves than the ring's.

    >>> ring = write_slot(init_ring(jnp.zeros(2), depth=3), 4, jnp.ones(2))
    >>> read_slot(ring, 4, jnp.zeros(2)), read_slot(ring, 1, jnp.zeros(2))  # one slot of three
    (Array([1., 1.], dtype=float32), Array([1., 1.], dtype=float32))
    """

    def read(leaf: Any, slots: jax.Array) -> jax.Array | None:
        if leaf is None:
            return None
        index = (slot(slots.shape[0]) if callable(slot) else slot) % slots.shape[0]
        stored = jax.lax.dynamic_index_in_dim(slots, index, keepdims=False)
        value = _value_dtype(slots, leaf)
        # Only where there are bits to turn back: JAX sends no gradient through this conversion.
        if stored.dtype != value:
            stored = jax.lax.bitcast_convert_type(stored, value)
        wanted = jnp.asarray(leaf).dtype
        return stored if stored.dtype == wanted else stored.astype(wanted)

    leaves, structure, rings, _ = _paired(like, ring)
    return jax.tree.unflatten(structure, map(read, leaves, rings))


def write_then_read(
    ring: Ring, write: jax.Array | int, tree: PyTree, read: jax.Array | int
) -> tuple[Ring, PyTree]:
    """Writes `tree` into slot `write`, then reads slot `read` from the result, in its dtypes.

    In this order a donated ring is updated in place. Read first and the slices are fused into
    whatever uses them, perhaps after the write: XLA then keeps the old ring alive by copying it.
    """
    ring = write_slot(ring, write, tree)
    return ring, read_slot(ring, read, tree)


def keep_slot_unless(write: bool | jax.Array, ring: Ring, slot: jax.Array, tree: PyTree) -> PyTree:
    """Returns `tree` where `write` holds, else what slot `slot` has, to be written there again.

    A choice between two slots, where one between two rings would copy them.
    """
    if write is True:
        return tree
    old = read_slot(ring, slot, tree)
    return jax.tree.map(lambda new, kept: jnp.where(write, new, kept), tree, old)


def with_value_dtypes(ring: Ring, tree: PyTree) -> PyTree:
    """Returns `tree` with the dtypes of the values in the ring; None stays None."""

    def cast(leaf: Any, slots: jax.Array) -> Any:
        return None if leaf is None else jnp.asarray(leaf).astype(_value_dtype(slots, leaf))

    leaves, structure, rings, _ = _paired(tree, ring)
    return jax.tree.unflatten(structure, map(cast, leaves, rings))


def check_ring(
    ring: Ring,
    depth: int | PyTree,
    owner: str,
    like: PyTree | None,
    dtype: DTypeLike | None = None,
    otherwise: str = (
        "it is the state of another delay; convert it by asgd_jax.resize_history(state, delay)"
    ),
) -> None:
    """Refuses a ring of another depth than `depth`, or that does not store leaves like these.

    Args:
      ring: to be checked.
      depth: number of slots, one for all leaves or a pytree of each one's.
      owner: whose it is, for the message.
      like: the pytree that it stores; None checks the depth only.
      dtype: as given to `init_ring`.
      otherwise: what one of another depth is, and the remedy.

    Raises:
      ValueError: naming the leaf, what it has and what it needs, and the remedy.
    """
    each = jax.tree_util.tree_leaves_with_path(ring.slots)
    depths = [depth] * len(each) if isinstance(depth, int) else jax.tree.leaves(depth)
    # Where their numbers differ, the leaves do: told below.
    for (path, leaf), needed in zip(each, depths, strict=False):
        if leaf.shape[:1] != (needed,):
            raise ValueError(
                f"the state of {owner} has {leaf.shape[0] if leaf.ndim else 0} slots for "
                f"{_name(path)} and its delay needs {needed}: {otherwise}"
            )
    if like is None:
        return
    leaves, _, slots, _ = _paired(like, ring)
    for leaf, stored in zip(leaves, slots, strict=True):
        wanted = None if leaf is None else _stored_dtype(jnp.asarray(leaf), dtype)
        if wanted != getattr(stored, "dtype", None):
            raise ValueError(
                f"the state of {owner} has a history of dtype {getattr(stored, 'dtype', None)} and "
                f"needs {wanted}: it was made with another history_dtype, or something has cast "
                "it, which half precision, kept as bits, does not survive; make it by init(params)"
            )


def resize_ring(ring: Ring, newest: jax.Array | int, depth: int, zeros: int | None = None) -> Ring:
    """Returns a ring of `depth` slots with the same latest values.

    Args:
      ring: its slots newest, newest - 1, ... hold values.
      newest: the last slot that was written, int32.
      depth: number of slots; where there were fewer, the oldest one fills the rest.
      zeros: if given, so many of the oldest slots of a ring that grows, and the rest, become 0.

    >>> ring = Ring(jnp.array([30, 40, 20]))  # of slots 2, 3, 4: slot 2 lies at index 2
    >>> resize_ring(ring, 4, 2).slots, resize_ring(ring, 4, 4).slots
    (Array([40, 30], dtype=int32), Array([40, 20, 20, 30], dtype=int32))
    """

    def resize(slots: jax.Array) -> jax.Array:
        age = (newest - jnp.arange(depth)) % depth  # of the value that belongs at each index
        old = slots.shape[0]
        values = slots[(newest - jnp.minimum(age, old - 1)) % old]
        if zeros is None or depth <= old:
            return values
        known = jnp.expand_dims(age < old - zeros, range(1, values.ndim))
        return jnp.where(known, values, jnp.zeros_like(values))

    return Ring(jax.tree.map(resize, ring.slots))


def _paired(tree: PyTree, ring: Ring) -> tuple[list[Any], Any, list[Any], Any]:
    """Leaves and structure of a tree and of the slots, None counted as a leaf.

    The two are matched by the paths of their leaves, not by structure: a Flax box in the ring has
    one name more than that of its parameter.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    slots, ring_structure = jax.tree_util.tree_flatten_with_path(ring.slots, is_leaf=is_none)
    if [path for path, _ in paths] != [path for path, _ in slots]:
        here, there = ({_name(path) for path, _ in pairs} for pairs in (paths, slots))
        raise ValueError(
            f"the history has leaves {sorted(there - here)} that the tree given does not have, "
            f"which has {sorted(here - there)} instead: initialise the optimizer with the tree "
            "that it is to update"
        )
    for (path, leaf), (_, stored) in zip(paths, slots, strict=True):
        kept = None if stored is None else jnp.shape(stored)[1:]
        if leaf is not None and jnp.shape(leaf) != kept:
            raise ValueError(
                f"{_name(path)} has shape {jnp.shape(leaf)} and its history {kept}: initialise the "
                "optimizer with the tree that it is to update"
            )
    return [leaf for _, leaf in paths], structure, [leaf for _, leaf in slots], ring_structure


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the parameter"


def is_none(node: Any) -> bool:
    """Whether a node is None: a leaf without a value, where None is to count as one."""
    return node is None


_BITS = {
    jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16),
    jnp.dtype(jnp.float16): jnp.dtype(jnp.int16),
}
_VALUES = {bits: value for value, bits in _BITS.items()}


def _stored_dtype(leaf: Any, dtype: DTypeLike | None) -> Any:
    """The dtype of the slots of a leaf."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if not floating:
        return leaf.dtype
    value = leaf.dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    return _BITS.get(jnp.dtype(value), value)


def _value_dtype(slots: Any, like: Any) -> Any:
    """The dtype of the values that are stored of a leaf like this."""
    floating = jnp.issubdtype(jnp.asarray(like).dtype, jnp.floating)
    return _VALUES.get(slots.dtype, slots.dtype) if floating else slots.dtype


def _to_bits(leaf: jax.Array) -> jax.Array:
    bits = None if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else _BITS.get(leaf.dtype)
    return leaf if bits is None else jax.lax.bitcast_convert_type(leaf, bits)
