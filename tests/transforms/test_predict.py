"""Prediction: against optimizers that are given zero gradients, a plain server, and rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import delays, predict
from asgd_jax.stability import optimizer_max_learning_rate

pytestmark = pytest.mark.standard_promotion  # optax's Adam promotes

PARAMS = {"w": jnp.array([[1.0, -0.5], [0.25, 2.0]]), "b": jnp.array([0.5])}
RATE = 0.05


def remembering(inner):
    return optax.chain(inner, predict.remember_update())


# (optimizer, predictor, the same optimizer as its n updates without a gradient see it)
METHODS = {
    "momentum": (optax.sgd(RATE, momentum=0.9), predict.momentum(RATE, decay=0.9)),
    "nesterov": (
        optax.sgd(RATE, momentum=0.8, nesterov=True),
        predict.momentum(RATE, decay=0.8, nesterov=True),
    ),
    "adam": (optax.adam(RATE, b1=0.8, b2=0.9), predict.adamw(RATE, b1=0.8, b2=0.9)),
    "adamw": (
        optax.adamw(RATE, b1=0.8, b2=0.9, weight_decay=0.2),
        predict.adamw(RATE, b1=0.8, b2=0.9, weight_decay=0.2),
    ),
    "last update": (remembering(optax.sgd(RATE)), predict.last_update(0.5)),
}


@jax.jit
def gradient(params, step):
    return jax.tree.map(lambda leaf: jnp.tanh(leaf) - 0.3 * jnp.cos(step), params)


def advanced(inner, steps=6):
    params, state = PARAMS, inner.init(PARAMS)
    for step in range(steps):
        updates, state = inner.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_momentum_is_the_optimizer_without_gradients(name, steps):
    inner, foresee = METHODS[name]
    params, state = advanced(inner)
    found = foresee(params, state, jnp.int32(steps))
    for _ in range(steps):
        updates, state = inner.update(optax.tree.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_adamw_is_the_optimizer_without_gradients_its_second_moment_held(decay, steps):
    b1, b2, eps = 0.8, 0.9, 1e-8
    inner = optax.adamw(RATE, b1=b1, b2=b2, weight_decay=decay)
    params, state = advanced(inner)
    found = predict.adamw(RATE, b1=b1, b2=b2, weight_decay=decay)(params, state, steps)
    mu, nu, count = (optax.tree.get(state[0], name) for name in ("mu", "nu", "count"))
    root = jax.tree.map(lambda leaf: jnp.sqrt(leaf / (1 - b2 ** int(count))) + eps, nu)
    for step in range(1, steps + 1):
        mu = jax.tree.map(lambda leaf: b1 * leaf, mu)
        correction = 1 - b1 ** (int(count) + step)
        params = jax.tree.map(
            lambda x, m, d, c=correction: x - RATE * (m / c / d + decay * x), params, mu, root
        )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def serve(inner, foresee, ages, ahead):
    """A plain server: what was pulled at each version, in a list; returns x and the points."""
    params, state, points = PARAMS, inner.init(PARAMS), []
    pulled, live = [], []
    for step, age in enumerate(ages):
        live.append(params)
        pulled.append(foresee(params, state, jnp.int32(ahead)))
        points.append(live[-1] if age == 0 else pulled[step - age])
        updates, state = inner.update(gradient(points[-1], step), state, params)
        params = optax.apply_updates(params, updates)
    return params, points


@pytest.mark.parametrize("name", METHODS)
def test_delayed_remembers_what_the_server_predicted(name):
    inner, foresee = METHODS[name]
    delay, num_updates = 3, 60
    expected, points = serve(
        inner, foresee, [min(step, delay) for step in range(num_updates)], delay
    )
    tx = asgd_jax.delayed(inner, delay, predict=foresee)
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(tx.update)
    for index in range(num_updates):
        where = asgd_jax.stale_params(state, params)
        for one, other in zip(jax.tree.leaves(where), jax.tree.leaves(points[index]), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
        updates, state = step(gradient(where, index), state, params)
        params = optax.apply_updates(params, updates)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["momentum", "adam", "last update"])
def test_rounds_and_delayed_predict_alike(name):
    inner, foresee = METHODS[name]
    engine = asgd_jax.rounds(inner, 4, predict=foresee)
    tx = asgd_jax.delayed(inner, 3, predict=foresee)
    held, params, state = engine.init(PARAMS), PARAMS, tx.init(PARAMS)
    turn = jax.jit(engine.round, static_argnums=0)
    push = lambda params, step: (gradient(params, step), None)  # noqa: E731
    for number in range(6):
        held, _ = turn(push, held, jnp.arange(4 * number, 4 * number + 4))
    for step in range(24):
        grads = gradient(asgd_jax.stale_params(state, params), step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for one, other in zip(jax.tree.leaves(held.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_each_leaf_looks_as_far_ahead_as_its_own_delay():
    seen = []

    def foresee(params, state, staleness):
        seen.append(staleness)
        return predict.momentum(RATE, decay=0.9)(params, state, staleness)

    inner = optax.sgd(RATE, momentum=0.9)
    tx = asgd_jax.delayed(inner, {"w": 4, "b": 1}, predict=foresee)
    params, state = advanced(inner, 3)
    delayed_state = tx.init(params)._replace(inner_state=state)
    _, after = tx.update(gradient(params, 0), delayed_state, params)
    assert jax.tree.map(int, seen[0]) == {"w": 4, "b": 1}
    alone = predict.momentum(RATE, decay=0.9)(params, state, jnp.int32(1))
    np.testing.assert_allclose(after.stale["b"], alone["b"], rtol=1e-6)


def test_random_delays_look_ahead_by_their_mean():
    seen = []

    def foresee(params, state, staleness):
        seen.append(int(staleness))
        return params

    tx = asgd_jax.delayed(optax.sgd(0.1), delays.uniform(1, 6), predict=foresee)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert seen == [4]  # 3.5, rounded to even


def test_prediction_raises_the_threshold_of_momentum():
    """Read off the code: the gradient is taken where momentum alone would have carried x."""
    delay, decay = 8, 0.9

    def make(foreseen):
        return lambda rate: asgd_jax.delayed(
            optax.sgd(rate, momentum=decay),
            delay,
            predict=predict.momentum(rate, decay=decay) if foreseen else None,
        )

    plain, foreseen = (optimizer_max_learning_rate(make(each), 0) for each in (False, True))
    assert foreseen > 1.3 * plain
    # In time, on the quadratic: one percent below shrinks, one percent above grows.
    for factor, grows in ((0.99, False), (1.01, True)):
        with jax.enable_x64(True):
            tx = make(True)(factor * foreseen)
            params = jnp.array(1.0, jnp.float64)

            def step(carry, _):
                params, state = carry
                where = asgd_jax.stale_params(state, params)
                updates, state = tx.update(where, state, params)
                return (optax.apply_updates(params, updates), state), params

            _, path = jax.lax.scan(step, (params, tx.init(params)), length=6000)
        late, early = np.abs(path[-200:]).max(), np.abs(path[2000:2200]).max()
        assert (late > early) == grows


@pytest.mark.parametrize(
    ("foresee", "inner", "message"),
    [
        (predict.momentum(0.1, decay=0.9), optax.adam(0.1), r"the one `trace` of optax.trace"),
        (predict.adamw(0.1), optax.sgd(0.1, momentum=0.9), r"the one `mu` of optax.adam"),
        (predict.last_update(), optax.sgd(0.1), r"the one `last_update` of .*remember_update"),
        (
            predict.momentum(decay=0.9),
            optax.sgd(0.1, momentum=0.9),
            r"`learning_rate` of optax.inject_hyperparams",
        ),
    ],
)
def test_a_momentum_that_is_not_there_is_one_line(foresee, inner, message):
    tx = asgd_jax.delayed(inner, 2, predict=foresee)
    with pytest.raises(ValueError, match=message) as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        predict.momentum(0.1, decay=1.0)


def test_the_learning_rate_is_read_from_injected_hyperparameters():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE, momentum=0.9)
    params, state = advanced(inner)
    found = predict.momentum(decay=0.9)(params, state, 3)
    expected = predict.momentum(RATE, decay=0.9)(params, state, 3)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


def test_a_random_or_recorded_delay_is_foreseen_by_its_mean():
    """Half-way cases go up; of a trace it is the mean of the trace, not its longest."""
    trace = np.array([0, 1, 2, 9, 2, 1])
    for process, ahead in (
        (asgd_jax.delays.uniform(1, 4), 3),
        (asgd_jax.delays.uniform(0, 1), 1),
        (asgd_jax.delays.from_trace(trace), 3),
        (asgd_jax.delays.constant(2, max_delay=7), 2),
    ):
        asked = []

        def predict(params, inner_state, staleness, asked=asked):
            asked.append(int(staleness))
            return params

        tx = asgd_jax.delayed(optax.sgd(0.1), process, predict=predict)
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
        assert asked == [ahead]
    traced = jax.jit(
        lambda delay: asgd_jax.delays.expected_staleness(
            asgd_jax.delays.constant(delay, max_delay=7)
        )
    )
    assert int(traced(jnp.int32(4))) == 4


def test_a_scheduled_rate_is_read_as_the_last_update_had_it():
    schedule = optax.linear_schedule(0.4, 0.0, 4)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule, momentum=0.5)
    params = jnp.zeros(1)
    state = tx.init(params)
    for _ in range(2):  # at the rates .4 and .3
        _, state = tx.update(jnp.ones(1), state, params)
    found = asgd_jax.predict.momentum(decay=0.5)(params, state, 1)
    np.testing.assert_allclose(found, [-0.3 * 0.5 * 1.5], rtol=1e-6)
    with pytest.raises(ValueError, match="takes a number for learning_rate, got a schedule"):
        asgd_jax.predict.momentum(schedule, decay=0.5)(params, state, 1)
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), the optimizer's, got 1.5"):
        asgd_jax.predict.adamw(0.1, b1=1.5)
