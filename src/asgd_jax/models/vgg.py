"""VGG-11 for CIFAR: eight convolutions and one dense layer (figs. 2, 3 and 12)."""

import flax.linen as nn
import jax

from asgd_jax.models.classifier import HE_NORMAL, Classifier
from asgd_jax.models.layers import Conv, batch_norm, max_pool, scale_width

# Output channels, and whether 2x2 max pooling follows.
_VGG11 = (
    (64, True),
    (128, True),
    (256, False),
    (256, True),
    (512, False),
    (512, True),
    (512, False),
    (512, True),
)


class VGG11(Classifier):
    """VGG-11 with a single 512 -> num_classes dense layer; 9,225,610 parameters for ten classes.

    The five poolings take a 32x32 image to one position; larger images are averaged over positions.
    Initialisation, as torchvision's VGG: He normal by fan out (variance 2 / fan out) for
    convolutions, normal of standard deviation 0.01 for the dense layer, zero biases.

    Attributes, beside those of `Classifier`:
      batch_norm: adds BatchNorm after each convolution, whose bias it replaces. The paper's
        experiments have none: BatchNorm makes the loss scale-free in the weights, which blurs what
        a stability threshold means.
    """

    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps NHWC images, at least 32 pixels a side, to float32 logits (batch, num_classes)."""
        for channels, pooled in _VGG11:
            x = Conv(
                scale_width(channels, self.width),
                use_bias=not self.batch_norm,
                dtype=self.dtype,
                kernel_init=HE_NORMAL,
                conv_impl=self.conv_impl,
            )(x)
            x = batch_norm(train, self.dtype)(x) if self.batch_norm else x
            # Pooling before ReLU: the same in value and gradient, on a quarter of the entries.
            x = nn.relu(max_pool(x) if pooled else x)
        return self.classify_mean(x)
