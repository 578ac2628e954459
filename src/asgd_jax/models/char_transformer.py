"""A small decoder-only transformer over characters, pre-norm, of blocks that a pipeline can cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from asgd_jax.models.classifier import Classifier
from asgd_jax.models.layers import scale_width


class _Block(nn.Module):
    """Causal attention and a two-layer network, each added to what its normalised input was."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, mask = x.shape[-1], nn.make_causal_mask(x[..., 0], dtype=jnp.bool_)
        normalised = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(num_heads=self.num_heads, dtype=self.dtype)
        x = x + attention(normalised, mask=mask)
        wide = nn.Dense(4 * features, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(features, dtype=self.dtype)(nn.gelu(wide))


class CharTransformer(Classifier):
    """Tells the next character at every position: characters (batch, length) to logits.

    GPT-2's arrangement: learned positions, layer norm before each branch and before the last layer.
    Modules run in the order embed, positions, block_0, ..., norm, Dense_0, so that `layer_stages`
    cuts between blocks. With the defaults there are 420,000 parameters.

    Attributes, beside those of `Classifier`:
      num_blocks: of attention and two-layer network.
      features: of every position, before the width multiplier; a multiple of `num_heads` after it.
      num_heads: of the attention.

    >>> text = jnp.zeros((2, 64), jnp.int32)
    >>> variables = jax.eval_shape(
    ...     lambda key: CharTransformer(num_classes=128).init(key, text, train=False),
    ...     jax.random.key(0),
    ... )
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    420608
    """

    num_blocks: int = 8
    features: int = 64
    num_heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits of shape (batch, length, num_classes); `train` changes nothing."""
        if x.ndim != 2:
            raise ValueError(
                f"char_transformer takes characters of shape (batch, length), got {x.shape}: use "
                "it with a data set of text, such as python_topics"
            )
        features = scale_width(self.features, self.width)
        if features % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {features} features: choose a divisor"
            )
        embed = nn.Embed(self.num_classes, features, dtype=self.dtype, name="embed")
        positions = nn.Embed(x.shape[1], features, dtype=self.dtype, name="positions")
        y = embed(x.astype(jnp.int32)) + positions(jnp.arange(x.shape[1], dtype=jnp.int32))
        for k in range(self.num_blocks):
            y = _Block(self.num_heads, self.dtype, name=f"block_{k}")(y)
        return self.classify(nn.LayerNorm(dtype=self.dtype, name="norm")(y))
