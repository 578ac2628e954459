"""`delayed` in loops and wrappers of other people: gradients are taken at what the loop held."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import strategies as st

import asgd_jax
from asgd_jax import delays

PARAMS = {"w": np.float32([[0.5, -1.0], [2.0, 0.25]]), "b": np.float32([1.0, -0.5])}
TRACE = np.array([0, 1, 3, 2, 0, 4, 1, 5])

pytestmark = pytest.mark.standard_promotion  # some wrappers of optax promote silently

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.3),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5)),
    "plateau": lambda: optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=1)),
}
WRAPPERS = {
    "none": lambda tx: tx,
    "scaled afterwards": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "frozen afterwards": lambda tx: optax.chain(tx, optax.freeze({"w": True, "b": False})),
    "plateau afterwards": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)),
    "kept nonnegative": lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "two groups": lambda tx: optax.multi_transform(
        {"slow": tx, "live": optax.sgd(0.1)}, {"w": "slow", "b": "live"}
    ),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(tx, optax.scale(scale))
    )(scale=0.5),
    "multi steps": lambda tx: optax.GradientTransformationExtraArgs(
        optax.MultiSteps(tx, 3).init, optax.MultiSteps(tx, 3).update
    ),
    "if finite": lambda tx: optax.apply_if_finite(tx, 5),
    "schedule free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "mechanize": optax.contrib.mechanize,
}
MAPS = {
    "none": lambda params, step: params,
    "l2 ball": lambda params, step: optax.projections.projection_l2_ball(params, 1.0),
    "nonnegative": lambda params, step: optax.projections.projection_non_negative(params),
    "clipped": lambda params, step: jax.tree.map(lambda leaf: jnp.clip(leaf, -0.3, 0.3), params),
    "averaged": lambda params, step: (
        params if step % 4 else jax.tree.map(lambda leaf, x: (leaf + x) / 2, params, PARAMS)
    ),
    "rounded": lambda params, step: jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params
    ),
}
DELAYS = {
    "0": 0,
    "1": 1,
    "3": 3,
    "uniform": delays.uniform(0, 4),
    "trace": delays.from_trace(TRACE),
}


def gradient(params, step):
    return jax.tree.map(lambda leaf: leaf - np.cos(step, dtype=np.float32), params)


def delayed_state(state):
    is_one = lambda node: isinstance(node, asgd_jax.DelayedState)  # noqa: E731
    (found,) = (node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node))
    return found


def follow(tx, post=MAPS["none"], num_steps=11, params=PARAMS):
    """A loop that keeps all that it held; checks every gradient's parameters against that."""
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(jnp.asarray, params)
    state, held, ages = tx.init(params), {}, []
    for step in range(num_steps):
        kept = delayed_state(state)
        version, age = int(kept.num_updates), int(kept.staleness)
        held[version] = params
        stale = asgd_jax.stale_params(state, params)
        with_history = {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(kept.stale)
        }
        for (path, leaf), then, now in zip(
            jax.tree_util.tree_leaves_with_path(stale),
            jax.tree.leaves(held[version - age]),
            jax.tree.leaves(params),
            strict=True,
        ):
            expected = then if jax.tree_util.keystr(path) in with_history else now
            np.testing.assert_array_equal(leaf, expected)
        ages.append(age)
        updates, state = tx.update(gradient(stale, step), state, params, value=jnp.float32(1.0))
        params = post(optax.apply_updates(params, updates), step)
    return ages, params


@hypothesis.settings(max_examples=15)  # each takes a second: every operation is its own call
@hypothesis.given(
    wrapper=st.sampled_from(list(WRAPPERS)),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    delay=st.sampled_from(list(DELAYS)),
    post=st.sampled_from(list(MAPS)),
)
def test_gradients_are_taken_at_what_the_loop_held(wrapper, optimizer, delay, post):
    tx = WRAPPERS[wrapper](asgd_jax.delayed(OPTIMIZERS[optimizer](), DELAYS[delay], seed=1))
    follow(tx, MAPS[post])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_with_a_projection(wrapper):
    ages, _ = follow(WRAPPERS[wrapper](asgd_jax.delayed(optax.sgd(0.3), 2)), MAPS["l2 ball"])
    assert max(ages) == 2


