"""`asgd_jax.flax`: the Linen state and the NNX model that know where gradients are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from held import Held

import asgd_jax
from asgd_jax.flax import DelayedTrainState, stale_model

DELAY, NUM_STEPS = 3, 8


def batch(step):
    random = np.random.default_rng(step)
    return tuple(random.normal(size=(8, size)).astype(np.float32) for size in (3, 2))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Dense(4)(x)))


def linen_loss(params, batch):
    x, y = batch
    return jnp.mean((Linen().apply({"params": params}, x) - y) ** 2)


def linen_state(tx):
    params = Linen().init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    return DelayedTrainState.create(apply_fn=Linen().apply, params=params, tx=tx)


def test_a_train_state_takes_its_gradient_where_it_was():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    state, held = linen_state(asgd_jax.delayed(inner, DELAY)), Held(DELAY)

    @jax.jit
    def step(state, batch):
        loss, grads = state.value_and_grad(linen_loss, batch)
        return state.apply_gradients(grads=grads), loss, state.stale_params, state.metrics()

    for index in range(NUM_STEPS):
        before = state.params
        state, loss, stale, metrics = step(state, batch(index))
        held.check(stale, before)
        np.testing.assert_allclose(loss, linen_loss(stale, batch(index)), rtol=1e-5)
        assert int(metrics.staleness) == min(index, DELAY)
        assert (float(metrics.gap) > 0) == (index > 0)
    gradient = jax.jit(jax.grad(linen_loss))
    held.check_trajectory(inner, lambda params, step: gradient(params, batch(step)))
    assert int(state.step) == NUM_STEPS


def test_a_train_state_without_delay_is_refused():
    with pytest.raises(ValueError, match=r"^DelayedTrainState needs an optimizer with a delay"):
        linen_state(optax.adam(0.1))
    assert int(linen_state(asgd_jax.delayed(optax.adam(0.1), 0)).metrics().staleness) == 0


def test_what_flax_overwrites_with_its_gradient_has_no_history():
    """Float8 keeps scales beside the parameters, which its gradient replaces."""
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.float32(0)}}
    tx = asgd_jax.delayed(optax.sgd(0.5), DELAY)
    state = DelayedTrainState.create(apply_fn=None, params=params, tx=tx)

    def loss(params):
        scale = params[OVERWRITE_WITH_GRADIENT]["scale"]
        return jnp.sum(params["params"]["w"] ** 2) / 2 + 7 * scale

    seen = []
    for _ in range(DELAY + 2):
        seen.append(state.params["params"])
        stale = state.stale_params
        expected = seen[max(0, len(seen) - 1 - DELAY)]
        jax.tree.map(np.testing.assert_array_equal, stale["params"], expected)
        assert stale[OVERWRITE_WITH_GRADIENT] is state.params[OVERWRITE_WITH_GRADIENT]
        _, grads = state.value_and_grad(loss)
        state = state.apply_gradients(grads=grads)
        assert float(state.params[OVERWRITE_WITH_GRADIENT]["scale"]) == 7
    assert int(state.metrics().staleness) == DELAY


class Normalised(nnx.Module):
    """Parameters, running statistics, a counter of random numbers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.norm(jnp.tanh(self.first(x)))))


def nnx_loss(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def make():
    model = Normalised(nnx.Rngs(0))
    tx = asgd_jax.delayed(optax.sgd(0.1, momentum=0.9), DELAY)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def by_hand(params, rest, graphdef, batch):
    """Gradient and the other variables afterwards, of pure arrays."""

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        value = nnx_loss(model, batch)
        return value, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("how", ["plain", "jit"])
def test_an_nnx_model_is_stale_in_its_parameters_alone(how):
    """Against a list of all parameters, and one set of running statistics and random numbers."""
    model, optimizer = make()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    inner = optax.sgd(0.1, momentum=0.9)
    state, held = inner.init(params), [params]

    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(nnx_loss)(stale_model(optimizer, model), batch)
        optimizer.update(model, grads)
        return loss

    step = nnx.jit(train_step) if how == "jit" else train_step
    expect = jax.jit(by_hand, static_argnums=2)
    for index in range(NUM_STEPS):
        step(model, optimizer, batch(index))
        grads, rest = expect(held[max(0, index - DELAY)], rest, graphdef, batch(index))
        updates, state = inner.update(grads, state)
        held.append(optax.apply_updates(held[-1], updates))
        assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), held[-1])
        assert_close(nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))), rest)
    assert int(optimizer.step[...]) == NUM_STEPS


def assert_close(tree, other):
    def close(leaf, like):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, like = jax.random.key_data(leaf), jax.random.key_data(like)
        np.testing.assert_allclose(leaf, like, rtol=1e-4, atol=1e-6)

    jax.tree.map(close, tree, other)


def test_an_nnx_loop_is_measured_by_its_states_or_their_arrays():
    model, optimizer = make()
    for index in range(2):
        _, grads = nnx.value_and_grad(nnx_loss)(stale_model(optimizer, model), batch(index))
        optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    measured = asgd_jax.metrics(optimizer.opt_state, params)
    pure = asgd_jax.metrics(nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
    assert [float(value) for value in measured] == [float(value) for value in pure]
    assert int(measured.staleness) == 2
    assert float(measured.gap) > 0


def test_writing_to_the_stale_model_leaves_the_live_one_alone():
    model, optimizer = make()
    worker = stale_model(optimizer, model)
    before = np.array(model.first.kernel[...])
    worker.first.kernel[...] = jnp.zeros_like(worker.first.kernel[...])
    np.testing.assert_array_equal(model.first.kernel[...], before)
    assert isinstance(worker, Normalised)
    assert worker.norm.mean is model.norm.mean


def test_an_nnx_optimizer_without_delay_is_refused():
    model = Normalised(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"^no DelayedState in an optimizer state"):
        stale_model(optimizer, model)
