"""Residual networks: ResNet-20 and -44 for CIFAR (fig. 11), ResNet-50 for ImageNet (figs. 5, 9)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from asgd_jax.models.classifier import HE_NORMAL, Classifier
from asgd_jax.models.layers import Conv, batch_norm, max_pool, scale_width

SHORTCUTS = ("projection", "identity")
# A bottleneck block ends in four times the channels of its 3x3 convolution.
_EXPANSION = 4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or the bottleneck 1x1, 3x3, 1x1, added to a shortcut; then ReLU.

    The stride is that of the (first) 3x3 convolution, which makes a bottleneck network "v1.5".

    Attributes:
      channels: of the 3x3 convolutions.
      stride: 1, or 2 to halve the image.
      bottleneck: the three-layer block, with 4 * channels outputs.
      shortcut: "projection" (1x1 convolution and BatchNorm) or "identity" (subsampling, and
        channels of zeros) where the block changes the shape; the identity elsewhere.
      zero_init_residual: starts the scale of the last BatchNorm at 0, so that the block starts
        as its shortcut.
      dtype: of the computation.
      conv_impl: see `layers.Conv`.
    """

    channels: int
    stride: int
    bottleneck: bool
    shortcut: str
    zero_init_residual: bool
    dtype: Any
    conv_impl: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to the block's output, subsampled by `stride`."""
        conv = partial(_conv, dtype=self.dtype, conv_impl=self.conv_impl)
        norm = partial(batch_norm, train, self.dtype)
        last_scale = (
            nn.initializers.zeros_init() if self.zero_init_residual else nn.initializers.ones_init()
        )
        y = x
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.channels, 1, 1)(y)))
            y = nn.relu(norm()(conv(self.channels, 3, self.stride)(y)))
            y = conv(_EXPANSION * self.channels, 1, 1)(y)
        else:
            y = nn.relu(norm()(conv(self.channels, 3, self.stride)(y)))
            y = conv(self.channels, 3, 1)(y)
        y = norm(scale_init=last_scale)(y)
        if y.shape != x.shape:
            if self.shortcut == "projection":
                projection = conv(y.shape[-1], 1, self.stride, name="shortcut_conv")
                x = norm(name="shortcut_norm")(projection(x))
            else:
                x = _identity_shortcut(x, self.stride, y.shape[-1])
        return nn.relu(x + y)


def _identity_shortcut(x: jax.Array, stride: int, channels: int) -> jax.Array:
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


def _conv(
    features: int, size: int, stride: int, *, dtype: Any, conv_impl: str, name: str | None = None
) -> Conv:
    # Padding of size // 2 on every side, as PyTorch has it: "SAME" pads strided layers unevenly.
    return Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=HE_NORMAL,
        conv_impl=conv_impl,
        name=name,
    )


class ResNet(Classifier):
    """Stages of residual blocks, the first block of each later stage with stride 2; mean; dense.

    ResNet-20 and -44 (depth 6n + 2, n = 3 and 7 blocks a stage, 16-32-64 channels, 3x3 stem) have
    272,474 and 661,338 parameters for ten classes with projection shortcuts, 269,722 and 658,586
    with identity shortcuts, those of He et al. (arXiv 1512.03385) for CIFAR. ResNet-50 (v1.5, 7x7
    stem, stride in the 3x3 convolutions) has 25,557,032 for a thousand classes.
    Initialisation (He et al. arXiv 1502.01852; Goyal et al. arXiv 1706.02677): He normal by fan out
    for convolutions, dense kernel normal of standard deviation 0.01, scales 1 except the last of
    each block under `zero_init_residual`.

    Attributes, beside those of `Classifier`:
      stage_sizes: number of blocks of each stage.
      channels: of the 3x3 convolutions of each stage, before the width multiplier.
      bottleneck: three-layer blocks, see `ResidualBlock`.
      imagenet_stem: 7x7 convolution of stride 2 and 3x3 max pooling of stride 2 before the blocks;
        else one 3x3 convolution.
      shortcut: "projection" or "identity", see `ResidualBlock`.
      zero_init_residual: see `ResidualBlock`.
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    channels: tuple[int, ...] = (16, 32, 64)
    bottleneck: bool = False
    imagenet_stem: bool = False
    shortcut: str = "projection"
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps NHWC images to float32 logits of shape (batch, num_classes)."""
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {SHORTCUTS}, got {self.shortcut!r}")
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        stem = scale_width(self.channels[0], self.width)
        x = _conv(stem, size, stride, dtype=self.dtype, conv_impl=self.conv_impl)(x)
        x = batch_norm(train, self.dtype)(x)
        # Pooling before ReLU: the same in value and gradient, on a quarter of the entries.
        x = nn.relu(max_pool(x, window=3, stride=2, padding=1) if self.imagenet_stem else x)
        for stage, (blocks, channels) in enumerate(
            zip(self.stage_sizes, self.channels, strict=True)
        ):
            for block in range(blocks):
                x = ResidualBlock(
                    channels=scale_width(channels, self.width),
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    shortcut=self.shortcut,
                    zero_init_residual=self.zero_init_residual,
                    dtype=self.dtype,
                    conv_impl=self.conv_impl,
                )(x, train=train)
        return self.classify_mean(x)
