"""What a run will take of each device: memory and exchange, without data, without running it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax.data import FACTS, BatchPlan, imagenet_normalizer
from asgd_jax.delays import DelayProcess
from asgd_jax.training import mesh as devices
from asgd_jax.training.collectives import collectives_of
from asgd_jax.training.config import STREAMED, validate_config
from asgd_jax.training.feed import plan_of
from asgd_jax.training.program import DataSpec, build_run
from asgd_jax.training.rounds_step import (
    RoundBatch,
    check_workers,
    round_sharding,
    updates_of_round,
)
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch


class MemoryPlan(NamedTuple):
    """Bytes on each device.

    Attributes:
      parameters: the live parameters and BatchNorm's running statistics.
      history: the ring of past parameters.
      stale: the parameters of the next gradient; of a round they are among `activations`.
      optimizer: momentum and whatever else the inner optimizer keeps.
      batch: the images and labels of one update, as they arrive; of a round those of all of it.
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


class Exchange(NamedTuple):
    """What a device receives from the others, as XLA compiled it.

    Attributes:
      updates: of the compiled step: 1, or those of a round.
      received: bytes, see `collectives.Collective`.
    """

    updates: int
    received: int


class Plan(NamedTuple):
    """What a run takes of each device."""

    memory: MemoryPlan
    exchange: Exchange


def abstract_step(
    config: ConfigDict, mesh: Mesh | None = None
) -> tuple[Callable[[TrainState, Any], Any], TrainState, Any]:
    """Returns the update of a configuration (the round, of `parallelism="workers"`), the shapes of
    its state and of its batch.

    Nothing is allocated and no data is read: the sizes are those of the official data set.

    Raises:
      ValueError: for a data set whose size is not known.
    """
    if config.dataset not in FACTS:
        known = ", ".join(FACTS)
        raise ValueError(f"unknown data set {config.dataset!r}: use one of {known}")
    facts = FACTS[config.dataset]
    image_shape = facts.image_shape or (config.image_size, config.image_size, 3)
    plan = plan_of(config, facts.num_train)
    normalize = imagenet_normalizer() if image_shape[-1] == 3 else _to_float
    spec = DataSpec(
        plan, facts.num_classes, image_shape, lambda key, images: normalize(images), normalize
    )
    run = build_run(config, spec, mesh=mesh)
    state = jax.eval_shape(run.init, jax.random.PRNGKey(0))
    samples = (_updates_of_step(config, run.process, plan, mesh) * plan.workers_per_update,
               plan.worker_batch_size)  # fmt: skip
    images: Any = jax.ShapeDtypeStruct((*samples, *image_shape), jnp.uint8)
    following = image_shape if facts.is_text else ()  # a label a character
    labels: Any = jax.ShapeDtypeStruct((*samples, *following), jnp.int32)
    if config.parallelism == "workers":
        length: Any = jax.ShapeDtypeStruct((), jnp.int32)
        return run.advance, state, RoundBatch(images, labels, length)
    return run.advance, state, Batch(images, labels)


def _updates_of_step(
    config: ConfigDict, process: DelayProcess, plan: BatchPlan, mesh: Mesh | None
) -> int:
    if config.parallelism != "workers":
        return 1
    return updates_of_round(process, plan, 1 if mesh is None else mesh.size)


def make_plan(config: ConfigDict) -> Plan:
    """Returns what a run takes: shapes from `jax.eval_shape`, the rest from the compiled step.

    Nothing is allocated and no data is read, so a plan at paper scale fits a laptop, which
    `XLA_FLAGS=--xla_force_host_platform_device_count=32` gives as many devices as a pod has.
    "auto" convolutions are planned as XLA's own, which is what accelerators run.

    Raises:
      ValueError: for a bad configuration, or `parallelism="pmap"`, which has no mesh to plan for.
    """
    validate_config(config)
    if config.parallelism == "pmap":
        raise ValueError(
            "--plan needs parallelism='jit' or 'workers': under pmap a device holds all but images"
        )
    config = config.copy_and_resolve_references()
    config.conv_impl = "lax" if config.conv_impl == "auto" else config.conv_impl
    mesh = devices.make_mesh(config.num_devices)
    step, state, batch = abstract_step(config, mesh)
    sharding, split = _shardings(config, mesh, state, batch)
    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(sharding, split),
        out_shardings=(sharding, devices.replicated(mesh)),
    )
    program = compiled.lower(state, batch).compile()
    analysis, text = program.memory_analysis(), program.as_text() or ""
    kept, placed = state.opt_state, sharding.opt_state
    in_rounds = config.parallelism == "workers"
    ring = "pulled" if in_rounds else "history"
    memory = MemoryPlan(
        parameters=_bytes(
            (state.params, state.batch_stats), (sharding.params, sharding.batch_stats)
        ),
        history=_bytes(getattr(kept, ring), getattr(placed, ring)),
        stale=0 if in_rounds else _bytes(kept.stale, placed.stale),
        optimizer=_bytes(kept.inner_state, placed.inner_state),
        batch=_bytes(batch, split),
        activations=0 if analysis is None else int(analysis.temp_size_in_bytes),
    )
    updates = len(batch.labels) * (config.delay + 1) // config.num_workers if in_rounds else 1
    return Plan(memory, Exchange(updates, sum(each.received for each in collectives_of(text))))


def _shardings(config: ConfigDict, mesh: Mesh, state: TrainState, batch: Any) -> tuple[Any, Any]:
    """Where the state and the batch of a step lie."""
    if config.parallelism == "workers":
        check_workers(plan_of(config, 1 << 60), mesh.size)
        split = jax.tree.map(lambda _: devices.leading_sharding(mesh), batch)
        return round_sharding(state, mesh), split._replace(length=devices.replicated(mesh))
    devices.check_divisible(config.worker_batch_size, mesh.size)
    sharding = devices.state_sharding(state, mesh, shard_history=config.shard_history)
    return sharding, jax.tree.map(lambda _: devices.batch_sharding(mesh), batch)


def format_plan(config: ConfigDict, plan: Plan) -> str:
    """Returns the plan as a table in MiB."""
    memory, (updates, received) = plan
    rows = [f"memory a device, {config.model} on {config.dataset}, delay {config.delay} (MiB)"]
    rows += [f"  {name:12}{size / 2**20:12,.1f}" for name, size in memory._asdict().items()]
    rows += [f"  {'total':12}{memory.total / 2**20:12,.1f}"]
    every = "an update" if updates == 1 else f"a round of {updates} updates"
    rows += [f"received by a device, {every}: {received / 2**20:,.1f} MiB"]
    if config.parallelism == "workers" and config.dataset in STREAMED:
        rows += [f"  and up to {memory.batch / 2**20:,.1f} of images where several processes read"]
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
