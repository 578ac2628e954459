"""Accumulated and skipped updates: the trajectories of optax's wrappers, without their copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_compiled import BATCH, DELAY, PARAM_BYTES, WIDTH, compile_step, delayed_step, ring_copies

import asgd_jax
from asgd_jax.transforms.accumulation import accumulate, init_accumulation

pytestmark = pytest.mark.optimised

START = jnp.array([1.0, -2.0])


def gradient(params, step):
    return jnp.array([0.7, 2.0]) * params - jnp.cos(jnp.float32(step))


def run(tx, num_calls, bad=()):
    params, state, trajectory, ages = START, tx.init(START), [], []
    update = jax.jit(tx.update)
    for call in range(num_calls):
        grads = gradient(asgd_jax.stale_params(state, params), call)
        updates, state = update(jnp.where(call in bad, jnp.nan, grads), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        ages.append(int(optax.tree.get(state, "staleness")))
    return np.array(trajectory), ages, state


@pytest.mark.standard_promotion  # optax's MultiSteps mixes int32 and float
@pytest.mark.parametrize("make_inner", [lambda: optax.sgd(0.1, 0.9), lambda: optax.adam(0.1)])
def test_every_k_is_the_trajectory_of_multi_steps(make_inner):
    wrapped = optax.MultiSteps(asgd_jax.delayed(make_inner(), 2), 3)
    expected, ages, _ = run(wrapped.gradient_transformation(), 24)
    found, own_ages, _ = run(asgd_jax.delayed(make_inner(), 2, every=3), 24)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert own_ages == ages


@pytest.mark.parametrize("every", [1, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(every):
    """As if the bad calls had never been made."""
    bad = (0, 4, 5, 9)
    tx = asgd_jax.delayed(optax.sgd(0.1, 0.9), 2, every=every, skip_nonfinite=True)
    found, _, state = run(tx, 16, bad)
    params, clean = START, tx.init(START)
    for call in (call for call in range(16) if call not in bad):
        grads = gradient(asgd_jax.stale_params(clean, params), call)
        updates, clean = tx.update(grads, clean, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(found[call], params, rtol=1e-6)
    assert int(state.num_updates) == 12 // every
    for call in bad:
        before = found[call - 1] if call else START
        np.testing.assert_array_equal(found[call], before)


@pytest.mark.parametrize("case", ["every", "skip", "both"])
@pytest.mark.parametrize("where", ["jit", "scan"])
def test_neither_copies_the_history(case, where):
    options = {
        "every": {"every": 4},
        "skip": {"skip_nonfinite": True},
        "both": {"every": 4, "skip_nonfinite": True},
    }[case]
    tx = asgd_jax.delayed(optax.sgd(0.1, momentum=0.9), DELAY, **options)
    compiled = compile_step(delayed_step, tx, where)
    assert ring_copies(compiled.as_text()) == []
    # Temporaries: a few parameter sets (gradients, activations), never the history.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * PARAM_BYTES < DELAY * PARAM_BYTES
    assert WIDTH * BATCH * 4 < PARAM_BYTES


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"every must be >= 1, got 0"):
        asgd_jax.delayed(optax.sgd(0.1), 2, every=0)
    with pytest.raises(ValueError, match=r"every must be an integer >= 0, got 1.5"):
        asgd_jax.delayed(optax.sgd(0.1), 2, every=1.5)


def test_a_sum_that_overflows_is_skipped_too():
    params = jnp.ones(2, jnp.float16)
    for size, due in ((7e4, True), (2e5, False)):  # halved, the first fits into float16
        kept = init_accumulation(params, 2)._replace(num_accumulated=jnp.int32(1))
        found, mean, _ = accumulate(jnp.full(2, size), kept, 2, True)
        assert bool(found) == due
        assert bool(jnp.isfinite(mean).all()) == due


def test_frozen_and_integer_leaves_accumulate_nothing():
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
    grads = {"w": jnp.full(2, 4.0), "frozen": None, "n": np.zeros(2, jax.dtypes.float0)}
    due, mean, _ = accumulate(grads, init_accumulation(params, 2), 2, True)
    assert mean["frozen"] is None
    assert mean["n"].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(mean["w"], [2.0, 2.0])
    assert not due
