"""A worker of a real run: pulls parameters, computes a gradient on its own batch, pushes it.

`RealWorker` is a plain class; `cluster.crew` makes Ray actors of it, a process each, which XLA
gives one thread: N of them share a machine's cores without waiting for one another.
"""

import os
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.cluster.exchange import make_take, node_id, num_bytes_of, open_channel
from asgd_jax.cluster.programs import Pushed, make_programs
from asgd_jax.cluster.worker_times import parse_worker_times
from asgd_jax.training.command import use_compilation_cache
from asgd_jax.training.feed import feed_of
from asgd_jax.training.recorded import num_shards_of
from asgd_jax.training.state import PyTree


class RealWorker:
    """See the module.

    Args:
      worker: 0, ..., num_workers - 1.
      life: how often this worker was started before.
      config: of the run.
      dataset: of the run; arrays in Ray's object store are shared, not copied.
      constant: whether to compute one gradient and push it again and again: what is left is the
        cost of the server and the way there.
    """

    def __init__(
        self,
        worker: int,
        life: int,
        config: ConfigDict,
        dataset: data.Dataset,
        constant: bool = False,
    ):
        use_compilation_cache()
        self._worker, self._life, self._dataset = worker, life, dataset
        facts = feed_of(config, dataset).facts
        self._programs = make_programs(config, facts)
        self._batch_of = data.make_batch_of(config.seed, facts.plan, num_shards_of(config))
        self._least_time = parse_worker_times(config.worker_times)
        self._rng = np.random.default_rng((config.seed, worker, life))
        shapes = jax.eval_shape(self._programs.init).params
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        first = self._compute(worker, zeros)  # compiled before the run begins
        self._constant = first if constant else None
        self._num_bytes = num_bytes_of(first)

    def ready(self) -> int:
        """Returns the process id, once everything is compiled."""
        return os.getpid()

    def run(self, server: Any) -> str:
        """Works for a server until there is nothing to do; returns why it stopped."""
        import ray

        try:
            here, size = ray.get_runtime_context().current_actor, self._num_bytes
            up = open_channel(server, ray.get(server.node.remote()), size)
            down = ray.get(server.connect.remote(self._worker, self._life, up, here, node_id()))
            take = make_take(down)
            number = ray.get(server.begin.remote(self._worker, self._life))
            while number is not None:
                began = time.perf_counter()
                up.write(self._answer(number, take()))
                self._pause(began)
                seconds = time.perf_counter() - began
                answer = server.exchange.remote(self._worker, self._life, number, seconds)
                number = ray.get(answer)
        except ray.exceptions.RayActorError:
            return "server lost"
        return "finished"

    def _answer(self, number: int, params: PyTree) -> Pushed:
        return self._compute(number, params) if self._constant is None else self._constant

    def _compute(self, number: int, params: PyTree) -> Pushed:
        samples = self._batch_of(number)
        images, labels = self._dataset.train_images[samples], self._dataset.train_labels[samples]
        found: Pushed = jax.device_get(
            self._programs.gradient(params, images, labels, np.int32(number))
        )
        return found

    def _pause(self, began: float) -> None:
        """Sleeps until the gradient has taken as long as it is to take."""
        if self._least_time is not None:
            until = began + self._least_time(self._rng, self._worker)
            time.sleep(max(0.0, until - time.perf_counter()))
