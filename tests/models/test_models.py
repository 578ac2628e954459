"""Every model by name: sizes, initialisation, BatchNorm, dtypes, and refusals."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asgd_jax.models as models

INPUTS = {
    "mlp": (8, 8, 1),
    "digits_cnn": (8, 8, 1),
    "mnist_cnn": (28, 28, 1),
    "mnist_cnn_bn": (28, 28, 1),
    "vgg11": (32, 32, 3),
    "resnet20": (32, 32, 3),
    "resnet44": (32, 32, 3),
    "resnet50": (32, 32, 3),
}
WITH_BATCH_NORM = ["mnist_cnn_bn", "resnet20", "resnet50"]
# Options under which a model has every kind of its layers, but few of them: quick to compile.
SHALLOW = {
    "resnet20": {"stage_sizes": (1, 1), "channels": (16, 32)},
    "resnet50": {"stage_sizes": (1, 1), "channels": (16, 32)},
}


def shapes(name, image=None, num_classes=10, **kwargs):
    """Logits and variables as shapes only: nothing is computed."""
    model = models.create(name, num_classes=num_classes, **kwargs)
    x = jax.ShapeDtypeStruct((2, *(image or INPUTS[name])), jnp.float32)
    return jax.eval_shape(
        lambda key, x: model.init_with_output(key, x, train=False), jax.random.key(0), x
    )


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def variables_like(tree, seed=0):
    """Random variables of the given shapes: nothing hides behind an initial 0 or 1.

    Drawn by numpy, since compiling an initialiser for every shape takes seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return jnp.asarray(around + rng.uniform(-0.2, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def tiny(name, **kwargs):
    """A narrow, shallow model with random variables and a batch of four images."""
    kwargs = {"num_classes": 5, "width": 0.1, **SHALLOW.get(name, {}), **kwargs}
    images = np.random.default_rng(1).normal(size=(4, *INPUTS[name]))
    variables = variables_like(shapes(name, **kwargs)[1])
    return models.create(name, **kwargs), variables, jnp.asarray(images, jnp.float32)


def closed_form_resnet_6n_2(n, projection, num_classes=10):
    """Parameters of a CIFAR ResNet: 3x3 convolutions, two numbers per BatchNorm channel, dense."""
    total = 9 * 3 * 16 + 2 * 16
    for before, channels in ((16, 16), (16, 32), (32, 64)):
        total += 9 * before * channels + (2 * n - 1) * 9 * channels**2 + 2 * n * 2 * channels
        if projection and before != channels:
            total += before * channels + 2 * channels
    return total + 64 * num_classes + num_classes


def test_every_name_is_here():
    # The transformer has a file of its own: its input is text.
    assert {*INPUTS, "char_transformer"} == set(models.MODELS)


@pytest.mark.parametrize(
    ("name", "num_classes", "kwargs", "expected"),
    [
        ("mlp", 10, {}, 64 * 64 + 64 + 64 * 10 + 10),
        ("mlp", 10, {"hidden": (32, 16)}, 65 * 32 + 33 * 16 + 17 * 10),
        ("mlp", 3, {"hidden": ()}, 65 * 3),
        ("digits_cnn", 10, {}, 10 * 16 + (9 * 16 + 1) * 32 + (4 * 32 + 1) * 10),
        ("mnist_cnn", 10, {}, 26 * 20 + (25 * 20 + 1) * 50 + 801 * 500 + 501 * 10),
        (
            "mnist_cnn_bn",
            10,
            {},
            9 * (32 + 32 * 64 + 64 * 64 + 64 * 128) + 2 * (32 + 64 + 64 + 128) + 129 * 10,
        ),
        ("vgg11", 10, {}, 9_225_610),
        # BatchNorm brings a scale and a bias per channel and takes the convolution's bias away.
        ("vgg11", 10, {"batch_norm": True}, 9_225_610 + 64 + 128 + 2 * 256 + 4 * 512),
        ("resnet20", 10, {}, closed_form_resnet_6n_2(3, projection=True)),
        ("resnet20", 10, {"shortcut": "identity"}, closed_form_resnet_6n_2(3, projection=False)),
        ("resnet20", 10, {"shortcut": "identity"}, 269_722),
        ("resnet44", 10, {}, closed_form_resnet_6n_2(7, projection=True)),
        ("resnet44", 10, {}, 661_338),
        ("resnet44", 100, {"shortcut": "identity"}, 658_586 + 65 * 90),
        ("resnet50", 1000, {}, 25_557_032),
    ],
)
def test_parameter_counts(name, num_classes, kwargs, expected):
    logits, variables = shapes(name, num_classes=num_classes, **kwargs)
    assert count(variables["params"]) == expected
    assert (logits.shape, logits.dtype) == ((2, num_classes), jnp.float32)


@pytest.mark.parametrize(("side", "position"), [(224, 7), (64, 2), (65, 3), (32, 1)])
def test_resnet50_takes_images_of_other_sizes(side, position):
    model = models.create("resnet50", num_classes=7, width=0.1)
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    logits, state = jax.eval_shape(
        lambda key, x: model.init_with_output(
            key, x, train=False, capture_intermediates=True, mutable=True
        ),
        jax.random.key(0),
        x,
    )
    assert logits.shape == (2, 7)
    (last,) = state["intermediates"]["ResidualBlock_15"]["__call__"]
    assert last.shape[1:3] == (position, position)


@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_cifar_models_take_larger_images(name):
    logits, variables = shapes(name, image=(64, 64, 3))
    assert logits.shape == (2, 10)
    assert count(variables["params"]) == count(shapes(name)[1]["params"])


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="2x2 window does not fit"):
        shapes("vgg11", image=(16, 16, 3))
    with pytest.raises(ValueError, match="5x5 kernel does not fit"):
        shapes("mnist_cnn", image=(8, 8, 1))


def test_width_scales_every_channel_count():
    _, variables = shapes("vgg11", width=0.5)
    widths = [variables["params"][f"Conv_{i}"]["kernel"].shape[-1] for i in range(8)]
    assert widths == [32, 64, 128, 128, 256, 256, 256, 256]
    _, variables = shapes("mnist_cnn", width=0.01)
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(variables["params"])} == {4, 5, 10}
    _, variables = shapes("resnet50", width=0.25, num_classes=3)
    assert variables["params"]["Dense_0"]["kernel"].shape == (512, 3)
    _, variables = shapes("mlp", width=0.5)
    assert variables["params"]["Dense_0"]["kernel"].shape == (64, 32)


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_implementations_give_the_same_parameters(name):
    trees = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes(name, conv_impl=impl)[1])
        for impl in ("cpu", "lax")
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("name", ["digits_cnn", "mnist_cnn_bn", "resnet20"])
def test_implementations_give_the_same_logits_and_gradients(name):
    model, variables, x = tiny(name)

    def loss(params, conv_impl):
        logits = model.clone(conv_impl=conv_impl).apply(
            {**variables, "params": params}, x, train=False
        )
        return jnp.sum(logits * jnp.cos(jnp.arange(5.0))), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    results = [gradient(variables["params"], impl) for impl in ("cpu", "lax")]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_train_updates_statistics_and_eval_does_not_mix_samples(name):
    model, variables, x = tiny(name)

    @jax.jit
    def train(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    evaluate = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    trained, updated = train(variables, x)
    for new, old in zip(
        jax.tree.leaves(updated["batch_stats"]),
        jax.tree.leaves(variables["batch_stats"]),
        strict=True,
    ):
        assert (new != old).all()
    others = x.at[1:].set(-x[1:])
    first, second = evaluate(variables, x), evaluate(variables, others)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1:] != second[1:]).any()
    assert (trained[0] != train(variables, others)[0][0]).any()