def test_parameters_loaded_after_init_are_those_of_the_first_gradients():
    tx = asgd_jax.delayed(optax.sgd(0.0), 3)
    state, loaded = tx.init(jnp.zeros(2)), jnp.ones(2)
    for _ in range(4):
        np.testing.assert_array_equal(asgd_jax.stale_params(state, loaded), loaded)
        _, state = tx.update(jnp.zeros(2), state, loaded)


def test_lookahead_synchronises_and_the_history_follows():
    tx = optax.lookahead(asgd_jax.delayed(optax.sgd(0.3), 2), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.array([1.0, -2.0]))
    state, held = tx.init(params), []
    for step in range(12):
        held.append(params.fast)
        stale = asgd_jax.stale_params(state, params.fast)
        np.testing.assert_array_equal(stale, held[max(step - 2, 0)])
        updates, state = tx.update(gradient(stale, step), state, params)
        params = optax.apply_updates(params, updates)


def test_flattened_parameters_have_their_history_under_another_path():
    tx = optax.flatten(asgd_jax.delayed(optax.sgd(0.1), 3))
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match=r"the parameter has a history and no place in params, "):
        asgd_jax.stale_params(tx.init(params), params)


def test_a_shrinking_delay_process_is_clamped():
    """A process that proposes what it must not never reaches beyond the history."""
    wild = delays.DelayProcess(2, None, lambda key, step: jnp.asarray([7, -3, 2, 1])[step % 4])
    ages, _ = follow(asgd_jax.delayed(optax.sgd(0.1), wild))
    assert ages[:8] == [0, 0, 2, 1, 2, 0, 2, 1]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"params": PARAMS},
            r"\['b'\] has a history and no place in params, which hold \['params'\]\['b'\]",
        ),
        ({"w": PARAMS["w"]}, r"\['b'\] has a history and no place in params, which hold \['w'\]"),
        (
            {"w": PARAMS["w"], "b": np.zeros(3)},
            r"\['b'\] has shape \(3,\) in params and \(2,\) in its",
        ),
    ],
)
def test_stale_params_refuses_what_it_cannot_place(given, match):
    state = asgd_jax.delayed(optax.sgd(0.1), 3).init(jax.tree.map(jnp.asarray, PARAMS))
    with pytest.raises(ValueError, match=match) as error:
        asgd_jax.stale_params(state, given)
    assert "\n" not in str(error.value)


def test_stale_params_refuses_two_networks_at_once():
    tx = asgd_jax.delayed(optax.sgd(0.1), 3)
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match=r"\['b'\] has two histories .* one optimizer's state"):
        asgd_jax.stale_params((tx.init(params), tx.init(params)), params)


def test_leaves_that_appear_later_stay_live():
    state = asgd_jax.delayed(optax.sgd(0.1), 3).init({"w": jnp.zeros(2)})
    stale = asgd_jax.stale_params(state, {"w": jnp.ones(2), "new": jnp.full(1, 7.0)})
    assert float(stale["new"][0]) == 7.0


def test_update_refuses_a_tree_that_it_was_not_initialised_with():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2)
    state = tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"the history has leaves \[\"\['w'\]\"\] that the tree"):
        tx.update({"v": jnp.zeros(2)}, state, {"v": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(3,\) and its history \(2,\)"):
        tx.update({"w": jnp.zeros(3)}, state, {"w": jnp.zeros(3)})


def quadratic(params):
    return 0.5 * jnp.vdot(params, params)


STRICT = {
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2),
    "sam in a chain": lambda: optax.chain(
        optax.clip(1.0), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    ),
    "lbfgs": lambda: optax.lbfgs(learning_rate=0.1, linesearch=None),
    "lbfgs with line search": optax.lbfgs,
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9)),
    "polyak": optax.polyak_sgd,
    "strict": lambda: optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params=None: (-0.1 * updates, state)
    ),
}


