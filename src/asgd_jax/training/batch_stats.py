"""Running statistics of BatchNorm under delay: one chain on the server, or one a worker.

Modes of `config.batch_stats`:
  server       one running average, advanced at every push; evaluation uses it (default).
  worker       each worker has its own, advanced at its own pushes, as in the reference program;
               evaluation uses that of the last push. Kept as a ring, found by staleness, like
               shifted momentum.
  recalibrate  as server while training; before each evaluation the statistics are measured anew at
               the live parameters, as plain means over some training batches.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from asgd_jax.models.layers import BATCH_NORM_DECAY
from asgd_jax.training.state import PyTree
from asgd_jax.transforms.history import init_ring, read_slot, write_slot

MODES = ("server", "worker", "recalibrate")


class BatchStatsChains(NamedTuple):
    """How running statistics are kept in the state.

    Attributes:
      init: `init(stats)`: what the state keeps, from the initial statistics.
      read: `read(kept, step, staleness)`: the statistics that the pushing worker has.
      write: `write(kept, step, stats)`: what is kept after push number `step`.
      live: `live(kept, step)`: the statistics for evaluation after `step` pushes.
    """

    init: Callable[[PyTree], PyTree]
    read: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    write: Callable[[PyTree, jax.Array, PyTree], PyTree]
    live: Callable[[PyTree, jax.Array], PyTree]


def make_chains(mode: str, max_delay: int) -> BatchStatsChains:
    """Returns the functions of a mode; without delay, "worker" is "server".

    >>> make_chains("server", 3).init({"mean": 1})
    {'mean': 1}
    """
    if mode != "worker" or max_delay == 0:
        return BatchStatsChains(
            init=lambda stats: stats,
            read=lambda kept, step, staleness: kept,
            write=lambda kept, step, stats: stats,
            live=lambda kept, step: kept,
        )

    def slot_of(kept: PyTree, slot: jax.Array) -> PyTree:
        like = jax.tree.map(lambda slots: slots[0], kept.slots)
        return read_slot(kept, slot, like)

    return BatchStatsChains(
        init=lambda stats: init_ring(stats, max_delay + 1),
        read=lambda kept, step, staleness: slot_of(kept, step - staleness),
        write=lambda kept, step, stats: write_slot(kept, step + 1, stats),
        live=slot_of,
    )


def recalibrate(
    model: nn.Module, params: PyTree, like: PyTree, batches: Iterable[jax.Array]
) -> PyTree:
    """Returns the mean of the batch statistics over some batches, at `params`.

    Args:
      model: a Linen module with a `batch_stats` collection.
      params: the parameters to measure at.
      like: running statistics, for their structure.
      batches: model inputs (n, height, width, channels), float32.
    """
    zeros = jax.tree.map(jnp.zeros_like, like)

    @jax.jit
    def measure(params: PyTree, images: jax.Array) -> PyTree:
        variables = {"params": params, "batch_stats": zeros}
        _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        # From zero, one step of the running average is (1 - decay) times the batch's statistics.
        return jax.tree.map(lambda leaf: leaf / (1 - BATCH_NORM_DECAY), new["batch_stats"])

    total, count = zeros, 0
    for images in batches:
        total = jax.tree.map(jnp.add, total, measure(params, images))
        count += 1
    return jax.tree.map(lambda leaf: leaf / count, total)
