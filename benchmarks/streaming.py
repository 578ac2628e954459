"""The ImageNet stream: images a second against plain TFDS, and how long training waits for it."""

import gc
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from asgd_jax import data
from asgd_jax.data import prepared
from benchmarks.harness import interleave, ratio, spread
from benchmarks.report import num_cores
from benchmarks.result import BenchOptions, Goal, Result, Skipped, Table, TableRow, goal
from experiments.claims import at_least

TITLE = "decoding and augmenting ImageNet, and the wait for data in training"

_BATCH = 32
_NAME = "imagenet2012"
_BUDGET = 25.0  # seconds for each size of image

# Most of ImageNet has a short side of 375 to 500 pixels.
_SHORT_SIDES = (375, 500)
_REPEATED = 8

# What was found when a goal missed; shown only where it does.
_REASON = (
    "two thirds of a crop's time are the entropy decoding of the rows above and beside it, which "
    "JPEG cannot skip, and the bilinear resize, which both sides make"
)


def run(options: BenchOptions) -> Result:
    """Measures both; see the module.

    Raises:
      Skipped: where ImageNet, or a sample of it, is not prepared.
    """
    try:
        sizes = data.stream_sizes()
    except data.DatasetNotFoundError as error:
        raise Skipped(" ".join(str(error).split())) from error
    rows, goals = list[TableRow](), list[Goal]()
    with tempfile.TemporaryDirectory() as folder:
        for short_side in _SHORT_SIDES[:1] if options.quick else _SHORT_SIDES:
            data_dir = Path(folder) / str(short_side)
            write_enlarged(data_dir, short_side)
            for split in ("train", "validation"):
                split_rows, split_goals = measure_stream(
                    split, str(data_dir), short_side, quick=options.quick
                )
                rows += split_rows
                goals += split_goals
    tables = [Table(f"images of 224 pixels, batches of {_BATCH}, {num_cores()} cores", rows)]
    if not options.quick:
        tables.append(Table("a training run, batches of 16 images of 64 pixels", [measure_wait()]))
    notes = [
        f"A sample of {sizes.num_train} training and {sizes.num_validation} validation images, "
        "enlarged to a short side as most of ImageNet has it and written again in TFDS's format.",
        "Ours: random-resized crop (decoding only the crop), flip, resumable order; or the centre "
        f'crop. Plain: `tfds.load("{_NAME}").map(resize).batch().prefetch()` with parallel maps, '
        "whole images decoded and resized, neither crop nor flip, files shuffled.",
        "From the third batch on, of a stream opened afresh each time. CPU time is that of all "
        "threads: images by CPU second do not depend on what else the machine does.",
        "Wait: the time in `next(stream)` over that of the whole loop, after compilation, as "
        "training runs it: a batch is asked for while the step before is still computed.",
    ]
    return Result(tables, goals, notes)


_Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def plain_batches(split: str, data_dir: str, image_size: int) -> _Batches:
    """Yields the batches of the shortest TFDS pipeline that a training loop can use."""
    tf, tfds = prepared.tensorflow_modules()

    def resize(example: dict[str, Any]) -> tuple[Any, Any]:
        image = tf.image.resize(example["image"], [image_size, image_size])
        return tf.cast(image, tf.uint8), example["label"]

    dataset = tfds.load(
        _NAME,
        split=split,
        shuffle_files=split == "train",
        data_dir=data_dir,
        # A sample would be kept in memory, which the data set that it stands for would not.
        read_config=tfds.ReadConfig(try_autocache=False),
    )
    images = dataset.repeat().map(resize, num_parallel_calls=tf.data.AUTOTUNE)
    batches: _Batches = images.batch(_BATCH).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    return batches


def our_batches(split: str, data_dir: str, image_size: int) -> Iterator[Any]:
    """Yields the same number of images a batch by the library's stream, without end."""
    if split == "train":
        yield from data.train_batches(data_dir, batch_size=_BATCH, image_size=image_size)
    while True:
        yield from data.validation_batches(data_dir, batch_size=_BATCH, image_size=image_size)


