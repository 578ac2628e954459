"""Data behind one interface: a feed advances a state through an epoch and evaluates it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import mesh as devices
from asgd_jax.training.chunk import ChunkTotals, make_run_chunk
from asgd_jax.training.evaluate import Evaluate, make_evaluate
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch, Preprocess, TrainStep

Advance = Callable[[TrainState, int, int, int], tuple[TrainState, ChunkTotals]]


class Feed(NamedTuple):
    """A data set, as far as training needs it.

    Attributes:
      plan: batch arithmetic of an epoch.
      num_classes: number of labels.
      image_shape: (height, width, channels) of the model's input.
      preprocess: `preprocess(key, raw images)`: augmentation and normalisation, on the device.
      make_advance: `make_advance(train_step, max_delay, mesh, state_sharding)` gives
        `advance(state, epoch, start, stop)`, which makes these updates of an epoch and returns the
        state (the old one is donated) and the totals.
      make_evaluate: `make_evaluate(model, mesh)` gives `evaluate(params, batch_stats)`: loss and
        error over the whole validation set.
      inputs: `inputs(n)`: model inputs of the first n updates of a run without augmentation by
        crops and flips, to measure batch statistics on.
    """

    plan: data.BatchPlan
    num_classes: int
    image_shape: tuple[int, ...]
    preprocess: Preprocess
    make_advance: Callable[[TrainStep, int, Mesh, PyTree], Advance]
    make_evaluate: Callable[[nn.Module, Mesh], Evaluate]
    inputs: Callable[[int], Iterator[jax.Array]]


def plan_of(config: ConfigDict, num_samples: int) -> data.BatchPlan:
    """Returns the batch arithmetic of a configuration on a data set of `num_samples`."""
    return data.plan_batches(
        num_samples,
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )


def load_dataset(config: ConfigDict) -> data.Dataset:
    """Returns the data set of a configuration, in host memory."""
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        num_train=config.num_train,
        num_validation=config.num_validation,
        normalize=config.normalize,
    )


def make_preprocess(config: ConfigDict, dataset: data.Dataset) -> Preprocess:
    """Returns `preprocess(key, raw images)`: augmentation, where asked for, then normalisation."""
    normalize = data.normalizer(dataset)
    augment = data.augmenter(config.dataset) if config.augment else data.identity
    return lambda key, images: normalize(augment(key, images))


def open_in_memory(config: ConfigDict) -> Feed:
    """Returns the feed of a data set that lives on the device whole, a chunk of updates a call.

    Raises:
      ValueError: for an unknown data set or batches that do not fit it.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    dataset = load_dataset(config)
    plan = plan_of(config, len(dataset.train_labels))
    normalize = data.normalizer(dataset)

    def make_advance(
        train_step: TrainStep, max_delay: int, mesh: Mesh, state_sharding: PyTree
    ) -> Advance:
        order_of = jax.jit(
            lambda epoch: data.epoch_batches(config.seed, epoch, plan),
            out_shardings=devices.replicated(mesh),
        )
        arrays = (dataset.train_images, dataset.train_labels)
        if config.parallelism == "pmap":
            run = _pmapped(train_step, max_delay, config.divergence_loss, mesh)
            images, labels = devices.put_replicas(arrays, mesh)
        else:
            run = _jitted(train_step, max_delay, config.divergence_loss, mesh, state_sharding)
            images, labels = jax.device_put(arrays, devices.replicated(mesh))
        return lambda state, epoch, start, stop: run(
            state, images, labels, order_of(epoch), start, stop
        )

    def make_validation(model: nn.Module, mesh: Mesh) -> Evaluate:
        return make_evaluate(
            model,
            normalize,
            dataset.validation_images,
            dataset.validation_labels,
            config.eval_batch_size,
            devices.replicated(mesh),
        )

    def inputs(num_batches: int) -> Iterator[jax.Array]:
        for samples in jax.device_get(data.epoch_batches(config.seed, 0, plan))[:num_batches]:
            yield normalize(dataset.train_images[samples.ravel()])

    return Feed(
        plan=plan,
        num_classes=dataset.num_classes,
        image_shape=dataset.train_images.shape[1:],
        preprocess=make_preprocess(config, dataset),
        make_advance=make_advance,
        make_evaluate=make_validation,
        inputs=inputs,
    )


def _jitted(
    train_step: TrainStep,
    max_delay: int,
    divergence_loss: float,
    mesh: Mesh,
    state_sharding: PyTree,
) -> Callable[..., tuple[TrainState, ChunkTotals]]:
    """One program over all devices of the mesh; the batch is split, XLA adds the all-reduce."""
    split = devices.batch_sharding(mesh)

    def place(batch: Batch) -> Batch:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, split), batch)

    run_chunk = make_run_chunk(train_step, max_delay, divergence_loss, place=place)
    return jax.jit(
        run_chunk,
        donate_argnums=0,
        out_shardings=(state_sharding, devices.replicated(mesh)),
    )


def _pmapped(
    train_step: TrainStep, max_delay: int, divergence_loss: float, mesh: Mesh
) -> Callable[..., tuple[TrainState, ChunkTotals]]:
    """A program a device, on its own share of each worker's batch."""

    def place(batch: Batch) -> Batch:
        index = jax.lax.axis_index(devices.AXIS)
        size = batch.labels.shape[1] // mesh.size
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * size, size, axis=1), batch
        )

    mapped = jax.pmap(
        make_run_chunk(train_step, max_delay, divergence_loss, place=place),
        axis_name=devices.AXIS,
        in_axes=(0, 0, 0, None, None, None),
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )

    def run(*arguments: object) -> tuple[TrainState, ChunkTotals]:
        state, totals = mapped(*arguments)
        return state, jax.tree.map(lambda leaf: leaf[0], totals)  # equal on all devices

    return run
