"""Running statistics of BatchNorm: each mode against plain Python bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import delays, models
from asgd_jax.training.batch_stats import make_chains, recalibrate
from asgd_jax.training.state import init_state
from asgd_jax.training.step import Batch, make_gradient, make_train_step

TRACE = np.array([0, 1, 0, 2, 2, 1, 0])
SHAPE = (8, 8, 1)


def preprocess(key, images):
    return images.astype(jnp.float32) / 255


def batches(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        images = random.integers(0, 256, (1, 4, *SHAPE), dtype=np.uint8) // random.integers(1, 5)
        yield Batch(jnp.asarray(images), jnp.asarray(random.integers(0, 10, (1, 4))))


@pytest.mark.parametrize("mode", ["server", "worker"])
def test_chains_are_those_of_a_list(mode):
    """worker: push t continues the statistics that were written at push t - staleness - 1."""
    model = models.create("mnist_cnn_bn", num_classes=10, width=0.1, conv_impl="lax")
    process = delays.from_trace(TRACE)
    tx = asgd_jax.delayed(optax.sgd(0.05), process)
    chains = make_chains(mode, process.max_delay)
    state = init_state(model, tx, SHAPE, 0, keep_stats=chains.init)
    step = jax.jit(make_train_step(model, tx, preprocess, chains=chains))
    gradient = jax.jit(make_gradient(model, preprocess))

    params = [state.params]
    kept = [chains.live(state.batch_stats, state.step)]
    for index, batch in enumerate(batches(len(TRACE))):
        age = int(TRACE[index])
        before = kept[index - age] if mode == "worker" else kept[-1]
        _, (expected, _, _) = gradient(params[index - age], before, batch, None)
        state, _ = step(state, batch)
        params.append(state.params)
        kept.append(expected)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            chains.live(state.batch_stats, state.step),
            expected,
        )


def test_recalibration_is_the_mean_of_batch_statistics():
    model = models.create("mnist_cnn_bn", num_classes=10, width=0.1, conv_impl="lax")
    state = init_state(model, optax.sgd(0.1), SHAPE, 0)
    images = [preprocess(None, batch.images[0]) for batch in batches(3)]
    measured = recalibrate(model, state.params, state.batch_stats, images)
    first = next(iter(measured.values()))
    name = next(name for name in state.params if name.startswith("Conv"))
    kernel = state.params[name]["kernel"]
    outputs = [
        jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + state.params[name].get("bias", 0.0)
        for x in images
    ]
    mean = np.mean([np.asarray(y).mean((0, 1, 2)) for y in outputs], axis=0)
    var = np.mean([np.asarray(y).var((0, 1, 2)) for y in outputs], axis=0)
    np.testing.assert_allclose(first["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first["var"], var, rtol=1e-3, atol=1e-5)
