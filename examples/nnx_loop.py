"""Delayed gradients in a Flax NNX loop, and what differs from the synchronous one.

    python examples/nnx_loop.py

trains a small network with BatchNorm and dropout on scikit-learn's digits, without and with a delay
of 8 updates, and prints the lines that differ.
"""

import difflib
import inspect

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import asgd_jax
from asgd_jax.flax import stale_model

NUM_UPDATES, BATCH = 300, 64


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def make_batches():
    x, y = load_digits(return_X_y=True)
    picks = np.random.default_rng(0).integers(len(x), size=(NUM_UPDATES, BATCH))
    return (x[picks] / 8 - 1).astype(np.float32), y[picks].astype(np.int32)


def train(batches):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, batch) for batch in zip(*batches, strict=True)]
    return nnx.state(model, nnx.Param), jnp.stack(losses)


def train_delayed(batches, delay):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, asgd_jax.delayed(optax.sgd(0.05), delay), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(stale_model(optimizer, model), batch)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, batch) for batch in zip(*batches, strict=True)]
    return nnx.state(model, nnx.Param), jnp.stack(losses)


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
