"""The top of the spectrum, its trace and its density, against dense Hessians; preconditioners."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import asgd_jax
from asgd_jax import curvature
from asgd_jax.curvature import GaussNewton


@cache
def problem():
    """A small tanh network on random data, with its dense Hessian and its Gauss-Newton matrix."""
    random = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(random.normal(size=(5, 4)) / 2, jnp.float32),
        "v": jnp.asarray(random.normal(size=(4, 3)), jnp.float32),
    }
    inputs = jnp.asarray(random.normal(size=(20, 5)), jnp.float32)
    targets = jnp.asarray(random.normal(size=(20, 3)), jnp.float32)
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(jax.hessian(lambda x: loss(unravel(x), (inputs, targets)))(flat))
    jacobian = np.asarray(jax.jacobian(lambda x: outputs(unravel(x), (inputs, targets)))(flat))
    jacobian = jacobian.reshape(-1, flat.size)
    return params, [(inputs, targets)], hessian.astype(np.float64), jacobian.T @ jacobian / 20


def outputs(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["v"]


def of_outputs(made, batch):
    return jnp.mean(jnp.sum((made - batch[1]) ** 2, axis=-1)) / 2


def loss(params, batch):
    return of_outputs(outputs(params, batch), batch)


def test_eigenpairs_are_those_of_the_dense_hessian():
    params, batches, hessian, _ = problem()
    expected = np.linalg.eigvalsh(hessian)[::-1]
    for k in (1, 4, 32):
        found = curvature.eigenpairs(loss, params, batches, k)
        assert found.values == pytest.approx(expected[:k], rel=1e-4, abs=1e-5)
        assert (found.residuals < 1e-3 * expected[0]).all()
        rows = np.stack([ravel_pytree(jax.tree.map(lambda leaf: leaf[at], found.vectors))[0]
                         for at in range(k)])  # fmt: skip
        assert rows @ rows.T == pytest.approx(np.eye(k), abs=1e-5)
    assert curvature.sharpness(loss, params, batches).value == pytest.approx(expected[0], rel=1e-3)


def test_arpack_finds_the_top_of_a_large_spectrum():
    """More parameters than Lanczos vectors, eigenvalues that are known."""
    spectrum = jnp.concatenate([jnp.array([9.0, 7.0, 7.0, 4.0]), jnp.linspace(-1.0, 1.0, 300)])
    found = curvature.eigenpairs(
        lambda p, batch: jnp.sum(spectrum * p**2) / 2, jnp.zeros(304), [None], 4, tol=1e-6
    )
    assert found.values == pytest.approx([9.0, 7.0, 7.0, 4.0], rel=1e-5)
    assert found.num_matvecs < 100


def test_gauss_newton_is_j_transposed_j():
    params, batches, _, expected = problem()
    flat, unravel = ravel_pytree(params)
    product = curvature.hessian_vector_product(GaussNewton(outputs, of_outputs))
    for row in (0, 7):
        made, _ = ravel_pytree(product(params, unravel(jnp.eye(flat.size)[row]), batches))
        assert np.asarray(made) == pytest.approx(expected[row], rel=1e-4, abs=1e-5)
    top = curvature.sharpness(GaussNewton(outputs, of_outputs), params, batches).value
    assert top == pytest.approx(np.linalg.eigvalsh(expected)[-1], rel=1e-3)


def test_the_trace_lies_within_its_standard_error():
    params, batches, hessian, _ = problem()
    found = curvature.trace(loss, params, batches, num_vectors=64)
    assert abs(found.value - np.trace(hessian)) < 3 * found.standard_error
    # The variance of Hutchinson's estimator: twice the squares off the diagonal.
    spread = np.sqrt(2 * (np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2)) / 64)
    assert found.standard_error == pytest.approx(spread, rel=0.4)
    assert np.isnan(curvature.trace(loss, params, batches, num_vectors=1).standard_error)


def test_the_density_has_the_moments_of_the_spectrum():
    """Of one vector exactly: v^T H^p v; on average over vectors those of all eigenvalues."""
    params, batches, hessian, _ = problem()
    values = np.linalg.eigvalsh(hessian)
    density = curvature.spectral_density(loss, params, batches, num_vectors=200, num_steps=6)
    assert density.weights.sum(axis=1) == pytest.approx(np.ones(200))
    for power in (1, 2, 3):
        moments = np.sum(density.weights * density.nodes**power, axis=1)
        error = moments.std(ddof=1) / np.sqrt(200)
        assert abs(moments.mean() - np.mean(values**power)) < 4 * error
    middle = (values[-3] + values[-4]) / 2
    share = curvature.spectral_density(loss, params, batches, num_vectors=40, num_steps=32)
    assert share.share_above(middle) == pytest.approx(3 / 32, abs=0.04)


def test_a_preconditioner_is_divided_by_on_both_sides():
    params, batches, hessian, _ = problem()
    flat, unravel = ravel_pytree(params)
    diagonal = np.linspace(0.1, 3.0, flat.size)
    scaled = hessian / np.sqrt(np.outer(diagonal, diagonal))
    expected = np.linalg.eigvalsh(scaled)[::-1]
    given = unravel(jnp.asarray(diagonal, jnp.float32))
    top = curvature.sharpness(loss, params, batches, preconditioner=given)
    assert top.value == pytest.approx(expected[0], rel=1e-3)
    found = curvature.eigenpairs(loss, params, batches, 3, preconditioner=given)
    assert found.values == pytest.approx(expected[:3], rel=1e-4)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: asgd_jax.delayed(tx, 2)])
def test_adam_s_preconditioner_is_what_its_update_divides_by(wrap):
    """Found from the update: with b1 = 0 it is -learning_rate * gradient / D."""
    tx = wrap(optax.adamw(optax.constant_schedule(0.1), b1=0.0, b2=0.9, eps=1e-3, weight_decay=0))
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    state = tx.init(params)
    for scale in (1.0, 0.3, 2.0):
        gradient = {"a": scale * jnp.array([1.0, -2.0]), "b": jnp.array([0.01])}
        updates, state = tx.update(gradient, state, params)
    found = curvature.adam_preconditioner(state, b2=0.9, eps=1e-3)
    expected = jax.tree.map(lambda g, u: -0.1 * g / u, gradient, updates)
    for name in params:
        assert np.asarray(found[name]) == pytest.approx(np.asarray(expected[name]), rel=1e-5)


def test_divergence_is_a_result():
    def lost(params, batch):
        return jnp.sum(params**2) * jnp.inf

    assert np.isnan(curvature.eigenpairs(lost, jnp.ones(2), [None], 1).values).all()
    assert np.isnan(curvature.trace(lost, jnp.ones(2), [None]).value)
    assert np.isnan(curvature.spectral_density(lost, jnp.ones(2), [None]).nodes).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: curvature.eigenpairs(*a, 0), r"k must be an integer from 1 to the 32"),
        (lambda *a: curvature.eigenpairs(*a, 33), r"k must be an integer from 1 to the 32"),
        (lambda *a: curvature.trace(*a, num_vectors=0), r"num_vectors must be an integer >= 1"),
        (
            lambda *a: curvature.spectral_density(*a, num_steps=0.5),
            r"num_steps must be an integer >= 1, got 0.5",
        ),
        (
            lambda *a: curvature.sharpness(*a, preconditioner=jnp.ones(3)),
            r"preconditioner has the shapes",
        ),
        (
            lambda *a: curvature.eigenpairs(
                *a, 1, preconditioner=jax.tree.map(jnp.zeros_like, a[1])
            ),
            r"preconditioner has an entry 0: all must be > 0",
        ),
        (lambda f, p, b: curvature.trace(f, p, iter(b)), r"one-shot list_iterator"),
        (lambda *a: curvature.adam_preconditioner(optax.sgd(0.1).init(a[1])), r"0 entries nu"),
        (
            lambda *a: curvature.adam_preconditioner(optax.adam(0.1).init(a[1])),
            r"has made no update yet",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    params, batches, _, _ = problem()
    with pytest.raises(ValueError, match=message) as error:
        call(loss, params, batches)
    assert "\n" not in str(error.value)


def test_the_preconditioner_is_what_the_last_step_divided_by():
    """Of AMSGrad the largest moment; of optimizers that divide by something else nothing."""
    params = jnp.ones(2)
    gradients = [jnp.array([10.0, -1.0])] * 3 + [jnp.array([0.1, 0.1])] * 20
    for tx in (optax.adam(1.0, eps=0.0), optax.amsgrad(1.0, eps=0.0)):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
        mu = state[0].mu / (1.0 - 0.9 ** len(gradients))
        diagonal = curvature.adam_preconditioner(state, eps=0.0)
        np.testing.assert_allclose(-mu / updates, diagonal, rtol=1e-4)
    for tx in (optax.rmsprop(optax.constant_schedule(0.1)), optax.adabelief(0.1)):
        _, state = tx.update(params, tx.init(params), params)
        with pytest.raises(ValueError, match="is no Adam's: it divides by something else"):
            curvature.adam_preconditioner(state)
