"""A network cut into the stages of a pipeline."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_stages(model: nn.Module, image_shape: tuple[int, ...], num_stages: int) -> dict[str, int]:
    """Returns the stage of every top-level module: consecutive ones, of about as many parameters.

    In the order in which they run, modules are cut where the squared numbers of parameters of the
    stages have the least sum; no stage is empty.

    Args:
      model: a Linen module called as `model.apply(variables, images, train=...)`.
      image_shape: of one sample.
      num_stages: S >= 1.

    Returns:
      Name of a module -> 0, ..., S - 1; for `delays.by_stage`, whose `assign` reads it by
      `path[0].key`.

    Raises:
      ValueError: for more stages than modules.

    >>> from asgd_jax.models.mlp import MLP
    >>> layer_stages(MLP(num_classes=10, hidden=(32, 32, 32)), (8, 8, 1), 2)
    {'Dense_0': 0, 'Dense_1': 1, 'Dense_2': 1, 'Dense_3': 1}
    """
    order: dict[str, None] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.path:
            order.setdefault(context.module.path[0])
        return call(*args, **kwargs)

    def init() -> Any:
        images = jnp.zeros((1, *image_shape))
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), images, train=False)

    params = jax.eval_shape(init)["params"]
    names = [name for name in order if name in params]
    if num_stages > len(names):
        raise ValueError(
            f"a pipeline of {num_stages} stages is too long for the {len(names)} modules of this "
            "model: use fewer stages (a smaller delay)"
        )
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in names]
    edges = _cut(sizes, num_stages)
    return {name: sum(edge <= k for edge in edges) for k, name in enumerate(names)}


def _cut(sizes: Sequence[int], num_parts: int) -> list[int]:
    """Where to cut so that the squares of the parts' sums have the least sum: first indices of all
    parts but the first one.

    >>> _cut([1, 1, 1, 5, 2], 3)
    [3, 4]
    """
    total = [0, *itertools.accumulate(sizes)]
    best: list[tuple[float, list[int]]] = [(end**2, []) for end in total]  # of one part
    for parts in range(2, num_parts + 1):
        best = [
            min(
                ((best[at][0] + (total[end] - total[at]) ** 2, [*best[at][1], at])
                 for at in range(parts - 1, end)),
                default=(math.inf, []),
            )
            for end in range(len(total))
        ]  # fmt: skip
    return best[-1][1]
