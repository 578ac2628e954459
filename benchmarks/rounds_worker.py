"""Rounds in a process that stays: `python -m` this, with a JSON task."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import asgd_jax
from asgd_jax.training.collectives import collectives_of
from asgd_jax.training.command import use_threaded_convolutions
from asgd_jax.training.step import Batch, make_gradient
from asgd_jax.transforms import update_params
from benchmarks.harness import tree_bytes
from benchmarks.loops import make_workload
from benchmarks.workers import serve, use_cores

_LEARNING_RATE = 1e-3
_AXIS = "workers"


class _Round:
    """A compiled round, and its state, which moves on."""

    def __init__(self, task: dict[str, Any]):
        num_workers, shape = task["num_workers"], tuple(task["image_shape"])
        workload = make_workload(task["model"], task["batch_size"], shape, **task["model_options"])
        self.params = workload.variables["params"]
        random = np.random.default_rng(0)
        samples = (num_workers, task["batch_size"])
        self.batches = (
            random.integers(0, 256, (*samples, *shape), np.uint8),
            random.integers(0, 10, samples, np.int32),
        )
        of_batch = make_gradient(workload.model, lambda key, x: x.astype(jnp.float32) / 255)
        key = jax.random.key(0)  # nothing is random

        def gradient(params: Any, batch: Any) -> tuple[Any, jax.Array]:
            images, labels = batch
            grads, (_, loss, _) = of_batch(params, {}, Batch(images[None], labels[None]), key)
            return grads, loss

        self.gradient = gradient
        self.inner = optax.sgd(_LEARNING_RATE, momentum=0.9)
        make = self._serial if task["serial"] else self._rounds
        self.compiled, self.state = make(num_workers, task["devices"])

    def _serial(self, num_workers: int, num_devices: int) -> tuple[Any, Any]:
        del num_devices  # it has one, with all cores
        tx = asgd_jax.delayed(self.inner, num_workers - 1)

        def updates(state: Any, batches: Any) -> Any:
            def update(carry: Any, batch: Any) -> Any:
                made = update_params(tx, lambda where: self.gradient(where, batch), *carry)
                return made[:2], made[2]

            made: Any = jax.lax.scan(update, state, batches)
            return made

        state = jax.jit(lambda params: (jax.tree.map(jnp.copy, params), tx.init(params)))(
            self.params
        )
        self.batches = jax.device_put(self.batches)
        return self._compile(updates, state), state

    def _rounds(self, num_workers: int, num_devices: int) -> tuple[Any, Any]:
        mesh = Mesh(np.array(jax.devices()[:num_devices]), (_AXIS,))
        engine = asgd_jax.rounds(self.inner, num_workers, mesh=mesh, axis=_AXIS)
        self.batches = jax.device_put(self.batches, NamedSharding(mesh, PartitionSpec(_AXIS)))
        state = engine.init(self.params)
        step = lambda state, batches: engine.round(self.gradient, state, batches)  # noqa: E731
        return self._compile(step, state), state

    def _compile(self, step: Callable[..., Any], state: Any) -> Any:
        return jax.jit(step, donate_argnums=0).lower(state, self.batches).compile()

    def make(self, rounds: int) -> dict[str, float]:
        """Makes so many rounds and returns the last one's mean loss."""
        losses: Any = None
        for _ in range(rounds):
            self.state, losses = self.compiled(self.state, self.batches)
        return {"loss": float(jnp.mean(losses))}

    def look(self) -> dict[str, float]:
        """What the program says of itself, per device; the gradient of one worker beside it."""
        found = collectives_of(self.compiled.as_text())
        one = jax.tree.map(lambda leaf: leaf[0], jax.device_get(self.batches))
        alone: Any = jax.jit(self.gradient).lower(self.params, one).compile()
        whole = [
            leaf.nbytes
            for leaf in jax.tree.leaves(self.state.params)
            if leaf.addressable_shards[0].data.nbytes == leaf.nbytes
        ]
        size = tree_bytes(self.params)
        return {
            "collectives": len(found),
            "received": sum(each.received for each in found),
            "all_reduce": 2 * size,
            "inside_gradient": sum("shard_map" in each.op_name for each in found),
            "whole_leaves": sum(whole) / size,
            "flops": self.compiled.cost_analysis()["flops"],
            "gradient_flops": alone.cost_analysis()["flops"],
        }


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    use_cores(words["cores"])
    use_threaded_convolutions()
    held = _Round(words)
    serve(lambda asked: held.look() if asked.get("look") else held.make(asked["rounds"]))
