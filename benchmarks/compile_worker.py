"""Compiles the update of the model that each request names and says how long it took.

Started by compile_time with JAX's persistent cache set by environment variables.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from asgd_jax.data import plan_batches
from asgd_jax.training import default_config
from asgd_jax.training.program import Facts, build_run
from asgd_jax.training.step import Batch

_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
_NUM_SAMPLES = 1 << 16


def time_compilation(request: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds of tracing and of compiling one donated update.

    >>> sorted(time_compilation({"model": "mlp", "dataset": "digits"}))
    ['compile', 'trace']
    """
    config = default_config()
    config.update(num_workers=8, delay=7, worker_batch_size=16, num_devices=1, **request)
    step, arguments = make_step(config)
    before = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    between = time.perf_counter()
    lowered.compile()
    return {"trace": between - before, "compile": time.perf_counter() - between}


def make_step(config: ConfigDict) -> tuple[Any, Any]:
    """Returns the train step of a configuration, and the shapes of its state and batch."""
    shape = _SHAPES.get(config.dataset, (config.image_size, config.image_size, 3))
    plan = plan_batches(
        _NUM_SAMPLES,
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )
    num_classes = 1000 if config.dataset == "imagenet2012" else 10
    to_float = lambda images: images.astype(jnp.float32) / 255  # noqa: E731
    facts = Facts(plan, num_classes, shape, lambda key, images: to_float(images), to_float)
    run = build_run(config, facts)
    state = jax.eval_shape(run.init, jax.random.PRNGKey(0))
    samples = (plan.workers_per_update, plan.worker_batch_size)
    batch = jax.eval_shape(
        lambda: Batch(jnp.zeros((*samples, *shape), jnp.uint8), jnp.zeros(samples, jnp.int32))
    )
    return run.advance, (state, batch)


def main() -> None:
    """Serves requests from standard input until it is closed."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(time_compilation(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
