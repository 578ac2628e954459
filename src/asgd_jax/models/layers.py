"""Convolution, pooling and normalisation as the models here use them.

Images are NHWC (batch, height, width, channels), or CHWN, the same with both ends exchanged. CHWN
suits the patches of few channels: what lies side by side in memory is then the batch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from asgd_jax.models.convolution import (
    Window,
    convolve_batch_last_on_cpu,
    convolve_by_lax,
    convolve_on_cpu,
    every,
)

Padding = str | Sequence[tuple[int, int]]
Initializer = Callable[..., jax.Array]

# Share of the old value in one step of BatchNorm's running statistics.
BATCH_NORM_DECAY = 0.9

_BATCH_AXIS: ContextVar[str | None] = ContextVar("batch_axis", default=None)

CONV_IMPLEMENTATIONS = ("auto", "cpu", "lax")
INITIALIZERS = ("flax", "torch")


def resolve_conv_impl(conv_impl: str) -> str:
    """Returns "cpu" or "lax": what "auto" means on JAX's default backend.

    Raises:
      ValueError: for a name that is not "auto", "cpu" or "lax".

    >>> resolve_conv_impl("lax")
    'lax'
    """
    if conv_impl not in CONV_IMPLEMENTATIONS:
        raise ValueError(f"conv_impl must be one of {CONV_IMPLEMENTATIONS}, got {conv_impl!r}")
    if conv_impl == "auto":
        return "cpu" if jax.default_backend() == "cpu" else "lax"
    return conv_impl


def initializers(name: str, fan_in: int) -> dict[str, Initializer]:
    r"""Returns `kernel_init` and `bias_init` of a convolution or dense layer, by name.

    "flax" is Flax's default: kernels LeCun normal (variance 1 / fan in), biases 0. "torch" is
    PyTorch's default: kernels and biases uniform on $\pm 1 / \sqrt{\text{fan in}}$, so kernels of
    variance 1 / (3 fan in).

    Args:
      name: "flax" or "torch".
      fan_in: inputs of one output, which a bias does not know from its own shape.

    Raises:
      ValueError: for another name.

    >>> sorted(initializers("torch", 9))
    ['bias_init', 'kernel_init']
    """
    if name not in INITIALIZERS:
        raise ValueError(f"initializer must be one of {INITIALIZERS}, got {name!r}")
    if name == "flax":
        return {
            "kernel_init": nn.initializers.lecun_normal(),
            "bias_init": nn.initializers.zeros_init(),
        }

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        limit = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return {"kernel_init": uniform, "bias_init": uniform}


def scale_width(channels: int, width: float) -> int:
    """Returns a channel count times the width multiplier, rounded, and at least 4.

    >>> scale_width(64, 1.0), scale_width(20, 0.5), scale_width(16, 0.1)
    (64, 10, 4)
    """
    return max(4, round(channels * width))


class Conv(nn.Module):
    """Two-dimensional convolution of NHWC images.

    Parameters: `kernel` of shape (height, width, channels in, `features`), `bias` of shape
    (features,), the same for every `conv_impl`; always float32.

    Attributes:
      features: number of output channels.
      kernel_size: height and width of the kernel, in pixels.
      strides: vertical and horizontal step, in pixels.
      padding: "SAME" or "VALID" as XLA means them, or ((top, bottom), (left, right)) in pixels.
      use_bias: adds a bias per output channel.
      dtype: of the computation and the output.
      kernel_init: LeCun's (variance 1 / fan in) by default, as in `flax.linen.Conv`.
      bias_init: zeros by default.
      conv_impl: "cpu" (see `convolution`), "lax" (`lax.conv_general_dilated`), or "auto": cpu where
        the default backend is a CPU, lax elsewhere.
      batch_last: input and output are CHWN instead of NHWC; the parameters are the same.

    >>> conv = Conv(20, (5, 5), padding="VALID")
    >>> image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    >>> y, variables = jax.eval_shape(conv.init_with_output, jax.random.key(0), image)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 24, 24, 20), (5, 5, 1, 20))
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    conv_impl: str = "auto"
    batch_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to (batch, height', width', features).

        With `batch_last`, (channels, height, width, batch) to (features, height', width', batch).

        Raises:
          ValueError: when `x` is not a batch of images, or smaller than the kernel.
        """
        if x.ndim != 4:
            raise ValueError(
                f"Conv needs images of shape {self._axes()}, got {x.shape}: reshape the input"
            )
        pads = _explicit_padding(x.shape[1:3], self.kernel_size, self.strides, self.padding)
        shape = (*self.kernel_size, x.shape[0 if self.batch_last else 3], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        window = Window(self.strides, pads)
        on_cpu = resolve_conv_impl(self.conv_impl) == "cpu"
        x = x.astype(self.dtype)
        if self.batch_last and on_cpu:
            y = convolve_batch_last_on_cpu(x, kernel, window)
        else:
            convolve = convolve_on_cpu if on_cpu else convolve_by_lax
            x = jnp.swapaxes(x, 0, 3) if self.batch_last else x
            y = convolve(x, kernel, window)
            y = jnp.swapaxes(y, 0, 3) if self.batch_last else y
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            bias = bias.astype(self.dtype)
            y = y + (bias[:, None, None, None] if self.batch_last else bias)
        return y

    def _axes(self) -> str:
        ends = ("channels", "batch") if self.batch_last else ("batch", "channels")
        return f"({ends[0]}, height, width, {ends[1]})"


def _explicit_padding(
    size: tuple[int, ...],
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> tuple[tuple[int, int], tuple[int, int]]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding must be "SAME", "VALID" or two pairs, got {padding!r}')
        padding = lax.padtype_to_pads(size, kernel_size, strides, padding)
    (top, bottom), (left, right) = padding
    pads = ((top, bottom), (left, right))
    padded = tuple(n + low + high for n, (low, high) in zip(size, pads, strict=True))
    if any(n < k for n, k in zip(padded, kernel_size, strict=True)):
        raise ValueError(
            f"a {kernel_size[0]}x{kernel_size[1]} kernel does not fit an image that is "
            f"{padded[0]}x{padded[1]} with its padding: use larger images"
        )
    return pads


def max_pool(x: jax.Array, window: int = 2, stride: int = 2, padding: int = 0) -> jax.Array:
    """Largest value of each square window: rows first, then columns, by strided slices.

    Rows and columns that fill no window are left out, as "VALID" does. Where several entries of a
    window are largest, the gradient is shared among them (`reduce_window`, which is about twenty
    times slower on a CPU, gives it to the first).

    Args:
      x: images of shape (batch, height, width, channels), or CHWN, floating point.
      window: side of the window, in pixels.
      stride: step between windows, in pixels.
      padding: pixels of minus infinity on every side; less than `window`.

    Returns:
      Array of shape (batch, (height + 2 padding - window) // stride + 1, ..., channels), or CHWN.

    Raises:
      ValueError: when the image is smaller than the window, or the padding as large as it.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    if padding >= window:
        raise ValueError(f"padding must be less than window={window}, got {padding}")
    if x.ndim != 4 or min(x.shape[1:3]) + 2 * padding < window:
        raise ValueError(
            f"a {window}x{window} window does not fit an input of shape {x.shape}: "
            "pass larger NHWC or CHWN images"
        )
    if padding:
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
    for axis in (1, 2):
        count = (x.shape[axis] - window) // stride + 1
        x = functools.reduce(jnp.maximum, [every(x, i, count, stride, axis) for i in range(window)])
    return x


@contextmanager
def batch_split_over(axis_name: str) -> Iterator[None]:
    """Within it, `batch_norm` takes its statistics over a named axis of devices as well.

    For `jax.shard_map`, in which a model sees one device's share of a batch.
    """
    token = _BATCH_AXIS.set(axis_name)
    try:
        yield
    finally:
        _BATCH_AXIS.reset(token)


def batch_norm(train: bool, dtype: Any, name: str | None = None, **kwargs: Any) -> nn.BatchNorm:
    """BatchNorm as every model here has it: decay 0.9 of the running statistics, epsilon 1e-5.

    With `train` it normalises by the statistics of the batch and updates `batch_stats`; without, it
    normalises by `batch_stats`. Statistics and parameters stay float32 whatever the dtype.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_DECAY,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=_BATCH_AXIS.get(),
        name=name,
        **kwargs,
    )
