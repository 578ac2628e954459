"""Fully sharded data parallelism by hand: `shard_map`, all-gather, reduce-scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from held import Held
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import asgd_jax

DELAY, NUM_STEPS, NUM_DEVICES, AXIS = 3, 8, 8, "data"
SHAPES = {"w": (16, 3), "v": (3, 8), "b": (3,)}  # DELAY slots do not divide by the devices
SPECS = {"w": P(AXIS), "v": P(None, AXIS), "b": P()}  # shorter than its rank, second axis, whole


def make_params():
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(random.normal(size=shape, scale=0.5), jnp.float32)
        for name, shape in SHAPES.items()
    }


def batch(step):
    random = np.random.default_rng(step)
    return tuple(random.normal(size=(16, size)).astype(np.float32) for size in (16, 8))


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y) ** 2)


def sharded_axis(spec):
    return spec.index(AXIS) if AXIS in spec else None


def gather(leaf, spec):
    if sharded_axis(spec) is None:
        return jax.lax.pcast(leaf, AXIS, to="varying")
    return jax.lax.all_gather(leaf, AXIS, axis=sharded_axis(spec), tiled=True)


def reduce_scatter(grad, spec):
    axis = sharded_axis(spec)
    if axis is None:
        return jax.lax.pmean(grad, AXIS)
    return jax.lax.psum_scatter(grad, AXIS, scatter_dimension=axis, tiled=True) / NUM_DEVICES


def make_step(tx, mesh, state_specs):
    def step(params, state, batch):
        stale = jax.tree.map(gather, asgd_jax.stale_params(state, params), SPECS)
        grads = jax.tree.map(reduce_scatter, jax.grad(loss)(stale, batch), SPECS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(SPECS, state_specs, P(AXIS)), out_specs=(SPECS, state_specs)
    )
    return jax.jit(mapped, donate_argnums=(0, 1))


# every=2 and the last test fail until update_if's zeros have the type of the update they replace.
@pytest.mark.parametrize("every", [1, 2])
def test_fully_sharded(every):
    inner = optax.adam(0.05)
    tx = asgd_jax.delayed(inner, DELAY, every=every)
    mesh = jax.make_mesh((NUM_DEVICES,), (AXIS,))
    params = make_params()
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(params), SPECS, transform_non_params=lambda _: P()
    )
    assert state_specs.history.slots == {"w": P(None, AXIS), "v": P(None, None, AXIS), "b": P(None)}
    assert state_specs.stale == state_specs.inner_state[0].mu == SPECS

    put = lambda tree, specs: jax.tree.map(  # noqa: E731
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )
    params, state = put(params, SPECS), put(tx.init(params), state_specs)
    assert state.history.slots["w"].addressable_shards[0].data.shape == (DELAY, 2, 3)
    step, held = make_step(tx, mesh, state_specs), Held(DELAY)
    for index in range(NUM_STEPS * every):
        held.check(asgd_jax.stale_params(state, params), params, update=index // every)
        data = jax.device_put(batch(index), NamedSharding(mesh, P(AXIS)))
        params, state = step(params, state, data)

    gradient = jax.jit(jax.grad(loss))

    def mean_gradient(params, update):
        several = [gradient(params, batch(every * update + index)) for index in range(every)]
        return jax.tree.map(lambda *leaves: sum(leaves) / every, *several)

    held.check_trajectory(inner, mean_gradient)


def test_named_shardings_and_shapes():
    """The same from an abstract state, with whole shardings instead of specs, for plain jit."""
    mesh = jax.make_mesh((NUM_DEVICES,), (AXIS,))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    tx = optax.chain(
        asgd_jax.delay_gradients(2),
        asgd_jax.delayed(asgd_jax.shifted_sgd(0.1, 0.9, DELAY), DELAY),
    )
    whole = NamedSharding(mesh, P())
    abstract = jax.eval_shape(tx.init, make_params())
    state = optax.tree.map_params(
        tx, lambda _, place: place, abstract, shardings, transform_non_params=lambda _: whole
    )
    rings = (state[0].gradients, state[1].history, state[1].inner_state[0].buffers)
    for ring in rings:
        assert ring.slots["v"].spec == P(None, None, AXIS)
        assert ring.slots["w"].shard_shape((DELAY, *SHAPES["w"])) == (DELAY, 2, 3)
    assert state[1].staleness == whole
    made = jax.jit(tx.init, out_shardings=state)(make_params())
    assert made[1].history.slots["w"].sharding.is_equivalent_to(rings[1].slots["w"], 3)


def test_shardings_in_types():
    """A mesh with explicit axes: JAX checks the sharding of every intermediate, the ring's too."""
    mesh, every = jax.make_mesh((NUM_DEVICES,), (AXIS,)), 2
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    tx = asgd_jax.delayed(optax.sgd(0.3), DELAY, every=every, skip_nonfinite=True)

    @jax.jit
    def step(params, state, batch):
        stale = asgd_jax.stale_params(state, params)
        whole = lambda params: jax.tree.map(lambda leaf: jax.reshard(leaf, P()), params)  # noqa: E731
        grads = jax.grad(lambda stale: loss(whole(stale), batch))(stale)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, stale

    with jax.set_mesh(mesh):
        params = jax.tree.map(jax.device_put, make_params(), SPECS)
        state, held = tx.init(params), Held(DELAY)
        for index in range(NUM_STEPS):
            before, data = params, jax.device_put(batch(index), P(AXIS))
            params, state, stale = step(params, state, data)
            held.check(stale, before, update=index // every)
        assert jax.typeof(state.history.slots["v"]).sharding.spec == P(None, None, AXIS)
