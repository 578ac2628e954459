"""Conv and max_pool against loops in numpy, Flax's own layers and each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

import asgd_jax.models.layers as layers

SHAPES = [
    # image, features, kernel, strides, padding
    ((2, 8, 8, 1), 4, (5, 5), (1, 1), "VALID"),
    ((2, 6, 7, 3), 5, (3, 3), (1, 1), "SAME"),
    ((2, 8, 8, 4), 3, (3, 3), (2, 2), "SAME"),
    ((2, 7, 9, 4), 3, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 6, 6, 4), 8, (1, 1), (1, 1), "SAME"),
    ((2, 7, 6, 4), 8, (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((1, 16, 16, 3), 4, (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((2, 6, 8, 2), 3, (2, 3), (1, 3), ((0, 1), (2, 0))),
    ((1, 1, 1, 6), 4, (3, 3), (1, 1), "SAME"),
]


def looped_conv(x, kernel, strides, pads):
    """The definition, in float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    rows = range(0, x.shape[1] - height + 1, strides[0])
    columns = range(0, x.shape[2] - width + 1, strides[1])
    y = np.zeros((x.shape[0], len(rows), len(columns), kernel.shape[3]))
    for a, i in enumerate(rows):
        for b, j in enumerate(columns):
            y[:, a, b] = np.einsum("nhwc,hwcd->nd", x[:, i : i + height, j : j + width], kernel)
    return y


def setup(case, conv_impl, **kwargs):
    """The layer, its parameters and its input, drawn by numpy: initialisers compile slowly."""
    shape, features, kernel_size, strides, padding = case
    conv = layers.Conv(features, kernel_size, strides, padding, conv_impl=conv_impl, **kwargs)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype),
        jax.eval_shape(conv.init, jax.random.key(0), x),
    )
    return conv, variables, x


@pytest.mark.parametrize("case", SHAPES)
def test_both_implementations_are_the_convolution(case):
    for conv_impl in ("cpu", "lax"):
        conv, variables, x = setup(case, conv_impl)
        padding = case[4]
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], case[2], case[3], padding)
        expected = looped_conv(x, variables["params"]["kernel"], case[3], padding)
        actual = jax.jit(conv.apply)(variables, x)
        assert actual.dtype == jnp.float32
        assert_close(actual, expected + np.asarray(variables["params"]["bias"]))


@pytest.mark.parametrize("case", SHAPES)
def test_implementations_agree_in_parameters_gradients_and_hessian_vector_products(case):
    results = []
    for conv_impl in ("cpu", "lax"):
        conv, variables, x = setup(case, conv_impl)
        gradient = jax.grad(lambda v, x: jnp.sum(jnp.sin(conv.apply(v, x))), argnums=(0, 1))
        derivatives = jax.jit(lambda v, x: jax.jvp(gradient, (v, x), (v, x)))
        results.append((variables, derivatives(variables, x)))
    patches, lax = results
    # Equal names and shapes: the draws are equal then.
    jax.tree.map(np.testing.assert_array_equal, patches[0], lax[0])
    assert_close(patches[1], lax[1], ulps=512)


@pytest.mark.parametrize("conv_impl", ["cpu", "lax"])
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[7]])
def test_batch_last_is_the_same_layer_with_the_ends_exchanged(case, conv_impl):
    conv, variables, x = setup(case, "lax")
    turned = layers.Conv(*case[1:], conv_impl=conv_impl, batch_last=True)

    def by_turned(v, x):
        return jnp.swapaxes(turned.apply(v, jnp.swapaxes(x, 0, 3)), 0, 3)

    def derivatives(apply):
        """The output, the gradient, and a product with the Hessian."""
        gradient = jax.grad(lambda v, x: jnp.sum(jnp.sin(apply(v, x))), argnums=(0, 1))
        both = jax.jit(lambda v, x: (apply(v, x), jax.jvp(gradient, (v, x), (v, x))))
        return both(variables, x)

    assert_close(derivatives(by_turned), derivatives(conv.apply), ulps=512)
    shapes = jax.eval_shape(turned.init, jax.random.key(0), jnp.swapaxes(x, 0, 3))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_hessian_vector_products_of_batch_last_are_the_dense_hessians():
    conv = layers.Conv(2, (2, 2), padding="VALID", conv_impl="cpu", batch_last=True)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2, 2, 2, 2)), jnp.float32)

    def loss(flat):
        parameters = {"kernel": flat[:16].reshape(kernel.shape), "bias": flat[16:]}
        y = conv.apply({"params": parameters}, x)
        return jnp.sum(nn.relu(layers.max_pool(y)) ** 2) + jnp.sum(jnp.sin(y))

    point = jnp.concatenate([kernel.ravel(), jnp.array([0.5, -0.5])])
    vector = jnp.asarray(rng.normal(size=18), jnp.float32)
    product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(point, vector)
    np.testing.assert_allclose(product, jax.hessian(loss)(point) @ vector, rtol=1e-4, atol=1e-4)


def test_batch_last_in_bfloat16_and_mapped_over_images_and_kernels():
    conv, variables, x = setup(SHAPES[1], "cpu")
    turned = conv.clone(batch_last=True)
    images = jnp.stack([x, -2 * x, x + 1])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), variables)
    for kernels, axis in ((variables, None), (stacked, 0)):
        together = jax.vmap(turned.apply, (axis, 0))(kernels, jnp.swapaxes(images, 1, 4))
        expected = jax.vmap(conv.apply, (axis, 0))(kernels, images)
        assert_close(jnp.swapaxes(together, 1, 4), expected)
    half = turned.clone(dtype=jnp.bfloat16).apply(variables, jnp.swapaxes(x, 0, 3))
    exact = jnp.swapaxes(conv.apply(variables, x), 0, 3)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max())
    )


