"""The feed of a data set that is read from disk while training: ImageNet."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import mesh as devices
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, add_step, zero_totals
from asgd_jax.training.evaluate import Evaluate, make_sum_batch
from asgd_jax.training.feed import Advance, Feed, plan_of
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch, TrainStep
from asgd_jax.transforms import DelayedState, ShiftedTraceState


class _Stream(NamedTuple):
    """An open stream of batches, and the number of the step that it yields next."""

    batches: Iterator[tuple[np.ndarray, np.ndarray]]
    next_step: int


def open_streamed(config: ConfigDict) -> Feed:
    """Returns the feed of a streamed data set: one compiled step, batches prefetched by tf.data.

    Images travel to the device as uint8 and are normalised there; random-resized crop and flip
    happen while decoding. Every process reads its own images.

    Raises:
      ValueError: for batches that do not fit the data set or the processes.
      DatasetNotFoundError: when the folder does not hold the data set.
    """
    sizes = data.stream_sizes(config.data_dir, name=config.dataset)
    plan = plan_of(config, sizes.num_train)
    normalize = data.imagenet_normalizer()

    def stream(start_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return data.train_batches(
            config.data_dir,
            batch_size=plan.update_batch_size,
            seed=config.seed,
            start_step=start_step,
            **_common(config),
        )

    def make_advance(
        train_step: TrainStep, max_delay: int, mesh: Mesh, state_sharding: PyTree
    ) -> Advance:
        step = _make_step(train_step, config, mesh, state_sharding)
        put = _make_put(config, plan, mesh)
        return _make_advance(stream, step, put, plan.steps_per_epoch, max_delay)

    def inputs(num_batches: int) -> Iterator[jax.Array]:
        batches = stream(0)
        for _ in range(num_batches):
            yield normalize(next(batches)[0])

    return Feed(
        plan=plan,
        num_classes=sizes.num_classes,
        image_shape=(config.image_size, config.image_size, 3),
        preprocess=lambda key, images: normalize(images),
        make_advance=make_advance,
        make_evaluate=lambda model, mesh: _make_evaluate(config, model, normalize, mesh),
        inputs=inputs,
    )


def _common(config: ConfigDict) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "name": config.dataset,
    }


Step = Callable[[TrainState, ChunkTotals, Batch], tuple[TrainState, ChunkTotals]]


def _make_step(
    train_step: TrainStep, config: ConfigDict, mesh: Mesh, state_sharding: PyTree
) -> Step:
    def step(state: TrainState, totals: ChunkTotals, batch: Batch) -> Any:
        new_state, metrics = train_step(state, batch)
        new_totals = add_step(totals, metrics, state.step, config.divergence_loss)
        diverged = totals.diverged_at != NOT_DIVERGED
        return _keep_if(diverged, (state, totals), (new_state, new_totals))

    if config.parallelism == "pmap":
        return jax.pmap(
            step,
            axis_name=devices.AXIS,
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )
    whole = devices.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, whole))


def _keep_if(condition: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    """Returns `old` under the condition, else `new`; but past parameters and momenta of `new`.

    To keep their rings as well would copy them whole at every step (`lax.cond` copies even more),
    and of a run that has diverged nobody reads them.
    """
    rings = {DelayedState: "history", ShiftedTraceState: "trace"}

    def pick(old_node: Any, new_node: Any) -> Any:
        field = rings.get(type(new_node))
        if field is None:
            return jnp.where(condition, old_node, new_node)
        ring = {field: getattr(new_node, field)}
        without = old_node._replace(**{field: ()}), new_node._replace(**{field: ()})
        kept = [_keep_if(condition, *leaves) for leaves in zip(*without, strict=True)]
        return type(new_node)(*kept)._replace(**ring)

    return jax.tree.map(pick, old, new, is_leaf=lambda node: type(node) in rings)


def _make_put(
    config: ConfigDict, plan: data.BatchPlan, mesh: Mesh
) -> Callable[[tuple[np.ndarray, np.ndarray]], Batch]:
    """Host arrays of this process to a global `Batch` on the devices."""
    workers, size = plan.workers_per_update, plan.worker_batch_size

    def put(batch: tuple[np.ndarray, np.ndarray]) -> Batch:
        def place(array: np.ndarray) -> jax.Array:
            array = array.reshape(workers, -1, *array.shape[1:])
            if config.parallelism == "pmap":
                shares = np.stack(np.split(array, mesh.size, axis=1))
                return jax.device_put(shares, devices.leading_sharding(mesh))
            shape = (workers, size, *array.shape[2:])
            sharding = devices.batch_sharding(mesh)
            return jax.make_array_from_process_local_data(sharding, array, shape)

        return Batch(place(batch[0]), place(batch[1]))

    return put


def _make_advance(
    open_stream: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]],
    step: Step,
    put: Callable[[tuple[np.ndarray, np.ndarray]], Batch],
    steps_per_epoch: int,
    max_delay: int,
) -> Advance:
    stream = _Stream(iter(()), -1)

    def advance(
        state: TrainState, epoch: int, start: int, stop: int
    ) -> tuple[TrainState, ChunkTotals]:
        nonlocal stream
        first = epoch * steps_per_epoch + start
        if stream.next_step != first:
            stream = _Stream(open_stream(first), first)
        totals = zero_totals(max_delay)
        if state.step.ndim:  # pmap: an axis of devices
            totals = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], state.step.size, 0), totals)
        earlier = totals
        for number in range(first, first + stop - start):
            batch = put(next(stream.batches))  # on its way while the device still computes
            # Two steps behind: the last one may still run while this one is handed over, so the
            # device never waits for the host. A step after the divergence changes nothing.
            if int(np.ravel(_local(earlier.diverged_at))[0]) != NOT_DIVERGED:
                break
            earlier, (state, totals) = totals, step(state, totals, batch)
            stream = stream._replace(next_step=number + 1)
        if state.step.ndim:
            totals = jax.tree.map(lambda leaf: leaf[0], totals)
        return state, totals

    return advance


def _local(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0))


def _make_evaluate(
    config: ConfigDict,
    model: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
) -> Evaluate:
    split = devices.leading_sharding(mesh)
    sum_batch = jax.jit(make_sum_batch(model, normalize), out_shardings=devices.replicated(mesh))
    batch_size = -(-config.eval_batch_size // mesh.size) * mesh.size

    def evaluate(params: PyTree, batch_stats: PyTree) -> tuple[jax.Array, jax.Array]:
        loss, wrong, count = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        batches = data.validation_batches(config.data_dir, batch_size=batch_size, **_common(config))
        for images, labels, mask in batches:
            labels = np.where(mask > 0, labels, -1).astype(np.int32)
            whole = [
                jax.make_array_from_process_local_data(split, array) for array in (images, labels)
            ]
            batch_loss, batch_wrong = sum_batch(params, batch_stats, *whole)
            loss, wrong = loss + batch_loss, wrong + batch_wrong
            count += jnp.sum(whole[1] >= 0)
        return loss / count, wrong / count

    return evaluate
