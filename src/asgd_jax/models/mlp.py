"""Fully connected network: the smallest model that has a sharpness worth following."""

from collections.abc import Callable

import flax.linen as nn
import jax

from asgd_jax.models.classifier import Classifier
from asgd_jax.models.layers import initializers, scale_width

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "gelu": nn.gelu,
}


class MLP(Classifier):
    """Dense layers with an activation between them; images are flattened.

    Initialisation: see `initializer`.

    Attributes, beside those of `Classifier`:
      hidden: width of each hidden layer, before the width multiplier; () is a linear model.
      activation: "tanh", "relu" or "gelu". Tanh is smooth, which curvature experiments want.
      initializer: "flax" (default) or "torch", see `layers.initializers`.

    >>> import jax.numpy as jnp
    >>> digits = jnp.zeros((2, 8, 8, 1))
    >>> variables = jax.eval_shape(
    ...     lambda key: MLP(num_classes=10).init(key, digits, train=False), jax.random.key(0)
    ... )
    >>> variables["params"]["Dense_0"]["kernel"].shape
    (64, 64)
    """

    hidden: tuple[int, ...] = (64,)
    activation: str = "tanh"
    initializer: str = "flax"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits of shape (batch, num_classes); `train` changes nothing."""
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(_ACTIVATIONS)}, got {self.activation!r}"
            )
        activate = _ACTIVATIONS[self.activation]
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for units in self.hidden:
            start = initializers(self.initializer, x.shape[-1])
            x = activate(nn.Dense(scale_width(units, self.width), dtype=self.dtype, **start)(x))
        return self.classify(x, **initializers(self.initializer, x.shape[-1]))
