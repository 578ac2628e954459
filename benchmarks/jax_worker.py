"""The side of this package in the comparison with PyTorch: `python -m` this, with a JSON task.

It makes epochs of delayed SGD with the program that training runs.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax import data, delayed, models
from asgd_jax.data.normalize import normalize_with
from asgd_jax.training.chunk import make_run_chunk
from asgd_jax.training.command import use_threaded_convolutions
from asgd_jax.training.state import init_state
from asgd_jax.training.step import cross_entropy, make_train_step
from benchmarks.workers import serve, serve_epochs, use_cores


def make_epochs(task: dict[str, Any]) -> Callable[[int], float]:
    """Returns `run(n)`: n epochs of A-SGD, the order of the samples drawn anew in each.

    Args:
      task: arrays (.npz with uint8 `images` and int32 `labels`), model, model_options, num_workers,
        batch_size, learning_rate.
    """
    with np.load(task["arrays"]) as arrays:
        images, labels = jax.device_put((arrays["images"], arrays["labels"]))
    delay = task["num_workers"] - 1
    plan = data.plan_batches(
        len(labels),
        num_workers=task["num_workers"],
        worker_batch_size=task["batch_size"],
        delay=delay,
    )
    options = {"num_classes": 10, **task["model_options"]}
    model = models.create(task["model"], **options)
    tx = delayed(optax.sgd(task["learning_rate"]), delay)
    normalize = normalize_with([0.5], [0.5])
    train_step = make_train_step(model, tx, lambda key, x: normalize(x))
    chunk = jax.jit(make_run_chunk(train_step, delay, 1e9), donate_argnums=0)
    order_of = jax.jit(lambda epoch: data.epoch_batches(0, epoch, plan))
    state = init_state(model, tx, images.shape[1:], 0)
    epoch = 0

    def run(num_epochs: int) -> float:
        nonlocal state, epoch
        loss = float("nan")
        for _ in range(num_epochs):
            order = order_of(epoch)
            state, totals = chunk(state, images, labels, order, 0, plan.steps_per_epoch)
            loss = float(totals.loss) / plan.steps_per_epoch  # as training does: a row an epoch
            epoch += 1
        return loss

    return run


def count_flops(task: dict[str, Any], image_shape: tuple[int, ...]) -> float:
    """Returns the floating-point operations of one gradient, as XLA counts them before it compiles.

    Counted on `lax.conv`: patches and padding are a way of computing, not the work to be done.
    """
    options = {"num_classes": 10, "conv_impl": "lax", **task["model_options"]}
    model = models.create(task["model"], **options)
    images = jax.ShapeDtypeStruct((task["batch_size"], *image_shape), "float32")
    labels = jax.ShapeDtypeStruct((task["batch_size"],), "int32")
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, y).mean()

    stats = {name: value for name, value in variables.items() if name != "params"}
    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], stats, images, labels)
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])


def measure_peak(side: int = 2048, repetitions: int = 10) -> float:
    """Returns the operations a second of the best of a few products of large matrices."""
    matrix = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repetitions):
        before = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - before)
    return float(2 * side**3 / min(seconds))


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    use_cores(request["cores"])
    use_threaded_convolutions()
    if request.get("model") is None:
        serve(lambda asked: {"peak": measure_peak()})
    else:
        serve_epochs(make_epochs(request))