@pytest.mark.parametrize("name", STRICT)
def test_optimizers_that_take_no_staleness_are_not_handed_it(name):
    tx = asgd_jax.delayed(STRICT[name](), 2)
    params = jnp.array([1.0, -2.0])
    state, held = tx.init(params), []
    for step in range(5):
        held.append(params)
        stale = asgd_jax.stale_params(state, params)
        np.testing.assert_array_equal(stale, held[max(step - 2, 0)])
        extra = {}
        if "lbfgs" in name or name in ("backtracking", "polyak"):
            extra = {"value": quadratic(params), "grad": params, "value_fn": quadratic}
        updates, state = tx.update(stale, state, params, **extra)
        params = optax.apply_updates(params, updates)


def test_a_type_error_of_the_inner_optimizer_is_its_own():
    def update(updates, state, params=None, **extra):
        raise TypeError("mine")

    tx = asgd_jax.delayed(optax.GradientTransformationExtraArgs(lambda params: (), update), 1)
    with pytest.raises(TypeError, match="mine"):
        tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2))


def test_shapes_give_shapes():
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    for tx in (asgd_jax.delayed(optax.sgd(0.1, 0.9), 3), asgd_jax.delay_gradients(3)):
        state = tx.init(params)
        real = tx.init({"w": jnp.zeros((2, 3))})
        assert jax.tree.structure(state) == jax.tree.structure(real)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, real)
    stale = asgd_jax.delayed(optax.sgd(0.1), 3).init(params).stale
    assert isinstance(stale["w"], jax.ShapeDtypeStruct)


WITH_RINGS = {
    "delay_gradients": lambda: asgd_jax.delay_gradients(2),
    "shifted_trace": lambda: asgd_jax.shifted_trace(0.5, 2),
}


@pytest.mark.parametrize("name", WITH_RINGS)
@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_of_another_dtype_than_the_parameters(name, grad_dtype, param_dtype):
    """Values are small integers, which every dtype here holds exactly."""
    tx = WITH_RINGS[name]()
    params = jnp.zeros(2, param_dtype)
    state, plain = tx.init(params), WITH_RINGS[name]()
    plain_state = plain.init(jnp.zeros(2))
    for step in range(7):
        grads = jnp.full(2, 2.0 * step)
        update, state = tx.update(grads.astype(grad_dtype), state, params)
        expected, plain_state = plain.update(grads, plain_state)
        wanted = grad_dtype if name == "delay_gradients" else param_dtype
        assert update.dtype == wanted
        np.testing.assert_allclose(update.astype(jnp.float32), expected, rtol=0.02)


@pytest.mark.parametrize("name", WITH_RINGS)
def test_frozen_leaves_have_no_gradient(name):
    tx = WITH_RINGS[name]()
    params = {"w": jnp.ones(2), "frozen": jnp.ones(3), "none": None}
    state = tx.init(params)
    alone = WITH_RINGS[name]()
    alone_state = alone.init(jnp.ones(2))
    for step in range(5):
        grads = {"w": jnp.full(2, step + 1.0), "frozen": None, "none": None}
        updates, state = tx.update(grads, state, params)
        expected, alone_state = alone.update(grads["w"], alone_state)
        assert updates["frozen"] is None
        assert updates["none"] is None
        np.testing.assert_array_equal(updates["w"], expected)


def test_an_injected_delay_is_told_to_be_static():
    make = optax.inject_hyperparams(lambda rate, delay: asgd_jax.delayed(optax.sgd(rate), delay))
    with pytest.raises(ValueError, match=r'them in static_args=\("delay", "every", "skip_nonfin'):
        jax.jit(make(rate=0.1, delay=3).init)(jnp.zeros(2))
    direct = optax.inject_hyperparams(
        asgd_jax.delayed, static_args=("delay", "every", "skip_nonfinite")
    )
    follow(direct(optax.sgd(0.1), delay=3))
    shifted = optax.inject_hyperparams(asgd_jax.shifted_sgd)(0.1, momentum=0.9, delay=3)
    with pytest.raises(ValueError, match=r'name it in static_args=\("delay",\)'):
        jax.jit(shifted.init)(jnp.zeros(2))
    tx = optax.inject_hyperparams(
        lambda rate, delay: asgd_jax.delayed(optax.sgd(rate), delay), static_args=("delay",)
    )(rate=0.1, delay=3)
    follow(tx)


