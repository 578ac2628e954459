"""Delayed gradients in a Haiku loop, and what differs from the synchronous one.

    python examples/haiku_loop.py

trains a small network on scikit-learn's digits, without and with a delay of 8 updates, and prints
the lines that differ.
"""

import difflib
import inspect

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import asgd_jax

NUM_UPDATES, BATCH = 300, 64

network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 10])(x)))


def loss_fn(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()


def make_batches():
    x, y = load_digits(return_X_y=True)
    picks = np.random.default_rng(0).integers(len(x), size=(NUM_UPDATES, BATCH))
    return (x[picks] / 8 - 1).astype(np.float32), y[picks].astype(np.int32)


def train(batches):
    params = network.init(jax.random.key(0), batches[0][0])
    tx = optax.sgd(0.05)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for batch in zip(*batches, strict=True):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return params, jnp.stack(losses)


def train_delayed(batches, delay):
    params = network.init(jax.random.key(0), batches[0][0])
    tx = asgd_jax.delayed(optax.sgd(0.05), delay)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = asgd_jax.value_and_grad(loss_fn, state, params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for batch in zip(*batches, strict=True):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return params, jnp.stack(losses)


def difference():
    """The synchronous loop and the delayed one, as a diff."""
    sources = [inspect.getsource(loop).splitlines() for loop in (train, train_delayed)]
    return "\n".join(difflib.unified_diff(*sources, "synchronous", "delayed", n=0, lineterm=""))


def main():
    batches = make_batches()
    print(difference(), end="\n\n")
    for name, losses in (
        ("synchronous", train(batches)[1]),
        ("delay 8", train_delayed(batches, 8)[1]),
    ):
        print(f"{name:12} loss {losses[:10].mean():.3f} -> {losses[-10:].mean():.3f}")


if __name__ == "__main__":
    main()
