"""What every transform of the package promises to the rest of optax, in one suite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import asgd_jax
from asgd_jax import delays

TRANSFORMS = {
    "delayed": lambda lr: asgd_jax.delayed(optax.sgd(lr, momentum=0.9), 3),
    "delayed_random": lambda lr: asgd_jax.delayed(optax.sgd(lr), delays.uniform(0, 3), seed=1),
    "delayed_none": lambda lr: asgd_jax.delayed(optax.sgd(lr), 0),
    "delay_gradients": lambda lr: optax.chain(asgd_jax.delay_gradients(3), optax.sgd(lr)),
    "shifted_sgd": lambda lr: asgd_jax.shifted_sgd(lr, 0.9, 3),
    "delayed_shifted": lambda lr: asgd_jax.delayed(asgd_jax.shifted_sgd(lr, 0.9, 3), 3),
}
PARAMS = {"w": jnp.arange(8.0) / 8, "b": jnp.array(0.5)}


@pytest.fixture(params=TRANSFORMS, name="make")
def _make(request):
    return TRANSFORMS[request.param]


def stale(state, params):
    """The parameters of the next gradient, with or without a history."""
    try:
        return asgd_jax.stale_params(state, params)
    except ValueError:
        return params


def run(tx, params=PARAMS, num_steps=10, state=None, start=0, **extra_args):
    """Descends a quadratic with a drifting target; returns the last parameters and state."""
    state = tx.init(params) if state is None else state
    tx = optax.with_extra_args_support(tx)
    for step in range(start, start + num_steps):
        grads = jax.tree.map(
            lambda leaf: leaf - jnp.asarray(np.cos(step), leaf.dtype), stale(state, params)
        )
        updates, state = tx.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def plain(make, rate=0.1, num_steps=10):
    """The parameters of a plain run, op by op, with which others are compared."""
    return run(make(rate), num_steps=num_steps)[0]


def assert_close(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, other)


def test_unknown_extra_args_pass_through(make):
    assert_close(run(make(0.1), value=1.0)[0], plain(make))


def test_structure_shapes_and_dtypes_never_change(make):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
        new_params, state = run(make(0.125), params, num_steps=2)
        before, after = jax.eval_shape(make(0.125).init, params), jax.eval_shape(lambda: state)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), after
        )
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(new_params))


def test_jit_scan_and_a_split_run_agree_with_eager(make):
    tx, params = make(0.1), plain(make)
    jitted, _ = jax.jit(lambda start: run(tx, start))(PARAMS)
    assert_close(params, jitted)
    half, state = run(tx, num_steps=5)
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    resumed, _ = run(tx, half, num_steps=5, state=restored, start=5)
    jax.tree.map(np.testing.assert_array_equal, params, resumed)


def test_the_learning_rate_can_be_injected_and_changed(make):
    tx = optax.inject_hyperparams(make)(lr=0.1)
    assert_close(run(tx)[0], plain(make))
    state = tx.init(PARAMS)
    state.hyperparams["lr"] = jnp.asarray(0.02)
    assert_close(run(tx, state=state)[0], plain(make, 0.02))


@pytest.mark.standard_promotion
def test_schedules_count_updates_on_the_server(make):
    schedule = optax.piecewise_constant_schedule(0.1, {4: 0.5})
    first, state = run(make(schedule), num_steps=4)
    assert_close(first, plain(make, num_steps=4))
    whole, _ = run(make(schedule), first, num_steps=6, state=state, start=4)
    assert not np.allclose(whole["w"], plain(make)["w"])


def test_masked_leaves_are_left_alone(make):
    tx = optax.masked(make(0.1), {"w": True, "b": False})
    state = tx.init(PARAMS)
    stale_b = stale(state, PARAMS)["b"]
    np.testing.assert_array_equal(stale_b, PARAMS["b"])
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = tx.update(grads, state, PARAMS)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    alone = make(0.1)
    expected, _ = alone.update(
        {"w": grads["w"]}, alone.init({"w": PARAMS["w"]}), {"w": PARAMS["w"]}
    )
    np.testing.assert_array_equal(updates["w"], expected["w"])


@pytest.mark.standard_promotion
def test_multi_steps_counts_one_update_per_emission(make):
    every, num_emitted = 3, 6
    tx = optax.MultiSteps(make(0.1), every)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for step in range(every * num_emitted):
        emitted = step // every
        grads = jax.tree.map(lambda leaf: leaf - np.float32(np.cos(emitted)), stale(state, params))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, plain(make, num_steps=num_emitted))


def test_runs_can_be_vmapped_over_learning_rates(make):
    rates = [0.01, 0.1, 0.5]
    together, _ = jax.vmap(lambda rate: run(make(rate)))(jnp.array(rates))
    for index, rate in enumerate(rates):
        assert_close(jax.tree.map(lambda leaf: leaf[index], together), plain(make, rate))


def test_counters_stay_unbatched_under_vmap(make):
    """A batched write index would turn the slot write into a scatter."""

    def counters(rate):
        _, state = run(make(rate), num_steps=3)
        return [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]

    # out_axes=None is an error for anything that vmap has batched.
    jax.vmap(counters, out_axes=None)(jnp.ones(2))


def test_eight_devices_give_the_trajectory_of_one(make):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = {
        "w": NamedSharding(mesh, PartitionSpec("data")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    tx = make(0.1)
    sharded, _ = jax.jit(lambda params: run(tx, params))(jax.device_put(PARAMS, split))
    assert_close(sharded, plain(make))


def test_pmap_keeps_replicas_equal(make):
    tx = make(0.1)
    replicated = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 2, 0), PARAMS)
    params, _ = jax.pmap(lambda start: run(tx, start))(replicated)
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(plain(make)), strict=True):
        np.testing.assert_array_equal(leaf[0], leaf[1])
        np.testing.assert_allclose(leaf[0], expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_delays_and_another_seed_others():
    def trajectory(seed):
        tx = asgd_jax.delayed(optax.sgd(0.3), delays.uniform(0, 5), seed=seed)
        return run(tx, num_steps=20)[0]["w"]

    np.testing.assert_array_equal(trajectory(0), trajectory(0))
    assert not np.array_equal(trajectory(0), trajectory(1))