@pytest.mark.parametrize("name", sorted(set(INPUTS) - set(WITH_BATCH_NORM) - {"resnet44"}))
def test_models_without_batch_norm_have_parameters_only_and_no_mode(name):
    assert list(shapes(name)[1]) == ["params"]
    model = models.create(name, num_classes=3)
    x = jax.ShapeDtypeStruct((2, *INPUTS[name]), jnp.float32)
    variables = shapes(name, num_classes=3)[1]
    jaxprs = {
        str(jax.make_jaxpr(lambda v, x, train=train: model.apply(v, x, train=train))(variables, x))
        for train in (True, False)
    }
    assert len(jaxprs) == 1


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_bfloat16_keeps_float32_parameters_statistics_and_logits(name):
    logits, variables = shapes(name, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    model = models.create(name, num_classes=10, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, *INPUTS[name]), jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, x))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16[" in line for line in products)


@pytest.mark.parametrize("name", ["mnist_cnn_bn"])
def test_bfloat16_is_close_to_float32(name):
    model, variables, x = tiny(name)
    half = models.create(name, num_classes=5, width=0.1, dtype="bfloat16")
    exact, rounded = (
        jax.jit(lambda v, m=m: m.apply(v, x, train=False))(variables) for m in (model, half)
    )
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_mlp_is_the_formula():
    model = models.create("mlp", num_classes=3, hidden=(6, 5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 3, 1)), jnp.float32)
    shape = shapes("mlp", image=(2, 3, 1), num_classes=3, hidden=(6, 5))[1]
    variables = variables_like(shape)
    y = np.asarray(x, np.float64).reshape(4, 6)
    for index in range(3):
        layer = variables["params"][f"Dense_{index}"]
        y = y @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        y = np.tanh(y) if index < 2 else y
    np.testing.assert_allclose(model.apply(variables, x, train=True), y, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_mlp_activation(activation):
    model, variables, x = tiny("mlp", activation=activation)
    params = variables["params"]
    x = x.reshape(4, 64)
    hidden = getattr(nn, activation)(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(model.apply(variables, x, train=False), expected, atol=1e-5)


def test_kaiming_initialisation():
    model = models.create("resnet50", num_classes=50, stage_sizes=(1,), channels=(64,))
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(3))["params"]
    block = params["ResidualBlock_0"]
    for kernel in (params["Conv_0"]["kernel"], block["Conv_1"]["kernel"]):
        fan_out = math.prod(kernel.shape[:2]) * kernel.shape[-1]
        kernel = np.asarray(kernel)
        assert kernel.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        # A normal, not a truncated one.
        assert np.abs(kernel).max() > 3 * kernel.std()
    assert np.asarray(params["Dense_0"]["kernel"]).std() == pytest.approx(0.01, rel=0.03)
    assert not np.asarray(params["Dense_0"]["bias"]).any()
    # The block starts as its shortcut.
    scales = [np.asarray(block[f"BatchNorm_{i}"]["scale"]) for i in range(3)]
    assert [np.unique(scale).tolist() for scale in scales] == [[1.0], [1.0], [0.0]]
    assert not models.create("resnet44", num_classes=10).zero_init_residual


def test_vgg_and_batch_norm_cnn_share_the_initialiser():
    for name in ("vgg11", "mnist_cnn_bn"):
        model = models.create(name, num_classes=5)
        x = jnp.zeros((1, *INPUTS[name]))
        init = jax.jit(lambda key: model.init(key, x, train=False)["params"]["Conv_1"]["kernel"])
        kernel = np.asarray(init(jax.random.key(0)))
        fan_out = 9 * kernel.shape[-1]
        assert kernel.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)