def measure_stream(
    split: str, data_dir: str, short_side: int, *, quick: bool, image_size: int = 224
) -> tuple[list[TableRow], list[Goal]]:
    """Times our stream and TFDS's in turns, each opened afresh."""
    count, rounds = (2, 1) if quick else (24, 9)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu: dict[str, list[float]] = {"ours": [], "plain": []}

    def timed(name: str, open_stream: Callable[..., Iterator[Any]]) -> Callable[[], None]:
        def call() -> None:
            stream = open_stream(split, data_dir, image_size)
            for _ in itertools.islice(stream, 2):
                pass
            before, cpu_before = time.perf_counter(), time.process_time()
            for _ in itertools.islice(stream, count):
                pass
            seconds[name].append(time.perf_counter() - before)
            cpu[name].append(time.process_time() - cpu_before)
            del stream
            gc.collect()  # ends the stream's threads before the other's start

        return call

    variants = {"ours": timed("ours", our_batches), "plain": timed("plain", plain_batches)}
    interleave(variants, rounds, warmup=0, budget=_BUDGET)
    faster, thriftier = ratio(seconds, "plain", "ours"), ratio(cpu, "plain", "ours")
    images = count * _BATCH
    rows: list[TableRow] = [
        {
            "split": split,
            "short side": short_side,
            "stream": name,
            "images/s": images / spread(seconds[name]).median,
            "images/CPU s": images / spread(cpu[name]).median,
            "speed / plain": faster.median if name == "ours" else 1.0,
            "per CPU s / plain": thriftier.median if name == "ours" else 1.0,
        }
        for name in variants
    ]
    claim = at_least(
        f"{split} stream, short side {short_side}: images per CPU second over plain TFDS",
        thriftier.median,
        1.0,
    )
    reason = f"quartiles {thriftier.low:.2f} to {thriftier.high:.2f}; {_REASON}"
    return rows, [goal(claim, reason)]


def write_enlarged(folder: Path, short_side: int) -> None:
    """Writes the sample's data set again, its images enlarged to a short side of so many pixels.

    Validation images are written several times over: opening a stream anew after each 200 would
    be timed otherwise, and ImageNet has 50,000.
    """
    tf, _ = prepared.tensorflow_modules()
    source = Path(prepared.prepared_builder(_NAME, None).data_dir)
    target = folder / source.relative_to(source.parents[1])
    target.mkdir(parents=True)
    for file in source.iterdir():
        if ".tfrecord-" not in file.name:
            shutil.copyfile(file, target / file.name)
            continue
        records = list[bytes]()
        for record in tf.data.TFRecordDataset(str(file)):
            example = tf.train.Example.FromString(record.numpy())
            encoded = example.features.feature["image"].bytes_list.value
            encoded[0] = _enlarge(encoded[0], short_side)
            records.append(example.SerializeToString())
        with tf.io.TFRecordWriter(str(target / file.name)) as writer:
            for record in records * (_REPEATED if "validation" in file.name else 1):
                writer.write(record)
    info = json.loads((target / "dataset_info.json").read_text())
    for split in info["splits"]:
        if split["name"] == "validation":
            lengths = [str(_REPEATED * int(length)) for length in split["shardLengths"]]
            split["shardLengths"] = lengths
    (target / "dataset_info.json").write_text(json.dumps(info))


def _enlarge(encoded: bytes, short_side: int) -> bytes:
    tf, _ = prepared.tensorflow_modules()
    whole = tf.io.decode_jpeg(encoded, channels=3)
    shape = tf.cast(tf.shape(whole)[:2], tf.float32)
    scaled = tf.cast(tf.round(shape * (short_side / tf.reduce_min(shape))), tf.int32)
    image = tf.image.resize(whole, scaled, "bicubic")
    image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
    jpeg: bytes = tf.io.encode_jpeg(image, quality=95).numpy()
    return jpeg


def measure_wait(num_updates: int = 12, image_size: int = 64) -> TableRow:
    """Trains a narrow ResNet-50 on the stream; returns the share of time spent waiting for it."""
    from asgd_jax.training import default_config
    from asgd_jax.training.setup import set_up
    from asgd_jax.training.step import Batch

    config = default_config()
    config.update(
        dataset=_NAME,
        model="resnet50",
        width=0.25,
        image_size=image_size,
        num_workers=8,
        worker_batch_size=16,
        delay=7,
        learning_rate=0.01,
        num_devices=1,
    )
    setup = set_up(config)
    step = jax.jit(setup.run.advance, donate_argnums=0)
    stream = data.train_batches(batch_size=16, image_size=image_size)

    def put(batch: tuple[np.ndarray, np.ndarray]) -> Batch:
        return Batch(*(jax.device_put(array[None]) for array in batch))

    state, metrics = step(setup.state, put(next(stream)))
    jax.block_until_ready(metrics)
    waited, before = 0.0, time.perf_counter()
    for _ in range(num_updates):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        float(metrics.loss)  # a closer look than training takes, which is two steps behind
        state, metrics = step(state, put(batch))
    jax.block_until_ready(metrics)
    total = time.perf_counter() - before
    return {
        "model": "ResNet-50, width .25",
        "updates": num_updates,
        "ms/update": 1e3 * total / num_updates,
        "waiting for data (ms/update)": 1e3 * waited / num_updates,
        "share of time waiting": waited / total,
    }
