"""The primitive against XLA's own convolution: derivatives of both orders, vmap, devices, HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from jax.sharding import PartitionSpec

from asgd_jax.models.convolution import Window, convolve_by_lax, convolve_on_cpu

pytestmark = pytest.mark.optimised

CASES = [
    # images, kernel, strides, padding; all with more than 16 positions
    ((16, 8, 9, 3), (3, 3, 3, 5), (1, 1), ((1, 1), (1, 1))),
    ((16, 12, 11, 3), (3, 3, 3, 4), (2, 2), ((0, 1), (1, 1))),
    ((16, 9, 10, 2), (5, 5, 2, 3), (1, 1), ((0, 0), (0, 0))),
    ((3, 16, 16, 3), (7, 7, 3, 4), (2, 2), ((3, 3), (3, 3))),
    ((8, 12, 16, 2), (2, 3, 2, 3), (1, 3), ((0, 1), (2, 0))),
]


def both_losses(case):
    """The same nonlinear function of the images and the kernel by either convolution."""
    images, kernel, strides, pads = case
    rng = np.random.default_rng(0)
    draws = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (images, kernel)]
    window = Window(strides, pads)

    def loss_of(convolve):
        return lambda x, k: jnp.sum(jnp.sin(convolve(x, k, window)))

    return draws, loss_of(convolve_on_cpu), loss_of(convolve_by_lax)


def gradients(loss):
    return jax.grad(loss, argnums=(0, 1))


def derivatives(loss, point):
    """Gradient, and Hessian-vector products: forward over reverse, reverse over both."""

    def along(x, k):
        return jax.jvp(loss, (x, k), tuple(point))[1]

    def product(x, k):
        return sum(jnp.vdot(g, v) for g, v in zip(gradients(loss)(x, k), point, strict=True))

    return {
        "gradient": gradients(loss)(*point),
        "forward over reverse": jax.jvp(gradients(loss), tuple(point), tuple(point))[1],
        "reverse over forward": gradients(along)(*point),
        "reverse over reverse": gradients(product)(*point),
    }


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_both_orders_are_those_of_lax(case):
    point, ours, lax = both_losses(case)
    actual, expected = (jax.jit(lambda p, f=f: derivatives(f, p))(point) for f in (ours, lax))
    # The same convolution makes it; the gradient by the kernel is summed in blocks of images.
    np.testing.assert_array_equal(actual["gradient"][0], expected["gradient"][0])
    for name in expected:
        assert_close(actual[name], expected[name])


def mapped(loss, axes):
    """The sum of what `vmap` makes of a loss, whose gradient is taken from outside."""
    return lambda x, k: jax.vmap(loss, axes)(x, k).sum()


def stacked(point, axes):
    """Arguments with a further axis where they are mapped."""
    return [
        a if axis is None else jnp.stack([a, -2 * a, a + 1], axis)
        for a, axis in zip(point, axes, strict=True)
    ]


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (2, None), (None, 4)])
def test_mapped_over_images_and_kernels(axes):
    point, ours, lax = both_losses(CASES[0])
    point = stacked(point, axes)
    for of in (
        lambda loss: jax.vmap(gradients(loss), axes),
        lambda loss: gradients(mapped(loss, axes)),
    ):
        actual, expected = (jax.jit(of(loss))(*point) for loss in (ours, lax))
        assert_close(actual, expected)


def test_bfloat16():
    (x, k), ours, lax = both_losses(CASES[0])
    half = (x.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    actual, expected = (jax.jit(gradients(f))(*half) for f in (ours, lax))
    assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
    assert_close(
        [a.astype(jnp.float32) for a in actual],
        [a.astype(jnp.float32) for a in expected],
        ulps=2**18,
    )


@pytest.mark.parametrize("count", [1, 8])
def test_devices_share_the_images(count):
    (x, k), ours, lax = both_losses(CASES[0])
    mesh = jax.make_mesh(
        (count,), ("images",), devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip

    def gradient(x, k):
        return jax.grad(lambda k: jax.lax.psum(ours(x, k), "images"))(k)

    # With its check of what varies over the devices, as other people's code has it.
    split = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(PartitionSpec("images"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    assert_close(jax.jit(split)(x, k), jax.grad(lax, argnums=1)(x, k))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("images"))
    assert_close(
        jax.jit(gradients(ours))(jax.device_put(x, sharding), k),
        jax.jit(gradients(lax))(x, k),
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's labels on a CPU")
def test_every_convolution_of_a_loop_has_the_labels_of_the_fast_one():
    def labels(loss, point):
        def step(_, point):
            return jax.tree.map(lambda a, g: a - g, point, gradients(loss)(*point))

        program = jax.jit(lambda point: jax.lax.fori_loop(0, 3, step, point))
        text = program.lower(tuple(point)).compile().as_text()
        return set(re.findall(r"dim_labels=(\S+?)[,\s]", text))

    for case in CASES:
        point, ours, lax = both_losses(case)
        assert labels(ours, point) == {"b01f_01io->b01f"}
    # What the test is there to see: JAX's own gradients have other labels.
    assert len(labels(lax, point)) > 1
    # So had those of a loss that is mapped over workers, each with images of its own.
    for axes in ((0, None), (None, 0), (0, 0)):
        assert labels(mapped(ours, axes), stacked(point, axes)) == {"b01f_01io->b01f"}


def test_an_empty_batch_has_a_gradient_of_zeros():
    (x, k), ours, _ = both_losses(CASES[0])
    for loss, images in ((ours, x[:0]), (mapped(ours, (0, None)), x[None, :0])):
        gradient = jax.grad(loss, argnums=1)(images, k)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(k))
