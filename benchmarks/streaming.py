"""The ImageNet stream: images a second against plain TFDS, and how long training waits for it."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from asgd_jax import data
from asgd_jax.data import jpeg, prepared
from benchmarks.harness import interleave, ratio, spread
from benchmarks.report import num_cores
from benchmarks.result import BenchOptions, Goal, Result, Skipped, Table, TableRow, goal
from experiments.claims import at_least

TITLE = "decoding and augmenting ImageNet, and the wait for data in training"

_BATCH = 32
_NAME = "imagenet2012"
_BUDGET = 25.0  # seconds for each size of image

# What was found when a goal missed; shown only where it does.
_REASON = (
    "the images of this sample are only 160 pixels short, so that there is little outside a crop "
    "whose decoding could be saved"
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
    for image_size in (64,) if options.quick else (224, 64):
        size_rows, size_goals = measure_stream(image_size, quick=options.quick)
        rows += size_rows
        goals += size_goals
    tables = [Table(f"images a second, batches of {_BATCH}, {num_cores()} cores", rows)]
    if not options.quick:
        caption = "decoding alone, images enlarged to the size of most in ImageNet, in memory"
        tables.append(Table(caption, [measure_decoding()]))
        tables.append(Table("a training run, batches of 16 images of 64 pixels", [measure_wait()]))
    notes = [
        f"{sizes.num_train} training images under TFDS's name {_NAME}. Ours: random-resized crop "
        "(decoding only the crop), flip, resumable order. Plain: "
        '`tfds.load("imagenet2012").map(resize).batch().prefetch()` with parallel maps, whole '
        "images decoded and resized, neither crop nor flip, files shuffled.",
        "Seconds from the third batch on, of a stream opened afresh each time. CPU time is that of "
        "all threads: images by CPU second do not depend on what else the machine does.",
        "Wait: the time in `next(stream)` over that of the whole loop, after compilation, as "
        "training runs it: a batch is asked for while the step before is still computed.",
    ]
    return Result(tables, goals, notes)


_Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def plain_batches(image_size: int) -> _Batches:
    """Yields the batches of the shortest TFDS pipeline that a training loop can use."""
    tf, tfds = prepared.tensorflow_modules()

    def resize(example: dict[str, Any]) -> tuple[Any, Any]:
        image = tf.image.resize(example["image"], [image_size, image_size])
        return tf.cast(image, tf.uint8), example["label"]

    dataset = tfds.load(
        _NAME,
        split="train",
        shuffle_files=True,
        data_dir=prepared.resolve_data_dir(None),
        # A sample would be kept in memory, which the data set that it stands for would not.
        read_config=tfds.ReadConfig(try_autocache=False),
    )
    images = dataset.repeat().map(resize, num_parallel_calls=tf.data.AUTOTUNE)
    batches: _Batches = images.batch(_BATCH).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    return batches


def measure_stream(image_size: int, *, quick: bool) -> tuple[list[TableRow], list[Goal]]:
    """Times our stream and TFDS's in turns, each opened afresh."""
    count, rounds = (2, 1) if quick else (48, 7)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu: dict[str, list[float]] = {"ours": [], "plain": []}

    def timed(name: str, open_stream: Callable[[], _Batches]) -> Callable[[], None]:
        def call() -> None:
            stream = open_stream()
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

    def ours() -> _Batches:
        return data.train_batches(batch_size=_BATCH, image_size=image_size)

    variants = {
        "ours": timed("ours", ours),
        "plain": timed("plain", lambda: plain_batches(image_size)),
    }
    interleave(variants, rounds, warmup=0, budget=_BUDGET)
    faster, thriftier = ratio(seconds, "plain", "ours"), ratio(cpu, "plain", "ours")
    images = count * _BATCH
    rows: list[TableRow] = [
        {
            "size": image_size,
            "stream": name,
            "images/s": images / spread(seconds[name]).median,
            "images/s/core": images / spread(seconds[name]).median / num_cores(),
            "images/CPU s": images / spread(cpu[name]).median,
            "speed / plain": faster.median if name == "ours" else 1.0,
            "per CPU s / plain": thriftier.median if name == "ours" else 1.0,
        }
        for name in variants
    ]
    claim = at_least(f"stream at {image_size} pixels: images/s over plain TFDS", faster.median, 1.0)
    reason = f"quartiles {faster.low:.2f} to {faster.high:.2f}, by CPU time {thriftier.median:.2f}"
    return rows, [goal(claim, f"{reason}; {_REASON}")]


def enlarged_images(short_side: int, count: int = 64) -> list[bytes]:
    """Returns images of the sample, enlarged to a short side of so many pixels, as JPEG bytes."""
    tf, tfds = prepared.tensorflow_modules()
    dataset = tfds.load(_NAME, split="train", data_dir=prepared.resolve_data_dir(None))
    encoded = []
    for example in dataset.take(count):
        shape = tf.cast(tf.shape(example["image"])[:2], tf.float32)
        scaled = tf.cast(shape * (short_side / tf.reduce_min(shape)), tf.int32)
        image = tf.image.resize(example["image"], scaled, "bicubic")
        image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
        encoded.append(tf.io.encode_jpeg(image, quality=95).numpy())
    return encoded


def measure_decoding(short_side: int = 375, image_size: int = 224) -> TableRow:
    """Returns CPU time of the maps alone, crop against whole, on images of ImageNet's own size."""
    tf, _ = prepared.tensorflow_modules()
    images, count = enlarged_images(short_side), 12
    draws = np.random.default_rng(0).random((len(images), jpeg.NUM_DRAWS), np.float32)

    def crop(encoded: Any, draws: Any) -> Any:
        return jpeg.decode_train(encoded, draws, image_size)

    def whole(encoded: Any, draws: Any) -> Any:
        del draws
        image = tf.image.resize(tf.io.decode_jpeg(encoded, channels=3), [image_size, image_size])
        return tf.cast(image, tf.uint8)

    def passing(function: Callable[[Any, Any], Any]) -> Callable[[], None]:
        dataset = tf.data.Dataset.from_tensor_slices((images, draws)).repeat()
        batches = dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE).batch(_BATCH)

        def call() -> None:
            for _ in batches.take(count).as_numpy_iterator():
                pass

        return call

    variants = {"ours": passing(crop), "plain": passing(whole)}
    times = interleave(variants, 7, budget=10.0, clock=time.process_time)
    faster = ratio(times, "plain", "ours")
    return {
        "short side": short_side,
        "size": image_size,
        "ours (images/CPU s)": count * _BATCH / spread(times["ours"]).median,
        "plain (images/CPU s)": count * _BATCH / spread(times["plain"]).median,
        "ours / plain": faster.median,
        "low quartile": faster.low,
        "high quartile": faster.high,
    }


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
