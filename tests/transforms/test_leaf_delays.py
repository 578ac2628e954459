"""Delays by leaf, against a plain Python server that keeps a list of values for every leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asgd_jax

pytestmark = pytest.mark.standard_promotion  # optax's Adam promotes

PARAMS = {
    "embed": jnp.linspace(-1.0, 1.0, 8).reshape(2, 4),
    "blocks": [{"w": jnp.linspace(0.5, 1.5, 4), "b": jnp.array([0.1])} for _ in range(2)],
    "head": jnp.array([0.3, -0.2]),
}
DELAYS = {"embed": 3, "blocks": [{"w": 2, "b": 2}, {"w": 1, "b": 0}], "head": 0}
INNERS = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "clip and schedule": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.sgd(optax.linear_schedule(0.2, 0.01, 50))
    ),
}
NUM_UPDATES = 60


@jax.jit
def gradient(params, step):
    """Every leaf's gradient depends on all leaves."""

    def loss(params):
        leaves = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params)]
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return 0.1 * jnp.sin(sum(leaves) + step) ** 2 + squares / 2

    return jax.grad(loss)(params)


def flat_delays(delays, params):
    return jax.tree.leaves(jax.tree.broadcast(delays, params))


def simulate(inner, delays, params):
    """The trajectory, and the mixed points, with a list of all values of every leaf."""
    leaves, structure = jax.tree.flatten(params)
    past = [[leaf] for leaf in leaves]
    ages = flat_delays(delays, params)
    state, update, mixed = inner.init(params), jax.jit(inner.update), []
    for step in range(NUM_UPDATES):
        stale = [values[-1 - min(age, step)] for values, age in zip(past, ages, strict=True)]
        mixed.append(jax.tree.unflatten(structure, stale))
        live = jax.tree.unflatten(structure, [values[-1] for values in past])
        updates, state = update(gradient(mixed[-1], step), state, live)
        for values, leaf in zip(
            past, jax.tree.leaves(optax.apply_updates(live, updates)), strict=True
        ):
            values.append(leaf)
    return live, optax.apply_updates(live, updates), mixed


def run(tx, params, num_updates=NUM_UPDATES):
    """A loop as users write it."""

    @jax.jit
    def step(params, state, index):
        where = asgd_jax.stale_params(state, params)
        updates, state = tx.update(gradient(where, index), state, params)
        return optax.apply_updates(params, updates), state

    state, points = tx.init(params), []
    for index in range(num_updates):
        points.append(asgd_jax.stale_params(state, params))
        params, state = step(params, state, index)
    assert step._cache_size() == 1
    return params, state, points


def assert_close(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("inner", INNERS)
def test_every_leaf_is_as_old_as_its_own_delay(inner):
    make = INNERS[inner]
    _, expected, mixed = simulate(make(), DELAYS, PARAMS)
    params, _, points = run(asgd_jax.delayed(make(), DELAYS), PARAMS)
    assert_close(points, mixed)
    assert_close(params, expected)


def by_depth(path):
    return 0 if path[0].key == "head" else 2 - len(path) // 2


@pytest.mark.parametrize(
    "delays",
    [
        {"embed": 4, "blocks": 1, "head": 0},
        {"embed": 4, "blocks": [2, {"w": 1, "b": 3}], "head": np.int64(1)},
        by_depth,
    ],
    ids=["prefix", "mixed prefix", "path"],
)
def test_prefixes_and_functions_of_the_path(delays):
    whole = (
        jax.tree_util.tree_map_with_path(lambda path, _: by_depth(path), PARAMS)
        if callable(delays)
        else delays
    )
    _, expected, _ = simulate(INNERS["momentum"](), whole, PARAMS)
    params, _, _ = run(asgd_jax.delayed(INNERS["momentum"](), delays), PARAMS)
    assert_close(params, expected)


def test_equal_delays_are_one_delay():
    equal = run(asgd_jax.delayed(INNERS["adamw"](), {"embed": 3, "blocks": 3, "head": 3}), PARAMS)
    one = run(asgd_jax.delayed(INNERS["adamw"](), 3), PARAMS)
    for left, right in zip(jax.tree.leaves(equal[0]), jax.tree.leaves(one[0]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_no_delay_of_any_leaf_is_the_optimizer_itself():
    tx = asgd_jax.delayed(INNERS["momentum"](), {"embed": 0, "blocks": 0, "head": 0})
    params, state, _ = run(tx, PARAMS)
    assert state.history == ()
    plain, _, _ = run(asgd_jax.delayed(INNERS["momentum"](), 0), PARAMS)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_leaf_takes_as_many_bytes_as_it_has_delays_and_one():
    state = asgd_jax.delayed(optax.sgd(0.1), DELAYS).init(PARAMS)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.history, state.stale)))
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(PARAMS)]
    ages = flat_delays(DELAYS, PARAMS)
    assert held == sum((age + 1) * size for age, size in zip(ages, sizes, strict=True) if age)


def test_the_inner_optimizer_is_told_each_leaf_s_staleness_and_the_mixed_point():
    seen = []

    def update(updates, state, params, *, staleness, stale_params):
        seen.append((staleness, stale_params))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = asgd_jax.delayed(optax.chain(listener, optax.sgd(0.1)), DELAYS)
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(5):
        where = asgd_jax.stale_params(state, params)
        updates, state = tx.update(gradient(where, step), state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda delay: min(delay, step), DELAYS)
        assert jax.tree.map(int, seen[-1][0]) == expected
        assert_close(seen[-1][1], where)


