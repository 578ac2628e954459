"""Models by name: what a config file asks for."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from asgd_jax.delays import as_integer
from asgd_jax.models.char_transformer import CharTransformer
from asgd_jax.models.classifier import Classifier
from asgd_jax.models.layers import resolve_conv_impl
from asgd_jax.models.mlp import MLP
from asgd_jax.models.mnist_cnn import BatchNormCNN, LeNet
from asgd_jax.models.resnet import ResNet
from asgd_jax.models.vgg import VGG11

MODELS: dict[str, Callable[..., Classifier]] = {
    "mlp": MLP,
    "digits_cnn": partial(LeNet, channels=(16, 32), kernel_size=3, padding="SAME", hidden=()),
    "mnist_cnn": LeNet,
    "mnist_cnn_bn": BatchNormCNN,
    "vgg11": VGG11,
    "char_transformer": CharTransformer,
    "resnet20": ResNet,
    "resnet44": partial(ResNet, stage_sizes=(7, 7, 7)),
    "resnet50": partial(
        ResNet,
        stage_sizes=(3, 4, 6, 3),
        channels=(64, 128, 256, 512),
        bottleneck=True,
        imagenet_stem=True,
        zero_init_residual=True,
    ),
}


def model_options(name: str) -> list[str]:
    """Returns the extra keyword arguments that `create` takes for a model.

    Raises:
      ValueError: for an unknown model, listing the known ones.

    >>> model_options("mlp")
    ['activation', 'hidden', 'initializer']
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {sorted(MODELS)}")
    factory = MODELS[name]
    module = factory.func if isinstance(factory, partial) else factory
    # All but what is create()'s own, or Flax's.
    own = {field.name for field in fields(module)}  # type: ignore[arg-type]
    return sorted(own - {field.name for field in fields(Classifier)})


def create(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dtype: Any = jnp.float32,
    conv_impl: str = "auto",
    **options: Any,
) -> nn.Module:
    """Returns a Flax Linen model; `model.apply(variables, images, train=...)` gives float32 logits.

    Models with BatchNorm (`mnist_cnn_bn`, `resnet*`, `vgg11` with `batch_norm=True`) have a
    `batch_stats` collection, to be passed as mutable when `train=True`.

    Args:
      name: mlp, digits_cnn (8x8), mnist_cnn and mnist_cnn_bn (28x28), vgg11, resnet20 and resnet44
        (32x32), resnet50 (224x224, any other size from 32), or char_transformer (text).
      num_classes: number of logits.
      width: multiplies every channel count and hidden width (rounded, at least 4): small numbers
        make quick tests.
      dtype: of the computation, float32 or bfloat16, as a dtype or its name; parameters, batch
        statistics and logits stay float32.
      conv_impl: "auto", "cpu" or "lax"; parameters are the same under each.
      **options: further attributes of the model, such as `hidden` and `activation` of mlp,
        `batch_norm` of vgg11 or `shortcut` of the ResNets; `model_options(name)` lists them.

    Raises:
      ValueError: for an unknown name or option, listing the known ones; for a width or a number of
        classes that is not positive; for an unknown `conv_impl` or a dtype that is not floating.

    >>> create("mlp", num_classes=10, hidden=(32, 32)).hidden
    (32, 32)
    """
    known = model_options(name)
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"model {name!r} has no option {unknown[0]!r}: it takes {known}")
    if as_integer(num_classes, "num_classes") == 0:
        raise ValueError("num_classes must be >= 1, got 0")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a finite number > 0, got {width!r}: 1.0 is full size")
    resolve_conv_impl(conv_impl)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be a floating type, got {jnp.dtype(dtype)}: use float32")
    return MODELS[name](
        num_classes=num_classes,
        width=width,
        dtype=jnp.dtype(dtype),
        conv_impl=conv_impl,
        # Config files hold lists; a module that is a static argument is hashed by its attributes.
        **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()},
    )
