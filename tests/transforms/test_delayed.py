"""`delayed` against a parameter server that keeps every parameter set in a Python list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameter_server import simulate
from problems import PARAMS, batch, gradient, loss

import asgd_jax
from asgd_jax import delays

NUM_STEPS = 50
INNER = {
    "sgd": lambda: optax.sgd(0.05),
    "heavy_ball": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.02),
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
}
# optax.adam itself mixes int32 and float.
INNER_CASES = [
    pytest.param(name, marks=[pytest.mark.standard_promotion] if "adam" in name else [])
    for name in INNER
]
TRACE = np.array([0, 1, 1, 0, 3, 2, 4, 7, 5, 1])
jitted_gradient = jax.jit(gradient)


@functools.cache
def inner_optimizer(name: str):
    return INNER[name]()


def process_of(kind: str, delay: int):
    if kind == "constant":
        return delay
    if kind == "uniform":
        return delays.uniform(min(delay, 1), delay)
    return delays.from_trace(np.minimum(TRACE, delay))


@functools.cache
def run(inner: str, kind: str, delay: int, num_steps: int = NUM_STEPS):
    """Returns the trajectory of `delayed` in one scan and the staleness of each gradient."""
    tx = asgd_jax.delayed(INNER[inner](), process_of(kind, delay), seed=3)

    @jax.jit
    def trajectory(params):
        def step(carry, index):
            params, state = carry
            grads = jax.grad(loss)(asgd_jax.stale_params(state, params), batch(index))
            updates, new_state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, new_state), (params, state.staleness)

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[1]

    return jax.device_get(trajectory(PARAMS))


@pytest.mark.parametrize("kind", ["constant", "uniform", "trace"])
@pytest.mark.parametrize("delay", [0, 1, 4, 7])
@pytest.mark.parametrize("inner", INNER_CASES)
def test_matches_the_parameter_server(inner, delay, kind):
    measured, staleness = run(inner, kind, delay)
    expected = simulate(inner_optimizer(inner), staleness.tolist(), PARAMS, jitted_gradient)
    for step in (0, 1, delay, 2 * delay + 1, NUM_STEPS - 1):
        for name in PARAMS:
            np.testing.assert_allclose(
                measured[name][step], expected[step + 1][name], rtol=2e-4, atol=2e-6
            )


@pytest.mark.parametrize("delay", [1, 4, 7])
def test_staleness_is_the_process_after_a_ramp(delay):
    _, constant = run("sgd", "constant", delay)
    np.testing.assert_array_equal(constant, np.minimum(np.arange(NUM_STEPS), delay))
    _, trace = run("sgd", "trace", delay)
    recorded = np.resize(np.minimum(TRACE, delay), NUM_STEPS)
    np.testing.assert_array_equal(trace, np.minimum(recorded, np.arange(NUM_STEPS)))
    _, uniform = run("sgd", "uniform", delay)
    assert uniform.min() >= 0
    assert set(np.asarray(uniform[delay:]).tolist()) <= set(range(1, delay + 1))


@pytest.mark.optimised
@pytest.mark.parametrize("delay", [0, delays.uniform(0, 0)])
@pytest.mark.parametrize("inner", INNER_CASES)
def test_no_delay_is_bitwise_the_inner_optimizer(inner, delay):
    inner_tx, tx = INNER[inner](), asgd_jax.delayed(INNER[inner](), delay)

    def final(tx, params):
        def step(carry, index):
            params, state = carry
            grads = gradient(params, index)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20))[0]

    params, state = jax.jit(functools.partial(final, tx))(PARAMS)
    expected, _ = jax.jit(functools.partial(final, inner_tx))(PARAMS)
    assert jax.tree.leaves(state.history) == []
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_every_slot_starts_as_the_initial_parameters_in_fresh_buffers():
    state = asgd_jax.delayed(optax.sgd(0.1), 3).init(PARAMS)
    for name, leaf in PARAMS.items():
        ring = state.history.slots[name]
        assert ring.shape == (3, *leaf.shape)
        np.testing.assert_array_equal(ring, np.broadcast_to(leaf, ring.shape))
        assert ring.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()


def test_inner_sees_the_staleness_the_stale_parameters_and_the_callers_arguments():
    seen = []

    def update(updates, state, params=None, *, staleness, stale_params, value, **extra):
        seen.append((int(staleness), float(stale_params), float(params), value, dict(extra)))
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = asgd_jax.delayed(optax.chain(recorder, optax.sgd(1.0)), 2)
    params = jnp.array(10.0)
    state = tx.init(params)
    for step in range(4):
        updates, state = tx.update(jnp.array(1.0), state, params, value=step, other="x")
        params = optax.apply_updates(params, updates)
    other = {"other": "x"}
    assert seen == [
        (0, 10.0, 10.0, 0, other),
        (1, 10.0, 9.0, 1, other),
        (2, 10.0, 8.0, 2, other),
        (2, 9.0, 7.0, 3, other),
    ]


def test_bfloat16_history_rounds_what_stale_gradients_see_and_nothing_else():
    tx = asgd_jax.delayed(optax.set_to_zero(), 2, history_dtype=jnp.bfloat16)
    params = {"w": jnp.array([1.001, -3.3]), "n": jnp.array(3, jnp.int32)}
    state = tx.init(params)
    assert state.history.slots["w"].dtype == jnp.uint16  # the bits of bfloat16
    assert state.history.slots["n"].dtype == jnp.int32
    fresh = asgd_jax.stale_params(state, params)  # staleness 0
    np.testing.assert_array_equal(fresh["w"], params["w"])
    grads = {"w": jnp.zeros(2), "n": jnp.array(0, jnp.int32)}
    updates, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(updates["w"], np.zeros(2))
    stale = asgd_jax.stale_params(state, params)
    assert stale["w"].dtype == jnp.float32
    np.testing.assert_array_equal(stale["w"], params["w"].astype(jnp.bfloat16).astype(jnp.float32))


def test_stale_parameters_of_several_histories_are_merged_leaf_by_leaf():
    """Delays per leaf: two optimizers with different delays, and a leaf without any."""
    tx = optax.multi_transform(
        {
            "slow": asgd_jax.delayed(optax.sgd(1.0), 2),
            "fast": asgd_jax.delayed(optax.sgd(1.0), 1),
            "live": optax.sgd(1.0),
        },
        {"a": "slow", "b": "fast", "c": "live"},
    )
    params = {"a": jnp.array(0.0), "b": jnp.array(0.0), "c": jnp.array(0.0)}
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    stale = asgd_jax.stale_params(state, params)
    assert {name: float(leaf) for name, leaf in stale.items()} == {"a": -3, "b": -4, "c": -5}


@pytest.mark.parametrize("delay", [-1, 1.5, "4", None, True, [0.5, 0.5]])
@pytest.mark.parametrize(
    "make",
    [
        lambda delay: asgd_jax.delayed(optax.sgd(0.1), delay),
        asgd_jax.delay_gradients,
        lambda delay: asgd_jax.shifted_trace(0.9, delay),
    ],
    ids=["delayed", "delay_gradients", "shifted_trace"],
)
def test_bad_delays_are_refused(make, delay):
    with pytest.raises(ValueError, match=r"delay(\[0\])? must be .*got"):
        make(delay)


def test_other_bad_input_is_refused():
    tx = asgd_jax.delayed(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"needs params, got None: call update"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"floating-point dtype of 16 bits or more, got .*int8"):
        asgd_jax.delayed(optax.sgd(0.1), 1, history_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"no DelayedState .*wrap the optimizer"):
        asgd_jax.stale_params(optax.sgd(0.1).init(PARAMS), PARAMS)


def test_gradients_pass_through_the_history():
    """Meta-learning differentiates through the optimizer: x_4 = 0.629 x_0 here, by hand."""
    tx = asgd_jax.delayed(optax.sgd(0.1), 1)

    def after_four(params):
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(asgd_jax.stale_params(state, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    live = [1.0, 0.9]
    for _ in range(3):
        live.append(live[-1] - 0.1 * live[-2])
    assert float(jax.grad(after_four)(jnp.array(1.0))) == pytest.approx(live[4], rel=1e-5)
