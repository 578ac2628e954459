"""A state carried over to another delay goes on as a plain list of all parameters says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import delays

START = jnp.array([1.0, -2.0])
CHANGE_AT = 9


def gradient(params, step):
    return jnp.array([0.7, 2.0]) * params - jnp.cos(jnp.float32(step))


def ages(before, after, num_steps):
    """Staleness of every gradient: what is known limits it after the change as after the start."""
    known = max(0, CHANGE_AT - before)
    return [
        min(before, step) if step < CHANGE_AT else min(after, step - known, step)
        for step in range(num_steps)
    ]


def simulate(staleness):
    """SGD with shifted momentum .5 without dampening by lists; rate .1."""
    params, buffers = [START], [jnp.zeros(2)]
    for step, age in enumerate(staleness):
        buffers.append(0.5 * buffers[step - age] + gradient(params[step - age], step))
        params.append(params[-1] - 0.1 * buffers[-1])
    return params


def make(delay, dtype=None):
    inner = asgd_jax.shifted_sgd(0.1, 0.5, delay, dampening=False)
    return asgd_jax.delayed(inner, delay, history_dtype=dtype)


@pytest.mark.parametrize(("before", "after"), [(3, 8), (8, 3), (2, 2), (0, 4), (4, 0), (1, 30)])
def test_the_run_goes_on_with_what_is_known(before, after):
    num_steps, tx = 40, make(before)
    params, state, trajectory = START, tx.init(START), [START]
    for step in range(num_steps):
        if step == CHANGE_AT:
            tx, state = make(after), asgd_jax.resize_history(state, after, params)
        grads = gradient(asgd_jax.stale_params(state, params), step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    expected = simulate(ages(before, after, num_steps))
    np.testing.assert_allclose(trajectory, expected, rtol=1e-5, atol=1e-6)


def test_a_queue_of_gradients_keeps_its_latest():
    for before, after in ((2, 5), (5, 2)):
        tx = asgd_jax.delay_gradients(before)
        state, out = tx.init(jnp.zeros(())), []
        for step in range(20):
            if step == CHANGE_AT:
                tx, state = asgd_jax.delay_gradients(after), asgd_jax.resize_history(state, after)
            update, state = tx.update(jnp.asarray(step + 1.0), state)
            out.append(float(update))
        assert out[:CHANGE_AT] == [max(step - before + 1, 0) for step in range(CHANGE_AT)]
        # Those that were handed on before are not handed on again.
        used = CHANGE_AT - before if after > before else 0
        later = range(CHANGE_AT, 20)
        assert out[CHANGE_AT:] == [
            step - after + 1 if step - after >= used else 0 for step in later
        ]


def test_half_precision_bits_survive():
    state = make(8, jnp.bfloat16).init(START)
    for step in range(12):
        _, state = make(8, jnp.bfloat16).update(START, state, START * step)
    short = asgd_jax.resize_history(state, 3)
    assert int(short.staleness) == 3
    np.testing.assert_array_equal(asgd_jax.stale_params(short, START), START * 9)


@pytest.mark.parametrize("delay", [0, 2, 8, delays.uniform(1, 5)])
def test_the_state_of_another_delay_is_refused(delay):
    state = asgd_jax.delayed(optax.sgd(0.1), 3).init(START)
    tx = asgd_jax.delayed(optax.sgd(0.1), delay)
    with pytest.raises(ValueError, match=r"has 3 slots .* asgd_jax.resize_history\(state, delay\)"):
        jax.eval_shape(tx.update, START, state, START)


def test_other_states_of_another_delay_are_refused():
    none = asgd_jax.delayed(optax.sgd(0.1), 0).init(START)
    with pytest.raises(ValueError, match=r"has no history: it is the state of delay 0"):
        asgd_jax.delayed(optax.sgd(0.1), 3).update(START, none, START)
    with pytest.raises(ValueError, match=r"pass params, the live parameters"):
        asgd_jax.resize_history(none, 3)
    for make_one in (asgd_jax.delay_gradients, lambda delay: asgd_jax.shifted_trace(0.9, delay)):
        with pytest.raises(
            ValueError, match=r"has 4 slots for the parameter and its delay needs 6"
        ):
            make_one(5).update(START, make_one(3).init(START))


@pytest.mark.parametrize("options", [{"every": 3}, {"skip_nonfinite": True}])
def test_between_two_updates_nothing_of_the_past_is_lost(options):
    """A call that makes no update, then a longer history: it holds what the loop held."""
    tx = asgd_jax.delayed(optax.sgd(0.1), 2, **options)
    params, state, held = START, tx.init(START), [START]
    while int(state.num_updates) < 5:
        grads = gradient(asgd_jax.stale_params(state, params), int(state.num_updates))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if int(state.num_updates) == len(held):
            held.append(params)
    _, state = tx.update(jnp.full(2, jnp.nan), state, params)
    assert int(state.num_updates) == 5
    slots = asgd_jax.resize_history(state, 4).history.slots
    np.testing.assert_array_equal(slots[4 % 4], held[4])
    np.testing.assert_array_equal(slots[3 % 4], held[3])


def test_what_holds_no_history_is_refused():
    with pytest.raises(ValueError, match=r"no history in an optimizer state of type dict: restore"):
        asgd_jax.resize_history({"a": jnp.zeros(2)}, 3)


def test_a_history_from_nothing_may_be_donated():
    state = asgd_jax.delayed(optax.sgd(0.1), 0).init(START)
    state = asgd_jax.resize_history(state, 3, START)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, START))]
    assert len(set(buffers)) == len(buffers)