def test_accumulation_and_skipped_gradients_count_updates():
    plain = run(asgd_jax.delayed(optax.sgd(0.1), DELAYS), PARAMS, 10)[0]
    twice = asgd_jax.delayed(optax.sgd(0.1), DELAYS, every=2)
    params, state = PARAMS, twice.init(PARAMS)
    for step in range(20):
        grads = gradient(asgd_jax.stale_params(state, params), step // 2)
        updates, state = twice.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, plain)
    skipping = asgd_jax.delayed(optax.sgd(0.1), DELAYS, skip_nonfinite=True)
    params, state = PARAMS, skipping.init(PARAMS)
    for step in range(20):
        grads = gradient(asgd_jax.stale_params(state, params), step // 2)
        if step % 2:
            grads = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
        updates, state = skipping.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, plain)


def test_half_precision_rounds_the_delayed_leaves_only():
    _, state, points = run(
        asgd_jax.delayed(optax.sgd(0.1), DELAYS, history_dtype=jnp.bfloat16), PARAMS, 8
    )
    stored = {leaf.dtype for leaf in jax.tree.leaves(state.history)}
    assert stored == {jnp.dtype(jnp.uint16)}
    rounded = points[-1]["embed"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(points[-1]["embed"], rounded)


def test_saved_by_orbax_a_run_goes_on_bitwise(tmp_path):
    tx = asgd_jax.delayed(INNERS["adamw"](), DELAYS)
    params, state, _ = run(tx, PARAMS, 7)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at7", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "at7", (PARAMS, tx.init(PARAMS)))
    for left, right in zip(
        jax.tree.leaves(restored), jax.tree.leaves((params, state)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))


def test_optax_derives_the_shardings_of_the_rings():
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    tx = asgd_jax.delayed(optax.sgd(0.1, momentum=0.9), DELAYS)
    specs = jax.tree.map(lambda _: P(), PARAMS)
    specs["embed"] = P("model", None)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.device_put(PARAMS, shardings)
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert mapped.history.slots["embed"].spec == P(None, "model", None)
    assert mapped.inner_state[0].trace["embed"].spec == P("model", None)
    placed = jax.device_put(state, mapped)
    assert placed.history.slots["embed"].sharding.spec == P(None, "model", None)


@pytest.mark.parametrize(
    ("delays", "message"),
    [
        (
            {"embed": -1, "blocks": 0, "head": 0},
            r"delay\['embed'\] must be an integer >= 0, got -1",
        ),
        ({"embed": 0.5, "blocks": 0, "head": 0}, r"delay\['embed'\] must be .*, got 0.5"),
        ({"embed": 1, "head": 0}, r"delay must be .* a prefix of one, or a function.*"),
        ({"embed": 1, "blocks": 1, "head": 0, "tail": 1}, r"delay must be .* a prefix of one"),
        (lambda path: 0.5, r"delay\['blocks'\]\[0\]\['b'\] must be an integer >= 0, got 0.5"),
        (lambda path: -2, r"delay\['blocks'\]\[0\]\['b'\] must be an integer >= 0, got -2"),
    ],
    ids=["negative", "fraction", "missing", "more", "function's fraction", "function's negative"],
)
def test_bad_delays_are_one_line(delays, message):
    with pytest.raises(ValueError, match=message) as error:
        asgd_jax.delayed(optax.sgd(0.1), delays).init(PARAMS)
    assert "\n" not in str(error.value)


def test_a_state_of_other_delays_is_refused():
    state = asgd_jax.delayed(optax.sgd(0.1), DELAYS).init(PARAMS)
    other = asgd_jax.delayed(optax.sgd(0.1), {"embed": 2, "blocks": 1, "head": 0})
    with pytest.raises(ValueError, match=r"slots for .* and its delay needs"):
        other.update(PARAMS, state, PARAMS)
    uniform = asgd_jax.delayed(optax.sgd(0.1), 3)
    with pytest.raises(ValueError, match=r"the history has leaves|slots for"):
        uniform.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"resize_history takes one delay for all leaves"):
        asgd_jax.resize_history(state, 3)
    with pytest.raises(ValueError, match=r"resize_history takes one delay for all leaves"):
        asgd_jax.resize_history(uniform.init(PARAMS), DELAYS)


def test_a_leaf_that_is_none_has_no_delay_and_no_history():
    """As in a filtered Equinox module: trees of delays and rules leave it alone."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    for delay in ({"a": 2, "b": 0, "c": None}, lambda path: 2 if path[0].key == "a" else 0):
        tx = asgd_jax.delayed(optax.sgd(0.5), delay)
        state, point, seen = tx.init(params), params, []
        for _ in range(4):
            where = asgd_jax.stale_params(state, point)
            seen.append((float(where["a"][0]), float(where["b"][0])))
            grads = {"a": where["a"], "b": where["b"], "c": None}
            updates, state = tx.update(grads, state, point)
            point = optax.apply_updates(point, updates)
        assert point["c"] is None
        assert seen == [(1.0, 1.0), (1.0, 0.5), (1.0, 0.25), (0.5, 0.125)]
