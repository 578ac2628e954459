"""What all models share: their attributes, and the layer that ends them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# He et al. (arXiv 1502.01852), by fan out: variance 2 / fan out.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Classifier(nn.Module):
    """Maps NHWC images, or characters, to float32 logits of shape (batch, ..., num_classes).

    Attributes:
      num_classes: number of logits.
      width: multiplies every channel count and hidden width.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      conv_impl: see `layers.Conv`; without effect where there are no convolutions.
    """

    num_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    conv_impl: str = "auto"

    def classify(self, x: jax.Array, **dense: Any) -> jax.Array:
        """Applies the last dense layer; for use within `__call__`."""
        return nn.Dense(self.num_classes, dtype=self.dtype, **dense)(x).astype(jnp.float32)

    def classify_mean(self, x: jax.Array) -> jax.Array:
        """The same of the mean over positions, from a kernel of standard deviation 0.01."""
        return self.classify(x.mean(axis=(1, 2)), kernel_init=nn.initializers.normal(0.01))
