"""Sharpness against dense Hessians, closed forms, and batches that do not hold still."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from asgd_jax.curvature import hessian_vector_product, make_sharpness, sharpness


@cache
def digits(pixels=4):
    """400 real digits, averaged down to pixels x pixels."""
    images, labels = load_digits(return_X_y=True)
    blocks = images[:400].reshape(400, pixels, 8 // pixels, pixels, 8 // pixels)
    images = blocks.mean(axis=(2, 4)).reshape(400, -1) / 16
    return images.astype(np.float32), np.eye(10, dtype=np.float32)[labels[:400]]


def mlp_params(inputs=16, hidden=6, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "hidden": {
            "w": (scale * rng.normal(size=(inputs, hidden)) / inputs**0.5).astype(np.float32),
            "b": (scale * rng.normal(size=hidden) / 8).astype(np.float32),
        },
        "head": (scale * rng.normal(size=(hidden, 10)) / 2).astype(np.float32),
    }


def mlp_loss(params, batch):
    images, targets = batch
    hidden = jnp.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(hidden @ params["head"]), axis=-1))


@partial(jax.jit, static_argnums=0)
def _hessian(loss_fn, params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: loss_fn(unravel(x), batch))(flat)


def dense_hessian(loss_fn, params, batch):
    hessian = np.asarray(_hessian(loss_fn, params, batch), np.float64)
    return (hessian + hessian.T) / 2


def split(data, *cuts):
    return list(zip(*(np.split(array, cuts) for array in data), strict=True))


def symmetric(spectrum, seed=0):
    """A dense symmetric matrix of this spectrum, and its eigenvectors as columns."""
    size = len(spectrum)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return (basis * np.asarray(spectrum)) @ basis.T, basis


def quadratic(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return lambda params, batch: params @ matrix @ params / 2


@pytest.fixture(scope="module")
def measure():
    """One function for all the tests of the network, so that each batch shape compiles once."""
    return make_sharpness(mlp_loss)


def least_squares(params, rows):
    return jnp.mean((rows @ params) ** 2) / 2


def test_digits_mlp_matches_the_dense_hessian_along_training(measure):
    data = digits(pixels=8)
    params = mlp_params(inputs=64, hidden=4)
    gradient = jax.jit(jax.grad(mlp_loss))
    for steps in (0, 100):
        for _ in range(steps):
            params = jax.tree.map(lambda x, g: x - 0.5 * g, params, gradient(params, data))
        result = measure(params, split(data, 200))
        hessian = dense_hessian(mlp_loss, params, data)
        assert result.value == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-3)
        check_eigenpair(result, hessian, params)


def check_eigenpair(result, hessian, params):
    vector = np.asarray(ravel_pytree(result.vector)[0], float)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    true_residual = np.linalg.norm(hessian @ vector - result.value * vector)
    assert result.residual == pytest.approx(true_residual, abs=1e-5)
    assert result.residual < 1e-2 * result.value
    assert jax.tree.map(np.shape, result.vector) == jax.tree.map(np.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.vector)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "spectrum",
    [
        np.r_[np.linspace(-1, 1, 49), 5.0],
        np.r_[np.linspace(-1, 1, 49), -50.0],  # the largest in magnitude is not the answer
        np.linspace(-9, -2, 30),
        np.zeros(30),
        np.full(30, 4.0),
        [-3.0],
        [2.0, -3.0],
        np.arange(12.0),  # the last size that is solved densely, and the first that is not
        np.arange(13.0),
    ],
    ids=lambda spectrum: f"{spectrum[0]:g}_to_{spectrum[-1]:g}",
)
def test_quadratic_closed_form(spectrum):
    matrix, _ = symmetric(spectrum)
    size = len(spectrum)
    result = sharpness(quadratic(matrix), jnp.ones(size), [None])
    assert result.value == pytest.approx(np.max(spectrum), rel=1e-3, abs=1e-6)
    assert 1 <= result.num_matvecs <= 300


@settings(max_examples=12, deadline=None)
@given(
    spectrum=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=24),
    seed=st.integers(0, 2**32 - 1),
)
def test_some_eigenvalue_lies_within_the_residual(spectrum, seed):
    matrix, _ = symmetric(spectrum, seed)
    result = sharpness(quadratic(matrix), jnp.zeros(len(spectrum)), [None], seed=seed)
    rounding = 1e-5 * max(1, np.abs(spectrum).max())
    assert np.abs(np.asarray(spectrum) - result.value).min() <= result.residual + rounding
    assert result.value <= max(spectrum) + rounding


def test_unequal_batches_give_the_mean_over_the_data():
    rows = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    expected = np.linalg.eigvalsh(rows.T.astype(float) @ rows / 50)[-1]
    mean_of_means = np.linalg.eigvalsh(rows[:47].T @ rows[:47] / 94 + rows[47:].T @ rows[47:] / 6)[
        -1
    ]
    result = sharpness(least_squares, jnp.zeros(20), np.split(rows, [47]), tol=1e-6)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert result.value != pytest.approx(mean_of_means, rel=0.1)


def test_product_is_the_dense_hessian_times_the_vector():
    data = digits()
    params = mlp_params()
    vector = mlp_params(seed=1)
    product = hessian_vector_product(mlp_loss)
    batches = split(data, 200)
    result = product(params, vector, batches)
    expected = dense_hessian(mlp_loss, params, data) @ np.asarray(ravel_pytree(vector)[0], float)
    np.testing.assert_allclose(ravel_pytree(result)[0], expected, rtol=1e-4, atol=1e-5)
    once = product(params, vector, (batch for batch in batches))
    jax.tree.map(np.testing.assert_array_equal, once, result)
    jitted = jax.jit(product)(params, vector, batches)
    np.testing.assert_allclose(ravel_pytree(jitted)[0], ravel_pytree(result)[0], atol=1e-5)


def test_nothing_is_traced_again_for_new_parameters():
    traces = []

    def counted(params, rows):
        traces.append(rows.shape)
        return least_squares(params, rows)

    rng = np.random.default_rng(0)
    batches = np.split(rng.normal(size=(25, 20)).astype(np.float32), [10, 20])
    measure = make_sharpness(counted)
    vector = None
    for seed in range(3):
        params = rng.normal(size=20).astype(np.float32)
        vector = measure(params, batches, seed=seed, initial_vector=vector).vector
    assert sorted(traces) == [(5, 20), (10, 20)]

    product = hessian_vector_product(counted)
    for _ in range(3):
        product(vector, vector, batches)
    assert len(traces) == 4


def test_one_seed_gives_one_answer(measure):
    batches = [digits()]
    first, again, other = (measure(mlp_params(), batches, seed=seed) for seed in (3, 3, 4))
    assert first[:3] == again[:3]
    jax.tree.map(np.testing.assert_array_equal, first.vector, again.vector)
    assert first.residual != other.residual


class Reshuffled:
    """Iterates anew in another order each time, as data loaders do."""

    def __init__(self, data, size):
        self.data, self.size, self.rng = data, size, np.random.default_rng(0)

    def __iter__(self):
        order = self.rng.permutation(len(self.data[0]))
        for start in range(0, len(order), self.size):
            yield tuple(part[order[start : start + self.size]] for part in self.data)


@pytest.mark.parametrize("size", [100, 400], ids=["across_batches", "within_one_batch"])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["", "every_loss_equal"])
def test_reshuffled_batches_are_refused(measure, size, scale):
    with pytest.raises(ValueError, match=r"batches changed .*, at batch 0.*shuffling"):
        measure(mlp_params(scale=scale), Reshuffled(digits(), size))


def passes(*each):
    """A function that returns the next of these lists, the last one for ever."""
    remaining = list(each)
    return lambda: iter(remaining.pop(0) if len(remaining) > 1 else remaining[0])


def test_batches_that_come_or_go_are_refused(measure):
    batches = split(digits(), 100, 200, 300)[:3]
    params = mlp_params()
    generator = (batch for batch in batches)
    with pytest.raises(ValueError, match="one-shot generator"):
        measure(params, generator)
    with pytest.raises(ValueError, match=r"gave 0 in a pass that needs 3: .* exhausted"):
        measure(params, lambda: generator)
    with pytest.raises(ValueError, match="gave 2 in a pass that needs 3"):
        measure(params, passes(batches, batches[:2]))
    with pytest.raises(ValueError, match="changed between two passes, at batch 2"):
        measure(params, passes(batches[:2], batches))
    with pytest.raises(ValueError, match="changed between two passes, at batch 0"):
        measure(params, passes(batches, batches[::-1]))
    fixed = measure(params, lambda: iter(batches))
    assert fixed[:3] == measure(params, batches)[:3]


@pytest.mark.parametrize(
    "leaf",
    [
        np.zeros(5, bool),
        np.zeros((2, 3), np.uint8),
        np.zeros(4, np.int32),
        np.zeros(3, np.complex64),
        jnp.zeros((2, 2), jnp.bfloat16),
        jnp.zeros(4, jnp.float8_e4m3fn),
        np.zeros(3, np.float64),
        2.5,
    ],
    ids=lambda leaf: str(np.asarray(leaf).dtype),
)
def test_one_changed_element_is_seen_in_any_dtype(leaf):
    flat = np.array(leaf).ravel()
    flat[-1] = 1
    changed = flat.reshape(np.shape(leaf))
    params = jnp.ones(20)

    def loss(params, batch):
        return jnp.sum(params**4) + 0 * jnp.sum(batch[0])

    ones = np.ones(7, np.float32)
    assert sharpness(loss, params, [(ones, leaf)]).value == pytest.approx(12, rel=1e-3)
    with pytest.raises(ValueError, match="batches changed"):
        sharpness(loss, params, passes([(ones, leaf)], [(ones, changed)]))


def test_a_changed_random_key_is_seen():
    batches = passes(*([(np.ones(3, np.float32), jax.random.key(n))] for n in (0, 1)))
    with pytest.raises(ValueError, match="batches changed"):
        sharpness(lambda params, batch: jnp.sum(params**2), jnp.ones(20), batches)


def test_low_precision_leaves_keep_their_dtype():
    data, params = digits(), mlp_params()
    params["hidden"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["hidden"])
    result = sharpness(mlp_loss, params, [data])
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    top = np.linalg.eigvalsh(dense_hessian(mlp_loss, exact, data))[-1]
    assert result.value == pytest.approx(top, rel=1e-2)
    product = hessian_vector_product(mlp_loss)(params, result.vector, [data])
    for tree in (result.vector, product):
        assert jax.tree.map(jnp.result_type, tree) == jax.tree.map(jnp.result_type, params)


def test_float64_reaches_float64_accuracy():
    data = digits()
    measure = make_sharpness(mlp_loss, tol=1e-12)
    single = measure(mlp_params(), [data])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), mlp_params())
        wide = tuple(part.astype(np.float64) for part in data)
        result = measure(params, [wide])
        expected = np.linalg.eigvalsh(dense_hessian(mlp_loss, params, wide))[-1]
        assert result.vector["head"].dtype == np.float64
    assert result.value == pytest.approx(expected, rel=1e-10)
    assert result.residual < 1e-8
    assert single.value == pytest.approx(expected, rel=1e-5)


class NormalisedMlp(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(images))
        return nn.Dense(10)(jnp.tanh(hidden))


def test_batch_normalisation_with_running_statistics():
    data = digits()
    model = NormalisedMlp()
    params = jax.jit(partial(model.init, train=False))(jax.random.key(0), data[0])["params"]
    statistics = {"BatchNorm_0": {"mean": jnp.array([1.0, -1, 0, 2]), "var": jnp.full(4, 0.5)}}

    def loss(params, batch):
        images, targets = batch
        logits = model.apply({"params": params, "batch_stats": statistics}, images, train=False)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

    expected = np.linalg.eigvalsh(dense_hessian(loss, params, data))[-1]
    result = sharpness(loss, params, split(data, 200))
    assert result.value == pytest.approx(expected, rel=1e-3)
    assert jax.tree.structure(result.vector) == jax.tree.structure(params)


def test_warm_start_finds_a_new_top_eigenvector():
    before, basis = symmetric(np.r_[np.linspace(0, 1, 38), 2.0, 3.0])
    after = before + 4 * np.outer(basis[:, -2], basis[:, -2])  # now the other one is the largest: 6
    stuck = jnp.asarray(basis[:, -1], jnp.float32)
    warm = sharpness(quadratic(after), jnp.zeros(40), [None], initial_vector=stuck)
    assert warm.value == pytest.approx(6, rel=1e-3)


def test_warm_start_saves_products():
    matrix, _ = symmetric(np.linspace(0, 1, 300))
    measure = make_sharpness(quadratic(matrix))
    cold = measure(jnp.zeros(300), [None])
    warm = measure(jnp.zeros(300), [None], initial_vector=cold.vector)
    assert warm.num_matvecs < cold.num_matvecs
    assert warm.value == pytest.approx(1, rel=1e-3)


def test_a_useless_initial_vector_is_ignored_and_a_wrong_one_refused():
    loss, params = quadratic(np.diag(np.arange(20.0))), jnp.ones(20)
    plain = sharpness(loss, params, [None])
    for useless in (jnp.zeros(20), jnp.full(20, jnp.nan)):
        assert sharpness(loss, params, [None], initial_vector=useless)[:3] == plain[:3]
    with pytest.raises(ValueError, match=r"initial_vector has the shapes \(19,\), params \(20,\)"):
        sharpness(loss, params, [None], initial_vector=jnp.zeros(19))


@pytest.mark.parametrize("budget", [14, 20, 45])
def test_without_convergence_the_best_estimate_comes_back(budget):
    spectrum = np.linspace(0, 1, 300)
    matrix, _ = symmetric(spectrum)
    result = sharpness(quadratic(matrix), jnp.zeros(300), [None], tol=1e-9, max_matvecs=budget)
    assert result.num_matvecs <= budget
    assert 0.97 < result.value <= 1 + 1e-6
    vector = np.asarray(result.vector, float)
    true_residual = np.linalg.norm(matrix @ vector - result.value * vector)
    assert 1e-4 < result.residual == pytest.approx(true_residual, abs=1e-6)


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize(
    "loss",
    [
        lambda params, batch: jnp.sum(params**2) + jnp.inf,  # a finite Hessian, an infinite loss
        lambda params, batch: jnp.sum(jnp.sqrt(params - 1)),  # a finite loss, an infinite Hessian
        lambda params, batch: jnp.sum(params * jnp.nan),
    ],
    ids=["loss", "hessian", "both"],
)
def test_divergence_is_a_result(loss, size):
    result = sharpness(loss, jnp.ones(size), [None])
    assert np.isnan(result.value)
    assert np.isnan(result.residual)
    assert np.isnan(result.vector).all()
    assert result.num_matvecs == 1
    recovered = sharpness(
        lambda p, batch: jnp.sum(p**2), jnp.ones(size), [None], initial_vector=result.vector
    )
    assert recovered.value == pytest.approx(2, rel=1e-5)


def test_replicated_parameters_and_sharded_batches(measure):
    data = digits()
    mesh = jax.make_mesh((8,), ("batch",))
    replicated, sharded = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("batch",)))
    params = jax.device_put(mlp_params(), replicated)
    result = measure(params, [jax.device_put(data, sharded)])
    alone = measure(mlp_params(), [data])
    assert result.value == pytest.approx(alone.value, rel=1e-5)
    assert result.vector["head"].sharding == replicated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": 0.0}, "tol must be a finite number > 0, got 0.0"),
        ({"tol": float("nan")}, "tol must be .* got nan"),
        ({"max_matvecs": 3}, "max_matvecs is 3: pass at least 14"),
        ({"params": {"w": jnp.ones(2), "step": jnp.zeros((), jnp.int32)}}, r"\['step'\].* int32"),
        ({"params": {}}, "params holds no number"),
        ({"params": jnp.zeros((0, 3))}, "params holds no number"),
        ({"batches": []}, "gave 0 in a pass that needs 1"),
        ({"batches": {"image": jnp.ones(3)}}, r"batches is one dict.*pass \[batch\]"),
        ({"batches": np.ones(3)}, r"batches is one ndarray.*pass \[batch\]"),
        ({"batches": [(2.0, jnp.ones(3))]}, r"first leaf of a batch has shape \(\)"),
        ({"batches": [np.ones((0, 3))]}, r"first leaf of a batch has shape \(0, 3\)"),
    ],
)
def test_errors_name_the_value_and_the_remedy(change, message):
    arguments = {"params": jnp.ones(20), "batches": [None], **change}
    with pytest.raises(ValueError, match=message):
        sharpness(lambda params, batch: jnp.sum(params**2), **arguments)
