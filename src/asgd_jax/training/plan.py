"""How much memory a run will take on each device, without data and without running it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax.data import FACTS, imagenet_normalizer, plan_batches
from asgd_jax.training import mesh as devices
from asgd_jax.training.config import validate_config
from asgd_jax.training.program import DataSpec, build_run
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch


class MemoryPlan(NamedTuple):
    """Bytes on each device.

    Attributes:
      parameters: the live parameters and BatchNorm's running statistics.
      history: the ring of past parameters.
      stale: the parameters of the next gradient.
      optimizer: momentum and whatever else the inner optimizer keeps.
      batch: the images and labels of one update, as they arrive.
      activations: temporary memory of the compiled step: activations, gradients, workspace. As
        XLA plans it for the backend that made this plan; other backends differ.
    """

    parameters: int
    history: int
    stale: int
    optimizer: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def abstract_step(
    config: ConfigDict, mesh: Mesh | None = None
) -> tuple[Callable[[TrainState, Batch], Any], TrainState, Batch]:
    """Returns the update of a configuration, and the shapes of its state and batch.

    Nothing is allocated and no data is read: the sizes are those of the official data set.

    Raises:
      ValueError: for a data set whose size is not known.
    """
    if config.dataset not in FACTS:
        known = ", ".join(FACTS)
        raise ValueError(f"unknown data set {config.dataset!r}: use one of {known}")
    facts = FACTS[config.dataset]
    image_shape = facts.image_shape or (config.image_size, config.image_size, 3)
    plan = plan_batches(
        facts.num_train,
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )
    normalize = imagenet_normalizer() if image_shape[-1] == 3 else _to_float
    spec = DataSpec(
        plan, facts.num_classes, image_shape, lambda key, images: normalize(images), normalize
    )
    run = build_run(config, spec, mesh=mesh)
    state = jax.eval_shape(run.init, jax.random.PRNGKey(0))
    samples = (plan.workers_per_update, plan.worker_batch_size)
    batch = jax.eval_shape(
        lambda: Batch(jnp.zeros((*samples, *image_shape), jnp.uint8), jnp.zeros(samples, jnp.int32))
    )
    return run.advance, state, batch


def plan_memory(config: ConfigDict) -> MemoryPlan:
    """Returns the memory of a run: shapes from `jax.eval_shape`, the rest from the compiled step.

    Nothing is allocated and no data is read, so a plan at paper scale fits a laptop. "auto"
    convolutions are planned as XLA's own, which is what accelerators run.

    Raises:
      ValueError: for a bad configuration, or `parallelism="pmap"`, which has no mesh to plan for.
    """
    validate_config(config)
    if config.parallelism == "pmap":
        raise ValueError("--plan needs parallelism='jit': under pmap a device holds all but images")
    config = config.copy_and_resolve_references()
    config.conv_impl = "lax" if config.conv_impl == "auto" else config.conv_impl
    mesh = devices.make_mesh(config.num_devices)
    devices.check_divisible(config.worker_batch_size, mesh.size)
    step, state, batch = abstract_step(config, mesh)
    sharding = devices.state_sharding(state, mesh, shard_history=config.shard_history)
    split = jax.tree.map(lambda _: devices.batch_sharding(mesh), batch)
    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(sharding, split),
        out_shardings=(sharding, devices.replicated(mesh)),
    )
    analysis = compiled.lower(state, batch).compile().memory_analysis()
    delayed, placed = state.opt_state, sharding.opt_state
    return MemoryPlan(
        parameters=_bytes(
            (state.params, state.batch_stats), (sharding.params, sharding.batch_stats)
        ),
        history=_bytes(delayed.history, placed.history),
        stale=_bytes(delayed.stale, placed.stale),
        optimizer=_bytes(delayed.inner_state, placed.inner_state),
        batch=_bytes(batch, split),
        activations=0 if analysis is None else int(analysis.temp_size_in_bytes),
    )


def format_plan(config: ConfigDict, plan: MemoryPlan) -> str:
    """Returns the plan as a table in MiB."""
    rows = [f"memory a device, {config.model} on {config.dataset}, delay {config.delay} (MiB)"]
    rows += [f"  {name:12}{size / 2**20:12,.1f}" for name, size in plan._asdict().items()]
    rows += [f"  {'total':12}{plan.total / 2**20:12,.1f}"]
    rows += [f"activations as compiled for {jax.default_backend()}; other backends differ"]
    return "\n".join(rows)


def _to_float(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255


def _bytes(shapes: PyTree, shardings: PyTree) -> int:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
    )
