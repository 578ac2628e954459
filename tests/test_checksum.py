"""The checksum of arrays: every bit, every place, every dtype, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax.checksum import checksum


def test_every_bit_and_every_order_changes_the_checksum():
    state = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.asarray([[1], [2]], jnp.int32)}
    seen = {int(checksum(state))}
    assert int(checksum(jax.tree.map(jnp.copy, state))) in seen
    for row, column in np.ndindex(2, 3):
        for bit in (0, 17, 31):
            values = np.array(state["a"])
            values.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
            seen.add(int(checksum(state | {"a": jnp.asarray(values)})))
    seen.add(int(checksum(state | {"a": state["a"][::-1]})))
    seen.add(int(checksum(state | {"a": state["a"][:, ::-1]})))
    seen.add(int(checksum(state | {"b": state["b"][::-1]})))
    assert len(seen) == 1 + 18 + 3
    sharded = jax.device_put(
        jnp.arange(16.0).reshape(8, 2),
        jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x")),
    )
    assert int(jax.jit(checksum)(sharded)) == int(checksum(jnp.arange(16.0).reshape(8, 2)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.asarray([1.0, 0.0], jnp.bfloat16), np.asarray([0.0, 1.0], jnp.bfloat16)),
        (np.asarray([True, False]), np.asarray([False, True])),
        (np.asarray([1, 2], np.uint16), np.asarray([1, 3], np.uint16)),
        (np.asarray([1 + 2j, 0]), np.asarray([2 + 1j, 0])),
        (jax.random.key(0), jax.random.key(1)),
    ],
    ids=["bfloat16", "bool", "uint16", "complex", "key"],
)
def test_arrays_of_every_kind_have_one(one, other):
    assert int(checksum(one)) != int(checksum(other))
