"""Delayed gradients in an Equinox loop, and what differs from the synchronous one.

    python examples/equinox_loop.py

trains a small network on scikit-learn's digits, without and with a delay of 8 updates, and prints
the lines that differ. A model is its own parameters here, so no adapter is needed: `stale_params`
returns a model that can be called.
"""

import difflib
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import asgd_jax

NUM_UPDATES, BATCH = 300, 64


def make_model():
    return eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def make_batches():
    x, y = load_digits(return_X_y=True)
    picks = np.random.default_rng(0).integers(len(x), size=(NUM_UPDATES, BATCH))
    return (x[picks] / 8 - 1).astype(np.float32), y[picks].astype(np.int32)


def train(batches):
    model = make_model()
    tx = optax.sgd(0.05)
    state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for batch in zip(*batches, strict=True):
        model, state, loss = step(model, state, batch)
        losses.append(loss)
    return eqx.filter(model, eqx.is_array), jnp.stack(losses)


def train_delayed(batches, delay):
    model = make_model()
    tx = asgd_jax.delayed(optax.sgd(0.05), delay)
    state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, batch):
        stale = asgd_jax.stale_params(state, model)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(stale, batch)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for batch in zip(*batches, strict=True):
        model, state, loss = step(model, state, batch)
        losses.append(loss)
    return eqx.filter(model, eqx.is_array), jnp.stack(losses)


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