def test_resnet50_strides_in_the_three_by_three_convolution():
    model = models.create("resnet50", num_classes=3, width=0.1)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    _, state = jax.eval_shape(
        lambda key, x: model.init_with_output(
            key, x, train=False, capture_intermediates=True, mutable=True
        ),
        jax.random.key(0),
        x,
    )
    # The first block of the second stage.
    block = state["intermediates"]["ResidualBlock_3"]
    sides = [block[f"Conv_{i}"]["__call__"][0].shape[1] for i in range(3)]
    assert sides == [16, 8, 8]
    assert block["shortcut_conv"]["__call__"][0].shape[1] == 8


def test_identity_shortcut_subsamples_and_pads_with_zeros():
    model, variables, x = tiny("resnet20", shortcut="identity", width=0.25)
    # With its last BatchNorm at zero the block is ReLU of its shortcut.
    last = variables["params"]["ResidualBlock_1"]["BatchNorm_1"]
    last.update(jax.tree.map(jnp.zeros_like, last))
    _, state = jax.jit(
        lambda v: model.apply(
            v, x, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
    )(variables)
    blocks = state["intermediates"]
    before = blocks["ResidualBlock_0"]["__call__"][0]
    after = blocks["ResidualBlock_1"]["__call__"][0]
    np.testing.assert_array_equal(after[..., :4], before[:, ::2, ::2])
    assert after.shape[-1] == 8
    assert not np.asarray(after[..., 4:]).any()


def test_weight_decay_can_tell_kernels_by_their_names():
    names = {
        path[-1].key
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes("resnet50")[1]["params"])
    }
    assert names == {"kernel", "bias", "scale"}