def test_names_of_optax_are_the_inner_optimizers_own():
    params = jnp.zeros(2)
    for inner in (optax.adam(0.1), optax.sgd(0.1, 0.9), asgd_jax.shifted_sgd(0.1, 0.9, 3)):
        state = asgd_jax.delayed(inner, 3).init(params)
        for name in ("count", "trace", "mu", "nu"):
            alone, inside = optax.tree.get(inner.init(params), name), optax.tree.get(state, name)
            assert (alone is None) == (inside is None)
        assert int(optax.tree.get(state, "num_updates")) == 0


def test_a_half_precision_history_that_was_cast_is_refused():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2, history_dtype=jnp.bfloat16)
    params = jnp.full(2, 1.5)
    state = tx.init(params)
    cast = state._replace(history=optax.tree.cast(state.history, jnp.float32))
    with pytest.raises(ValueError, match=r"history of dtype float32 and needs uint16: it was made"):
        tx.update(params, cast, params)


def test_shifted_momentum_of_another_delay_is_refused():
    tx = asgd_jax.delayed(asgd_jax.shifted_sgd(0.1, 0.9, 4), 8)
    params = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"max_delay=4 inside delayed of max_delay=8: give both"):
        tx.update(params, tx.init(params), params)


def test_a_constant_delay_can_be_data():
    """One vmap over delays is as many runs, each of its own delay."""

    def run(process):
        tx = asgd_jax.delayed(optax.sgd(0.3), process)

        def step(carry, index):
            params, state = carry
            grads = asgd_jax.stale_params(state, params) - jnp.cos(jnp.float32(index))
            updates, state = tx.update(grads, state, params)
            return (params + updates, state), params

        params = jnp.array([1.0, -1.0])
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20))[1]

    together = jax.vmap(lambda delay: run(delays.constant(delay, max_delay=7)))(jnp.arange(8))
    for delay in (0, 1, 4, 7):
        np.testing.assert_allclose(together[delay], run(delay), rtol=1e-6)
    with pytest.raises(ValueError, match=r"delay=9 is beyond max_delay=8: pass max_delay=9"):
        delays.constant(9, max_delay=8)
    with pytest.raises(ValueError, match=r"traced value"):
        jax.vmap(lambda delay: run(delays.constant(delay)))(jnp.arange(3))
    with pytest.raises(ValueError, match=r"delay must be an integer scalar, got float32"):
        jax.vmap(lambda delay: run(delays.constant(delay, max_delay=3)))(jnp.arange(3.0))


def test_shifted_momentum_beside_a_strict_neighbour_is_refused():
    params = jnp.zeros(2)
    strict = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params=None: (updates, state)
    )
    tx = asgd_jax.delayed(optax.chain(strict, asgd_jax.shifted_sgd(0.1, 0.9, 4)), 8)
    with pytest.raises(ValueError, match=r"max_delay=4 inside delayed of max_delay=8"):
        tx.update(params, tx.init(params), params)
    for delay in (4, delays.uniform(0, 4)):  # nor may it guess its staleness
        tx = asgd_jax.delayed(optax.chain(strict, asgd_jax.shifted_sgd(0.1, 0.9, delay)), delay)
        with pytest.raises(ValueError, match=r"takes no extra arguments, so that it cannot be"):
            tx.update(params, tx.init(params), params)


def test_an_inner_is_handed_what_it_names():
    def update(updates, state, params=None, *, staleness):
        return updates * (1 + staleness), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = asgd_jax.delayed(inner, 2)
    state, seen = tx.init(jnp.zeros(())), []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
        seen.append(float(updates))
    assert seen == [1.0, 2.0, 3.0, 3.0]


