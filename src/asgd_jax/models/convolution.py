r"""Convolutions that XLA's CPU backend runs fast, also inside loops.

On a CPU, XLA calls its fast convolution only for NHWC images with HWIO kernels. It rewrites other
layouts to that, but in a program's entry computation only: in the body of a `lax.scan` the two
convolutions of a gradient, which JAX writes in other layouts, fall to naive code, 10 to 30 times
slower. Here the three convolutions of a layer are written in the fast layout from the start, as a
primitive whose derivatives of every order are again that primitive.

Two choices were measured (one core of an AVX-512 Xeon, GFLOP/s within a loop; the peak is 177):

* the weight gradient is a convolution with windows as large as the image; its transposed operands
  outgrow the cache. Summed over blocks of images: 28x28, 32 to 64 channels, batch 128: 26 -> 84;
  14x14, 64 to 128 channels: 74 -> 113; 32x32, 16 channels: 40 -> 53.
* where the output has at most 16 positions a product of patches is quicker.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Pair = tuple[int, int]

# Positions of an output up to which patches win; bytes of a block of images in a weight gradient,
# about half of a core's second-level cache; and its least number of images, which are what lies
# side by side in memory there.
_FEW_POSITIONS = 16
_BLOCK_BYTES = 2**20
_BLOCK_IMAGES = 8


class Window(NamedTuple):
    """How a kernel moves over an image, as `lax.conv_general_dilated` means it."""

    strides: Pair
    pads: tuple[Pair, Pair]
    image_dilation: Pair = (1, 1)
    kernel_dilation: Pair = (1, 1)


def convolve_by_lax(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel by XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.pads,
        window.image_dilation,
        window.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_on_cpu(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """The same, by what is quick on a CPU: patches for small outputs, else the primitive.

    The output and the gradient by the image are bitwise those of `convolve_by_lax` where the
    primitive makes them; the gradient by the kernel is summed in another order.
    """
    height, width = (_output_size(x.shape[1 + i], kernel.shape[i], window, i) for i in (0, 1))
    if height * width <= _FEW_POSITIONS or kernel.shape[:2] == (1, 1):
        return _convolve_by_patches(x, kernel, window)
    return _bind(x, kernel, window)


def _output_size(size: int, kernel_size: int, window: Window, axis: int) -> int:
    padded = (size - 1) * window.image_dilation[axis] + 1 + sum(window.pads[axis])
    covered = (kernel_size - 1) * window.kernel_dilation[axis] + 1
    return (padded - covered) // window.strides[axis] + 1


def _convolve_by_patches(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    r"""$y = [x_{00} | x_{01} | \dots] K$ with $x_{ij}$ the image shifted by (i, j), subsampled.

    It takes height * width times the memory of the image; a 1x1 kernel is a plain product.
    """
    height, width, channels, features = kernel.shape
    shifted = shifted_images(x, (height, width), window.strides, window.pads)
    # One product of long rows: a sum of one small product per offset was slower in every case.
    patches = jnp.concatenate(shifted, axis=-1) if len(shifted) > 1 else shifted[0]
    return patches @ kernel.reshape(height * width * channels, features)


def shifted_images(
    x: jax.Array, kernel_size: Pair, strides: Pair, pads: Sequence[Pair]
) -> list[jax.Array]:
    """The padded images as every entry of a kernel sees them; height and width are axes 1, 2."""
    height, width = kernel_size
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    return [
        every(every(x, i, rows, strides[0], axis=1), j, columns, strides[1], axis=2)
        for i in range(height)
        for j in range(width)
    ]


def every(x: jax.Array, start: int, count: int, stride: int, axis: int) -> jax.Array:
    """`count` entries of an axis: start, start + stride, ..."""
    return lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)


_convolution_p = Primitive("canonical_convolution")


def _bind(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    # Within shard_map both must be known to vary over the same devices.
    x_axes, kernel_axes = _varying_axes(x), _varying_axes(kernel)
    if missing := tuple(kernel_axes - x_axes):
        x = lax.pcast(x, missing, to="varying")
    if missing := tuple(x_axes - kernel_axes):
        kernel = lax.pcast(kernel, missing, to="varying")
    return _convolution_p.bind(x, kernel, window=window)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which a value differs, within `jax.shard_map`; its name differs by version."""
    aval = jax.typeof(x)
    varying: frozenset[str] = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return varying