def test_models_are_hashable_also_when_options_come_from_a_list():
    models_of_one_config = {models.create("mlp", num_classes=2, hidden=[3, 3]) for _ in range(2)}
    assert len(models_of_one_config) == 1


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "lenet",
            {},
            r"unknown model 'lenet': choose one of \['char_transformer', 'digits_cnn'",
        ),
        (
            "mlp",
            {"batch_norm": True},
            r"'mlp' has no option 'batch_norm': .*'activation', 'hidden'",
        ),
        ("mnist_cnn_bn", {"hidden": (3,)}, r"'mnist_cnn_bn' has no option 'hidden': it takes \[\]"),
        ("resnet20", {"parent": None}, "has no option 'parent'"),
        ("mlp", {"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ("mlp", {"num_classes": 2.5}, "num_classes must be an integer"),
        ("mlp", {"width": 0.0}, "width must be a finite number > 0, got 0.0"),
        ("mlp", {"width": float("nan")}, "width must be a finite number > 0, got nan"),
        ("vgg11", {"conv_impl": "fft"}, "conv_impl must be one of .* got 'fft'"),
        ("mlp", {"conv_impl": "fft"}, "conv_impl must be one of .* got 'fft'"),
        ("mlp", {"dtype": "int8"}, "dtype must be a floating type, got int8"),
    ],
)
def test_create_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{"num_classes": 10, **kwargs})


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mlp", {"activation": "sine"}, r"activation must be one of .* got 'sine'"),
        ("resnet20", {"shortcut": "none"}, r"shortcut must be one of .* got 'none'"),
    ],
)
def test_bad_values_of_options_are_refused_at_the_first_use(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shapes(name, **kwargs)


def test_options_are_listed():
    assert models.model_options("vgg11") == ["batch_norm"]
    assert "shortcut" in models.model_options("resnet44")
    with pytest.raises(ValueError, match="unknown model"):
        models.model_options("vgg16")


def test_preset_options_can_be_changed():
    model = models.create("digits_cnn", num_classes=10, channels=(8,))
    assert model.channels == (8,)
    assert model.kernel_size == 3


@pytest.mark.parametrize("name", ["mlp", "digits_cnn"])
def test_gradient_descent_learns(name):
    model, variables, x = tiny(name)
    labels = jnp.arange(4)

    def loss(params):
        logits = model.apply({"params": params}, x, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), labels])

    @jax.jit
    def descend(params):
        def step(params, _):
            value, gradient = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient), value

        return jax.lax.scan(step, params, None, length=200)[1]

    losses = descend(variables["params"])
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", ["mlp", "digits_cnn", "mnist_cnn"])
@pytest.mark.parametrize("conv_impl", ["cpu", "lax"])
def test_torch_starts_uniform_within_one_over_root_fan_in(name, conv_impl):
    """Kernels and biases; the fan in is read off the kernel, whatever the layout of the images."""
    images = jnp.zeros((1, *INPUTS[name]))
    models_by = {
        initializer: models.create(
            name, num_classes=10, conv_impl=conv_impl, initializer=initializer
        )
        for initializer in ("flax", "torch")
    }
    key = jax.random.key(0)
    found = {
        name: jax.jit(partial(model.init, train=False))(key, images)["params"]
        for name, model in models_by.items()
    }
    assert jax.tree.map(jnp.shape, found["flax"]) == jax.tree.map(jnp.shape, found["torch"])
    for layer in found["torch"].values():
        limit = 1.0 / math.sqrt(layer["kernel"].size / layer["kernel"].shape[-1])
        for values in layer.values():
            assert float(jnp.abs(values).max()) <= limit
            # Eight standard errors of the variance of so many uniform numbers.
            slack = 8 * limit**2 * math.sqrt(4 / 45 / values.size)
            assert float(jnp.mean(values**2)) == pytest.approx(limit**2 / 3, abs=slack)
    assert all(not layer["bias"].any() for layer in found["flax"].values())


def test_unknown_initializers_are_refused():
    with pytest.raises(ValueError, match=r"initializer must be one of .*, got 'keras'"):
        shapes("mlp", initializer="keras")