def test_parameters_are_those_of_flax():
    case = SHAPES[3]
    conv, _, x = setup(case, "cpu")
    flax_conv = nn.Conv(case[1], case[2], strides=case[3], padding=case[4])
    variables = jax.jit(conv.init)(jax.random.key(1), x)
    expected = jax.jit(flax_conv.init)(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert_close(conv.apply(variables, x), flax_conv.apply(variables, x))


def test_no_bias():
    _, variables, _ = setup(SHAPES[1], "cpu", use_bias=False)
    assert list(variables["params"]) == ["kernel"]


@pytest.mark.parametrize("conv_impl", ["cpu", "lax"])
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(conv_impl):
    conv, variables, x = setup(SHAPES[1], conv_impl, dtype=jnp.bfloat16)
    y = conv.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    exact = setup(SHAPES[1], conv_impl)[0].apply(variables, x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02 * float(exact.max()))


def test_small_outputs_have_no_convolution_and_lax_has_one():
    for conv_impl, expected in (("cpu", False), ("lax", True)):
        conv, variables, x = setup(SHAPES[0], conv_impl)
        jaxpr = jax.make_jaxpr(jax.grad(lambda v, conv=conv, x=x: conv.apply(v, x).sum()))(
            variables
        )
        assert ("conv_general_dilated" in str(jaxpr)) == expected


def test_auto_is_chosen_by_the_backend(monkeypatch):
    assert layers.resolve_conv_impl("auto") == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert layers.resolve_conv_impl("auto") == "lax"


def test_vmap_over_kernels():
    conv, variables, x = setup(SHAPES[1], "cpu")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), variables)
    together = jax.vmap(conv.apply, in_axes=(0, None))(stacked, x)
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        assert_close(together[index], conv.apply(one, x))


@pytest.mark.parametrize("conv_impl", ["cpu", "lax"])
@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((2, 64), {}, r"images of shape \(batch, height, width, channels\), got \(2, 64\)"),
        ((2, 3, 3, 1), {"padding": "VALID"}, "5x5 kernel does not fit an image that is 3x3"),
        ((2, 8, 8, 1), {"padding": "full"}, "padding must be .* got 'full'"),
    ],
)
def test_bad_inputs_are_refused(conv_impl, shape, kwargs, message):
    conv = layers.Conv(4, (5, 5), conv_impl=conv_impl, **kwargs)
    with pytest.raises(ValueError, match=message):
        conv.init(jax.random.key(0), jnp.zeros(shape))


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"conv_impl must be one of .* got 'winograd'"):
        layers.Conv(4, conv_impl="winograd").init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.parametrize(
    ("height", "columns", "window", "stride", "padding"),
    [
        (4, 6, 2, 2, 0),
        (5, 7, 2, 2, 0),
        (8, 8, 3, 2, 1),
        (7, 5, 3, 2, 1),
        (6, 5, 3, 1, 2),
        (5, 4, 2, 3, 0),
    ],
)
def test_max_pool_is_that_of_flax(height, columns, window, stride, padding):
    # Distinct values: where there are ties the two share the gradient differently.
    values = np.random.default_rng(0).permutation(2 * height * columns * 3)
    x = jnp.asarray(values.reshape(2, height, columns, 3), jnp.float32) - 20

    def flax(x):
        pads = ((padding, padding), (padding, padding))
        return nn.max_pool(x, (window, window), (stride, stride), pads)

    def value_and_gradient(pool):
        def loss(x):
            y = pool(x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.jit(jax.grad(loss, has_aux=True))(x)

    gradient, y = value_and_gradient(lambda x: layers.max_pool(x, window, stride, padding))
    expected_gradient, expected = value_and_gradient(flax)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_max_pool_shares_the_gradient_of_ties():
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.zeros((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 4, 4, 1), 0.25))


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1)])
def test_relu_after_max_pool_is_relu_before_it(window, stride, padding):
    # Few distinct values: ties between positive, negative and zero entries all occur.
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (4, 8, 8, 5)), jnp.float32)

    def value_and_gradient(network):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(network(x))))(x)

    before = value_and_gradient(lambda x: layers.max_pool(nn.relu(x), window, stride, padding))
    after = value_and_gradient(lambda x: nn.relu(layers.max_pool(x, window, stride, padding)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_max_pool_keeps_nan_and_dtype():
    x = jnp.zeros((1, 4, 4, 1), jnp.bfloat16).at[0, 1, 2, 0].set(jnp.nan)
    y = layers.max_pool(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.isnan(y[0, :, :, 0]), [[False, True], [False, False]])


def test_max_pool_uses_no_reduce_window():
    jaxpr = str(
        jax.make_jaxpr(jax.grad(lambda x: layers.max_pool(x, 3, 2, 1).sum()))(
            jnp.zeros((1, 8, 8, 2))
        )
    )
    assert "reduce_window" not in jaxpr
    assert "select_and" not in jaxpr


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 1, 4, 2), (), r"a 2x2 window does not fit an input of shape \(1, 1, 4, 2\)"),
        ((4, 4), (), r"a 2x2 window does not fit an input of shape \(4, 4\)"),
        ((1, 4, 4, 2), (2, 2, 2), "padding must be less than window=2, got 2"),
    ],
)
def test_max_pool_refuses(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.max_pool(jnp.zeros(shape), *arguments)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_has_the_documented_constants(train):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (64, 2, 2, 3)), jnp.float32)
    norm = layers.batch_norm(train, jnp.float32)
    variables = norm.init(jax.random.key(1), x)
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    mean, variance = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    if train:
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5), atol=1e-4)
        np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4)
        np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    else:
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-5)
        jax.tree.map(
            np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"]
        )
