"""The train step against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import models
from asgd_jax.training.evaluate import make_measure, pad_to_batches
from asgd_jax.training.state import init_state
from asgd_jax.training.step import Batch, cross_entropy, make_gradient, make_train_step

IMAGE = (8, 8, 1)


def preprocess(key, images):
    del key
    return images.astype(jnp.float32) / 255


def random_batch(workers, size, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (workers, size, *IMAGE), dtype=np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(random.integers(0, 10, (workers, size))))


def test_cross_entropy_with_smoothing_is_its_definition():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    labels = np.array([0, 3, 1, 2, 2])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for smoothing in (0.0, 0.1):
        target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
        expected = -(target * log_p).sum(-1)
        measured = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_the_gradient_of_many_workers_is_the_mean_of_theirs():
    model = models.create("mlp", num_classes=10, hidden=(5,))
    params = init_state(model, optax.sgd(0.1), IMAGE, seed=0).params
    gradient = jax.jit(make_gradient(model, preprocess))
    batch = random_batch(3, 4)
    together, (_, loss, _) = gradient(params, {}, batch, jax.random.PRNGKey(0))
    alone = [
        gradient(params, {}, Batch(batch.images[k : k + 1], batch.labels[k : k + 1]), None)
        for k in range(3)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *[grads for grads, _ in alone])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, mean
    )
    np.testing.assert_allclose(loss, np.mean([aux[1] for _, aux in alone]), rtol=1e-5)


def test_batch_norm_sees_each_worker_alone_and_keeps_one_chain_on_the_server():
    model = models.create("mnist_cnn_bn", num_classes=10, width=0.1, conv_impl="lax")
    state = init_state(model, optax.sgd(0.1), (12, 12, 1), seed=0)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (2, 4, 12, 12, 1), dtype=np.uint8)
    images[1] //= 4  # workers with different statistics
    batch = Batch(jnp.asarray(images), jnp.asarray(random.integers(0, 10, (2, 4))))
    gradient = make_gradient(model, preprocess)
    grads, (stats, _, _) = jax.jit(gradient)(state.params, state.batch_stats, batch, None)

    def one(k):
        alone = Batch(batch.images[k : k + 1], batch.labels[k : k + 1])
        return jax.jit(gradient)(state.params, state.batch_stats, alone, None)

    (first, (stats_0, _, _)), (second, (stats_1, _, _)) = one(0), one(1)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, (first, stats_0), (second, stats_1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), (grads, stats), mean
    )


def test_the_gradient_is_stale_and_decay_is_live():
    """x' = x - lr (g(x_stale) + decay x), by hand on the real step."""
    model = models.create("mlp", num_classes=10, hidden=(5,))
    server = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    tx = asgd_jax.delayed(server, 2)
    state = init_state(model, tx, IMAGE, seed=0)
    step = jax.jit(make_train_step(model, tx, preprocess))
    gradient = jax.jit(make_gradient(model, preprocess))
    live = [state.params]
    for index in range(6):
        batch = random_batch(1, 4, seed=index)
        stale = live[max(index - 2, 0)]
        grads, _ = gradient(stale, {}, batch, None)
        expected = jax.tree.map(lambda x, g: x - 0.1 * (g + 0.5 * x), live[-1], grads)
        state, metrics = step(state, batch)
        assert int(metrics.staleness) == min(index, 2)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            state.params,
            expected,
        )
        live.append(state.params)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_evaluation_covers_every_sample_once(batch_size):
    model = models.create("mlp", num_classes=10, hidden=(5,))
    params = init_state(model, optax.sgd(0.1), IMAGE, seed=3).params
    batch = random_batch(1, 33)
    images, labels = np.asarray(batch.images[0]), np.asarray(batch.labels[0])
    measure = jax.jit(make_measure(model, lambda x: preprocess(None, x)))
    loss, error = measure(params, {}, pad_to_batches(images, labels, batch_size)).means()
    logits = model.apply({"params": params}, preprocess(None, jnp.asarray(images)), train=False)
    np.testing.assert_allclose(loss, cross_entropy(logits, jnp.asarray(labels)).mean(), rtol=1e-5)
    np.testing.assert_allclose(error, np.mean(np.argmax(logits, -1) != labels), rtol=1e-6)
