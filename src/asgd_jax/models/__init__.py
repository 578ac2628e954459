"""Flax models of the experiments, by name: `create("vgg11", num_classes=10)`.

May import `delays` only. Start reading at `factory.py`, which lists them; `layers.py` has the
layers that they are made of, `convolution.py` what makes those quick on a CPU.
"""

from asgd_jax.models.factory import MODELS, create, model_options
from asgd_jax.models.layers import Conv, max_pool

__all__ = ["MODELS", "Conv", "create", "max_pool", "model_options"]
