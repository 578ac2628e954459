"""The side of this package in the comparison with PyTorch: `python -m` this, with a JSON task.

It makes epochs of delayed SGD with the program that training runs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from asgd_jax import data, delayed, models
from asgd_jax.data.normalize import normalize_with
from asgd_jax.training.chunk import make_run_chunk
from asgd_jax.training.state import init_state
from asgd_jax.training.step import make_train_step
from benchmarks.workers import serve_epochs


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


if __name__ == "__main__":
    serve_epochs(make_epochs(json.loads(sys.argv[1])))