def test_a_jitted_inner_optimizer_works():
    inner = asgd_jax.shifted_sgd(0.1, 0.9, 3)
    jitted = optax.GradientTransformationExtraArgs(inner.init, jax.jit(inner.update))
    _, params = follow(asgd_jax.delayed(jitted, 3))
    _, expected = follow(asgd_jax.delayed(inner, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)


def test_two_delays_of_the_parameters_are_refused():
    tx = asgd_jax.delayed(asgd_jax.delayed(optax.sgd(0.1), 2), 3)
    with pytest.raises(ValueError, match="delayed inside delayed"):
        tx.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="delayed inside delayed"):
        asgd_jax.delayed(asgd_jax.delayed(optax.sgd(0.1), 2), 0).init(jnp.zeros(2))
    one = asgd_jax.delayed(asgd_jax.delayed(optax.sgd(0.1), 0), 3)
    _, params = follow(one)
    _, expected = follow(asgd_jax.delayed(optax.sgd(0.1), 3))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_states_of_several_runs_may_be_stacked():
    """As many runs as parameters: a mask of runs must not be taken for one of parameters."""
    tx, params = asgd_jax.delayed(optax.sgd(0.1), delays.from_trace([0, 1])), jnp.ones(2)
    first, live = tx.init(params), jnp.full(2, 5.0)
    _, later = tx.update(jnp.zeros(2), first, params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, later)
    stale = asgd_jax.stale_params(stacked, jnp.stack([live, live]))
    np.testing.assert_array_equal(stale, [[5.0, 5.0], [1.0, 1.0]])


def test_the_two_half_precisions_are_told_apart():
    params = jnp.full(2, 1.5)
    state = asgd_jax.delayed(optax.sgd(0.1), 2, history_dtype=jnp.bfloat16).init(params)
    with pytest.raises(ValueError, match=r"history of dtype uint16 and needs int16"):
        asgd_jax.delayed(optax.sgd(0.1), 2, history_dtype=jnp.float16).update(params, state, params)
    wide = asgd_jax.delayed(optax.sgd(0.1), 2, history_dtype=float)  # float64 is float32 here
    wide.update(params, wide.init(params), params)


def test_stale_parameters_have_the_dtype_of_the_live_ones():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2)
    state = tx.init(jnp.ones(2))
    assert asgd_jax.stale_params(state, jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_one_byte_floats_are_no_history():
    with pytest.raises(
        ValueError, match=r"history_dtype must be a floating-point dtype of 16 bits"
    ):
        asgd_jax.delayed(optax.sgd(0.1), 2, history_dtype=jnp.float8_e5m2)


def test_random_keys_among_the_parameters_are_kept():
    params = {"w": jnp.ones(2), "key": jax.random.key(3)}
    tx = asgd_jax.delayed(optax.set_to_zero(), 2)
    state = tx.init(params)
    stale = asgd_jax.stale_params(state, params)
    np.testing.assert_array_equal(
        jax.random.key_data(stale["key"]), jax.random.key_data(params["key"])
    )


def test_processes_are_held_to_what_they_promise():
    with pytest.raises(ValueError, match=r"max_delay must be an integer >= 0, got 2.5"):
        asgd_jax.delayed(optax.sgd(0.1), delays.DelayProcess(2.5, None, lambda key, step: step))
    for wrong in (jnp.zeros(1, jnp.int32), jnp.float32(1.9)):
        process = delays.DelayProcess(2, None, lambda key, step, wrong=wrong: wrong)
        tx = asgd_jax.delayed(optax.sgd(0.1), process)
        with pytest.raises(
            ValueError, match=r"must sample an integer scalar, got (int32\[1|float32)"
        ):
            tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
    small = jax.jit(lambda k: delays.constant(k, max_delay=200).sample(None, 0))(jnp.int8(100))
    assert int(small) == 100


def test_a_parameter_that_is_left_out_of_one_update_is_refused():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2)
    state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    grads = {"a": jnp.zeros(2), "b": None}
    with pytest.raises(ValueError, match=r"history of dtype float32 and needs None"):
        tx.update(grads, state, {"a": jnp.zeros(2), "b": None})


def test_an_aggregator_of_gradients_by_element_is_delayed_as_any_optimizer():
    from optax.experimental import aggregating

    mean = aggregating.average_per_element_updates(per_elt_axis=0)
    tx = asgd_jax.delayed(optax.chain(mean, optax.sgd(0.1)), 2)
    params = jnp.array([1.0, -2.0])
    state, held = tx.init(params), []
    for step in range(6):
        held.append(params)
        stale = asgd_jax.stale_params(state, params)
        np.testing.assert_array_equal(stale, held[max(step - 2, 0)])
        by_element = jnp.stack([stale - 1.0, stale + 3.0])
        updates, state = tx.update(by_element, state, params)
        np.testing.assert_allclose(updates, -0.1 * (stale + 1.0), rtol=1e-6)
        params = optax.apply_updates(params, updates)