def _shape_of(x: Any, kernel: Any, *, window: Window) -> Any:
    sides = tuple(_output_size(x.shape[1 + i], kernel.shape[i], window, i) for i in (0, 1))
    return x.update(shape=(x.shape[0], *sides, kernel.shape[3]))


def _input_gradient(cotangent: jax.Array, x: Any, kernel: jax.Array, *, window: Window) -> Any:
    """Convolution of the cotangent, spread by the strides, with the kernel turned around."""
    shape = x.aval.shape
    pads = []
    for i in (0, 1):
        low = window.pads[i][0]
        reach = window.kernel_dilation[i] * (kernel.shape[i] - 1)
        spread = window.strides[i] * (cotangent.shape[1 + i] - 1)
        pads.append((reach - low, window.image_dilation[i] * (shape[1 + i] - 1) - spread + low))
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return _bind(
        cotangent,
        turned,
        Window(
            strides=window.image_dilation,
            pads=(pads[0], pads[1]),
            image_dilation=window.strides,
            kernel_dilation=window.kernel_dilation,
        ),
    )


def _weight_gradient(cotangent: jax.Array, x: jax.Array, kernel: Any, *, window: Window) -> Any:
    """Sum over blocks of images, see the module's docstring."""
    one = partial(_block_weight_gradient, kernel_size=kernel.aval.shape[:2], window=window)
    images = _images_at_once(x, cotangent)
    if images >= len(x):
        return one(cotangent, x)
    blocks = [a.reshape(-1, images, *a.shape[1:]) for a in (cotangent, x)]

    def add(total: jax.Array, block: list[jax.Array]) -> tuple[jax.Array, None]:
        return total + one(*block), None

    first = one(*(a[0] for a in blocks))
    return lax.scan(add, first, [a[1:] for a in blocks])[0]


def _images_at_once(x: jax.Array, cotangent: jax.Array) -> int:
    """Images in a block: as many as the cache holds, at least 8; all where they don't divide."""
    each = math.prod(x.shape[1:]) + math.prod(cotangent.shape[1:])
    bytes_each = max(each * x.dtype.itemsize, 1)
    images = max(_BLOCK_IMAGES, 2 ** math.floor(math.log2(max(_BLOCK_BYTES / bytes_each, 1))))
    return images if len(x) % images == 0 else max(len(x), 1)


def _block_weight_gradient(
    cotangent: jax.Array, x: jax.Array, kernel_size: Pair, window: Window
) -> jax.Array:
    """Images and channels exchanged, the cotangent as the kernel: all positions in one window."""
    pads = []
    for i in (0, 1):
        low = window.pads[i][0]
        reach = window.kernel_dilation[i] * (kernel_size[i] - 1)
        spread = window.strides[i] * (cotangent.shape[1 + i] - 1)
        pads.append((low, reach + spread - window.image_dilation[i] * (x.shape[1 + i] - 1) - low))
    y = _bind(
        jnp.swapaxes(x, 0, 3),
        jnp.transpose(cotangent, (1, 2, 0, 3)),
        Window(
            strides=window.kernel_dilation,
            pads=(pads[0], pads[1]),
            image_dilation=window.image_dilation,
            kernel_dilation=window.strides,
        ),
    )
    return jnp.transpose(y, (1, 2, 0, 3))


def _map_convolution(
    arguments: Sequence[jax.Array], axes: Sequence[int | None], *, window: Window
) -> tuple[jax.Array, int]:
    """Under vmap: XLA's own, grouped where kernels are mapped; its labels stay the fast ones."""
    return jax.vmap(partial(convolve_by_lax, window=window), tuple(axes))(*arguments), 0


_convolution_p.def_impl(jax.jit(convolve_by_lax, static_argnames="window"))
_convolution_p.def_abstract_eval(_shape_of)
mlir.register_lowering(_convolution_p, mlir.lower_fun(convolve_by_lax, multiple_results=False))
ad.defbilinear(_convolution_p, _input_gradient, _weight_gradient)
batching.primitive_batchers[_convolution_p] = _map_convolution
