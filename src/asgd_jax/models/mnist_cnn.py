"""Small convolutional networks for digits: the one of fig. 1 and one with BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from asgd_jax.models.classifier import HE_NORMAL, Classifier
from asgd_jax.models.layers import (
    Conv,
    batch_norm,
    initializers,
    max_pool,
    resolve_conv_impl,
    scale_width,
)


class LeNet(Classifier):
    """Convolution, ReLU, 2x2 max pooling, repeated; then dense layers. No BatchNorm.

    The defaults are fig. 1's network for 28x28 MNIST: conv20 5x5, pool, conv50 5x5, pool, fc500,
    ReLU, fc10, with unpadded convolutions (431,080 parameters).
    Initialisation: see `initializer`.

    Attributes, beside those of `Classifier`:
      channels: output channels of each convolution, before the width multiplier.
      kernel_size: side of every kernel, in pixels.
      padding: "VALID" or "SAME".
      hidden: width of each hidden dense layer, before the width multiplier.
      initializer: "flax" (default) or "torch", which the authors' program starts from; see
        `layers.initializers`.
    """

    channels: tuple[int, ...] = (20, 50)
    kernel_size: int = 5
    padding: str = "VALID"
    hidden: tuple[int, ...] = (500,)
    initializer: str = "flax"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps NHWC images to float32 logits (batch, num_classes); `train` changes nothing."""
        # CHWN suits the patches, see `layers`.
        batch_last = resolve_conv_impl(self.conv_impl) == "cpu"
        x = jnp.swapaxes(x, 0, 3) if batch_last else x
        for channels in self.channels:
            fan_in = self.kernel_size**2 * x.shape[0 if batch_last else 3]
            x = Conv(
                scale_width(channels, self.width),
                (self.kernel_size, self.kernel_size),
                padding=self.padding,
                dtype=self.dtype,
                conv_impl=self.conv_impl,
                batch_last=batch_last,
                **initializers(self.initializer, fan_in),
            )(x)
            # The same as ReLU first, in value and gradient, on a quarter of the entries.
            x = nn.relu(max_pool(x))
        x = jnp.swapaxes(x, 0, 3) if batch_last else x
        x = x.reshape(x.shape[0], -1)
        for units in self.hidden:
            start = initializers(self.initializer, x.shape[-1])
            x = nn.relu(nn.Dense(scale_width(units, self.width), dtype=self.dtype, **start)(x))
        return self.classify(x, **initializers(self.initializer, x.shape[-1]))


class BatchNormCNN(Classifier):
    """Four 3x3 convolutions of 32, 64, 64 and 128 channels with BatchNorm; global average; dense.

    The channel counts are those of the authors' MNIST program. The rest is this project's reading:
    padded convolutions without bias, each followed by BatchNorm and ReLU, 2x2 max pooling after the
    second and the fourth, then the mean over positions and one dense layer.
    Initialisation: He normal by fan out (variance 2 / fan out), BatchNorm scales 1.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps NHWC images to float32 logits of shape (batch, num_classes)."""
        for index, channels in enumerate((32, 64, 64, 128)):
            x = Conv(
                scale_width(channels, self.width),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=HE_NORMAL,
                conv_impl=self.conv_impl,
            )(x)
            x = batch_norm(train, self.dtype)(x)
            # Pooling before ReLU: see LeNet.
            x = nn.relu(max_pool(x) if index % 2 else x)
        return self.classify(x.mean(axis=(1, 2)))
