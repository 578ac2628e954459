"""What the tests of rounds train, and the parameter server that says what they must give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from parameter_server import simulate

import asgd_jax

NUM_UPDATES = 200
# A leaf that 8 devices divide along its second axis, one along its first, one not at all.
PARAMS = {
    "first": jnp.linspace(-1, 1, 6 * 16).reshape(6, 16),
    "second": jnp.linspace(1, -1, 16 * 3).reshape(16, 3),
    "bias": jnp.array([0.3, -0.2, 0.1]),
}
_RANDOM = np.random.default_rng(3)
DATA = tuple(_RANDOM.normal(size=(NUM_UPDATES, 4, width)).astype(np.float32) for width in (6, 3))


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((jnp.tanh(hidden @ params["second"] + params["bias"]) - y) ** 2)


def gradient(params, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    return grads, value


one_gradient = jax.jit(gradient)


def toward_live(strength):
    """A compensation like DC-ASGD's: g + strength g g (x - stale x), and less of it when staler."""

    def update(updates, state, params=None, *, staleness, stale_params, **extra_args):
        gain = 1 / (1 + 0.1 * staleness.astype(jnp.float32))
        compensated = jax.tree.map(
            lambda g, live, stale: gain * (g + strength * g * g * (live - stale)),
            updates,
            params,
            stale_params,
        )
        return compensated, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


CASES = {
    "sgd with a schedule": lambda delay: optax.sgd(optax.cosine_decay_schedule(0.1, 150)),
    "momentum": lambda delay: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda delay: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adamw": lambda delay: optax.adamw(0.003, weight_decay=0.1),
    "clip and decay": lambda delay: optax.chain(
        optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.01), optax.sgd(0.05, 0.9)
    ),
    "shifted": lambda delay: asgd_jax.shifted_sgd(0.05, 0.9, delay),
    "compensated": lambda delay: optax.chain(toward_live(2.0), optax.sgd(0.05)),
}


def mesh_of(num_devices):
    if num_devices is None:
        return None
    return Mesh(np.array(jax.devices()[:num_devices]), ("workers",))


def train(engine, updates, lengths, params=PARAMS):
    """All rounds in one program; `updates[r]` are the batches of round r, `lengths[r]` count."""

    @jax.jit
    def run(state):
        def body(state, here):
            return engine.round(gradient, state, tuple(jnp.asarray(leaf)[here] for leaf in DATA))

        return jax.lax.scan(body, state, jnp.asarray(updates))

    state, losses = run(engine.init(params))
    return state, np.concatenate(
        [row[:length] for row, length in zip(np.asarray(losses), lengths, strict=True)]
    )


def serve(inner, staleness):
    """Trajectory and losses of the parameter server in plain Python."""
    losses = []

    def one(params, step):
        grads, value = one_gradient(params, tuple(leaf[step] for leaf in DATA))
        losses.append(value)
        return grads

    tell = isinstance(inner, optax.GradientTransformationExtraArgs)
    return simulate(inner, staleness, PARAMS, one, tell=tell), np.array(losses)


def assert_close(tree, other, tolerance=3e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
        ),
        tree,
        other,
    )
