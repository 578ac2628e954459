"""Compensation against NumPy, update by update; and the theory of each, read off the code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import compensate
from asgd_jax.stability import max_learning_rate, optimizer_max_learning_rate

X0 = np.array([1.0, -0.5, 2.0])
DELAY, RATE, NUM_UPDATES = 3, 0.05, 60


def gradient(x, step):
    return np.tanh(x) - 0.3 * np.cos(step + np.arange(3))


def staleness_scaling(g, gap, s, memory):
    return g / max(1, s)


def delay_adaptive(g, gap, s, memory):
    return g * 2 / max(2, s)


def power(g, gap, s, memory):
    return g * (1 + s) ** -0.5


def constant(g, gap, s, memory):
    return g + 0.04 * g * g * gap


def adaptive(g, gap, s, memory):
    memory["ms"] = 0.95 * memory.get("ms", 0.0) + 0.05 * g * g
    return g + 0.5 / np.sqrt(memory["ms"] + 1e-7) * g * g * gap


def ema(g, gap, s, memory):
    memory["v"] = 0.99 * memory.get("v", 0.0) + 0.01 * g * g
    return g + memory["v"] * gap


def gap_aware(decay_of_momentum):
    def method(g, gap, s, memory):
        memory["t"] = memory.get("t", 0) + 1
        memory["m"] = decay_of_momentum * memory.get("m", 0.0) + g
        memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * memory["m"] ** 2
        typical = RATE * (np.sqrt(memory["v"] / (1 - 0.999 ** memory["t"])) + 1e-8)
        return g / (1 + abs(gap) / typical)

    return method


METHODS = {
    "staleness scaling": (compensate.staleness_scaling, staleness_scaling),
    "delay adaptive": (lambda: compensate.delay_adaptive(2), delay_adaptive),
    "power": (compensate.power_scaling, power),
    "DC-ASGD": (compensate.dc_asgd, constant),
    "DC-ASGD adaptive": (lambda: compensate.dc_asgd(0.5, adaptive=True), adaptive),
    "DC-EMA": (compensate.dc_ema, ema),
    "Gap-Aware": (lambda: compensate.gap_aware(RATE), gap_aware(0.0)),
    "Gap-Aware, momentum": (lambda: compensate.gap_aware(RATE, momentum=0.9), gap_aware(0.9)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_equation(name):
    make, method = METHODS[name]
    past, memory = [X0], {}
    for step in range(NUM_UPDATES):
        s = min(step, DELAY)
        y = past[-1 - s]
        g = method(gradient(y, step), past[-1] - y, s, memory)
        past.append(past[-1] - RATE * g)
    tx = asgd_jax.delayed(optax.chain(make(), optax.sgd(RATE)), DELAY)
    params = jnp.asarray(X0, jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(NUM_UPDATES):
        where = np.asarray(asgd_jax.stale_params(state, params), np.float64)
        grads = jnp.asarray(gradient(where, step), jnp.float32)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, past[step + 1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_leaf_has_its_own_staleness(name):
    """Two leaves with delays of their own are two runs of one leaf each: all is elementwise."""
    make, _ = METHODS[name]

    def run(delay, params):
        tx = asgd_jax.delayed(optax.chain(make(), optax.sgd(RATE)), delay)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(12):
            where = asgd_jax.stale_params(state, params)
            updates, state = update(jax.tree.map(jnp.sin, where), state, params)
            params = optax.apply_updates(params, updates)
        return params

    both = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    together = run({"a": 4, "b": 1}, both)
    for leaf, delay in (("a", 4), ("b", 1)):
        alone = run(delay, {leaf: both[leaf]})
        np.testing.assert_allclose(together[leaf], alone[leaf], rtol=1e-6)


def chain(make, rate):
    return optax.chain(make(), optax.sgd(rate))


@pytest.mark.parametrize("delay", [2, 8])
def test_scaling_is_another_learning_rate(delay):
    """Staleness scaling wins the factor tau, delay-adaptive max(n, tau) / n, power (1 + tau)^a."""
    plain = max_learning_rate(delay)
    for make, factor in (
        (compensate.staleness_scaling, delay),
        (lambda: compensate.delay_adaptive(4), max(4, delay) / 4),
        (compensate.power_scaling, (1 + delay) ** 0.5),
    ):
        found = optimizer_max_learning_rate(functools.partial(chain, make), delay)
        assert found == pytest.approx(factor * plain, rel=1e-6)


@pytest.mark.parametrize("delay", [2, 8])
def test_corrections_of_second_order_change_no_threshold(delay):
    found = optimizer_max_learning_rate(functools.partial(chain, compensate.dc_asgd), delay)
    assert found == pytest.approx(max_learning_rate(delay), rel=1e-4)


@pytest.mark.parametrize("delay", [2, 8])
def test_a_held_ema_takes_the_delay_away_as_it_nears_the_curvature(delay):
    sharpness = 2.0
    make = functools.partial(chain, compensate.dc_ema)
    found = []
    for share in (0.0, 0.5, 0.9, 1.0):
        state = make(1.0).init(jnp.zeros(()))
        state = optax.tree.set(state, square_mean=jnp.array(share * sharpness))
        found.append(
            optimizer_max_learning_rate(make, delay, sharpness=sharpness, optimizer_state=state)
        )
    assert found[0] == pytest.approx(max_learning_rate(delay, sharpness=sharpness), rel=1e-6)
    assert found[-1] == pytest.approx(2.0 / sharpness, rel=1e-6)
    assert (np.diff(found) > -1e-8).all()


def test_the_schedule_of_pipemare():
    schedule = compensate.pipemare_schedule(optax.constant_schedule(0.8), 16, 100)
    for step in (0, 25, 100, 1000):
        power = 1 - min(step / 100, 1)
        assert float(schedule(step)) == pytest.approx(0.8 / 16**power, rel=1e-5)
    tx = optax.sgd(compensate.pipemare_schedule(0.8, 16, 100))
    updates, _ = tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)))
    assert float(updates) == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compensate.dc_asgd(-1.0), r"strength \(lambda\) must be a number >= 0, got -1.0"),
        (lambda: compensate.dc_ema(-0.1), r"strength \(lambda\) must be a number >= 0, got -0.1"),
        (lambda: compensate.dc_ema(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: compensate.delay_adaptive(0), r"num_workers must be an integer >= 1, got 0"),
        (lambda: compensate.power_scaling(-1.0), r"exponent must be a number >= 0, got -1.0"),
        (lambda: compensate.gap_aware(0.0), r"max_learning_rate must be a number > 0, got 0.0"),
        (lambda: compensate.gap_aware(0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (
            lambda: compensate.pipemare_schedule(0.1, -1, 5),
            r"delay must be an integer >= 0, got -1",
        ),
        (lambda: compensate.pipemare_schedule(0.1, 1, 0), r"num_steps must be an integer >= 1"),
    ],
)
def test_bad_numbers_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_outside_delayed_live_parameters_are_asked_for():
    tx = compensate.dc_ema()
    with pytest.raises(ValueError, match=r"dc_ema needs params, got None"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), stale_params=jnp.ones(1))


@pytest.mark.parametrize("delay", [2, {"w": 2, "b": 1}], ids=["one delay", "by leaf"])
@pytest.mark.parametrize("name", ["staleness_scaling", "dc_asgd", "dc_ema", "gap_aware"])
def test_a_method_for_a_part_of_the_parameters(name, delay):
    """In optax.masked and partition: its part is as alone, the other as without it."""
    arguments = {"gap_aware": (0.1,)}.get(name, ())

    def method():
        return getattr(asgd_jax.compensate, name)(*arguments)

    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    masked = optax.masked(method(), {"w": True, "b": False})
    parts = optax.partition({"own": method(), "none": optax.identity()}, {"w": "own", "b": "none"})

    def end(transform):
        tx = asgd_jax.delayed(optax.chain(transform, optax.sgd(0.1)), delay)
        state, point = tx.init(params), params
        for _ in range(5):
            grads = asgd_jax.stale_params(state, point)
            updates, state = tx.update(grads, state, point)
            point = optax.apply_updates(point, updates)
        return point

    whole, none = end(method()), end(optax.identity())
    for found in (end(masked), end(parts)):
        np.testing.assert_allclose(found["w"], whole["w"], rtol=1e-6)
        np.testing.assert_allclose(found["b"], none["b"], rtol=1e-6)


@pytest.mark.standard_promotion
def test_gap_aware_before_adam_does_not_see_the_scale_of_the_loss():
    """Adam's steps are in units of the learning rate, whatever the gradients' size."""
    adam = optax.scale_by_adam()
    updates = {}
    for scale in (1.0, 1e-3):
        tx = asgd_jax.compensate.gap_aware(0.01, direction=adam, eps=0.0)
        params, stale = jnp.array([1.0, 2.0]), jnp.array([1.02, 2.0])
        state = tx.init(params)
        for _ in range(3):
            found, state = tx.update(scale * jnp.array([0.4, -0.2]), state, params,
                                     stale_params=stale)  # fmt: skip
        updates[scale] = np.asarray(found) / scale
    np.testing.assert_allclose(updates[1.0], [0.4 / 3.0, -0.2], rtol=1e-4)  # two steps away
    np.testing.assert_allclose(updates[1e-3], updates[1.0], rtol=1e-3)
    with pytest.raises(ValueError, match=r"momentum=0.9 with a direction="):
        asgd_jax.compensate.gap_aware(0.01, direction=adam, momentum=0.9)
