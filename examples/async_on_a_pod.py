"""Asynchronous training of N workers on N devices, and that it is what one after another gives.

    python examples/async_on_a_pod.py

runs anywhere, on all accelerators of a host; without any on 8 devices that share the CPU, where it
shows what it does and not how fast.
"""

import os

# Before JAX looks: has no effect where there are accelerators.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import asgd_jax

NUM_ROUNDS = 25
WORKER_BATCH = 32


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 128)) / 8,
        "output": jax.random.normal(second, (128, 10)) / 12,
        "bias": jnp.zeros(10),
    }


def gradient(params, batch):
    """One worker's work: gradient of its batch, and its loss."""

    def loss(params):
        x, y = batch
        logits = jax.nn.relu(x @ params["hidden"]) @ params["output"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return grads, value


def make_batches(num_updates):
    """One batch an update, in order: arrays of shape (num_updates, WORKER_BATCH, ...)."""
    x, y = load_digits(return_X_y=True)
    picks = np.random.default_rng(0).integers(len(x), size=(num_updates, WORKER_BATCH))
    return (x[picks] / 8 - 1).astype(np.float32), y[picks].astype(np.int32)


def train_in_rounds(optimizer, schedule, mesh, batches, updates, lengths):
    """A round at a time: `updates[r]` are the batches of round r, of which `lengths[r]` count."""
    engine = asgd_jax.rounds(optimizer, schedule, mesh=mesh)
    step = jax.jit(engine.round, static_argnums=0, donate_argnums=1)
    over_workers = NamedSharding(mesh, PartitionSpec("workers"))
    state = engine.init(init_params(jax.random.key(0)))
    losses = []
    for here, length in zip(updates, lengths, strict=True):
        of_round = jax.device_put(tuple(leaf[here] for leaf in batches), over_workers)
        state, round_losses = step(gradient, state, of_round)
        losses.append(round_losses[:length])
    return state.params, np.concatenate(losses)


def train_one_by_one(optimizer, delay, batches):
    """The same on one device, one gradient after another: `delayed`."""
    tx = asgd_jax.delayed(optimizer, delay)

    def step(carry, batch):
        params, state = carry
        grads, value = gradient(asgd_jax.stale_params(state, params), batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = init_params(jax.random.key(0))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))
    (params, _), losses = run((params, tx.init(params)))
    return params, losses


def difference(params, others):
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in leaves)


def main():
    num_workers = jax.device_count() * max(1, 8 // jax.device_count())
    mesh = Mesh(np.array(jax.devices()), ("workers",))
    num_updates = NUM_ROUNDS * num_workers
    batches = make_batches(num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.5))

    print(f"{num_workers} workers in turn, on {mesh.size} {jax.default_backend()} devices")
    updates = np.arange(num_updates).reshape(-1, num_workers)
    lengths = [num_workers] * NUM_ROUNDS
    params, losses = train_in_rounds(optimizer, num_workers, mesh, batches, updates, lengths)
    expected, _ = train_one_by_one(optimizer, num_workers - 1, batches)
    print(f"  loss {losses[:num_workers].mean():.3f} -> {losses[-num_workers:].mean():.3f}")
    print(f"  from one update after another: {difference(params, expected):.1e}")

    print("the same workers, who push when they like")
    trace = asgd_jax.delays.simulate_workers(num_workers, num_updates, "random")
    blocks = asgd_jax.delays.rounds_of(trace)
    print(f"  {blocks.lengths.size} rounds of {blocks.mean_length:.1f} updates on average")
    updates = blocks.updates(mesh.size)
    params, losses = train_in_rounds(optimizer, blocks, mesh, batches, updates, blocks.lengths)
    expected, _ = train_one_by_one(optimizer, asgd_jax.delays.from_trace(trace), batches)
    print(f"  loss {losses[:num_workers].mean():.3f} -> {losses[-num_workers:].mean():.3f}")
    print(f"  from one update after another: {difference(params, expected):.1e}")


if __name__ == "__main__":
    main()
