# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Is my learning rate stable under delay?
#
# A learning rate that works in synchronous training can leave the minimum once gradients are old.
# Three numbers decide: the *sharpness* of the minimum (the largest eigenvalue of the Hessian),
# the *delay* in updates, and the optimizer. Here we measure the first on a small network, compute
# the largest stable rate for several optimizers, and then check the prediction by training on
# both sides of it.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import asgd_jax
from asgd_jax import curvature, delays, stability

x, y = load_digits(return_X_y=True)
batch = jnp.asarray(x[:300] / 8 - 1, jnp.float32), jax.nn.one_hot(y[:300], 10)


def loss(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
    errors = hidden @ params["w2"] + params["b2"] - targets
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return jnp.mean(jnp.sum(errors**2, axis=-1)) / 2 + 1e-3 * penalty


first, second = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.random.normal(first, (64, 16)) / 8,
    "b1": jnp.zeros(16),
    "w2": jax.random.normal(second, (16, 10)) / 4,
    "b2": jnp.zeros(10),
}

# %% [markdown]
# ## 1. A minimum, and how sharp it is
#
# Any way to the minimum will do. L-BFGS is quick on a network of this size. In a training run you
# would take the parameters of a checkpoint.

# %%
lbfgs = optax.lbfgs()
value_and_grad = optax.value_and_grad_from_state(lambda params: loss(params, batch))


def descend(carry, _):
    params, state = carry
    value, grads = value_and_grad(params, state=state)
    updates, state = lbfgs.update(
        grads, state, params, value=value, grad=grads, value_fn=lambda params: loss(params, batch)
    )
    return (optax.apply_updates(params, updates), state), value


run = jax.jit(lambda params: jax.lax.scan(descend, (params, lbfgs.init(params)), length=600))
(minimum, _), losses = run(params)
found = curvature.sharpness(loss, minimum, [batch])
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, sharpness {found.value:.2f}")
assert losses[-1] < 0.05
assert 10 < found.value < 30

# %% [markdown]
# ## 2. The largest stable rate
#
# Without delay gradient descent stays where the sharpness is below 2 / rate. With a delay of 8
# the edge is eleven times lower, and momentum lowers it further. For plain momentum there is a
# formula; any other optax optimizer is linearised as it is implemented.

# %%
DELAY = 8
sharpness = found.value
rates = {
    "no delay": stability.max_learning_rate(0, sharpness=sharpness),
    "delay 8": stability.max_learning_rate(DELAY, sharpness=sharpness),
    "delay 8, uniform on 1..15": stability.max_learning_rate(
        delays.uniform(1, 15), sharpness=sharpness, criterion="mean_square"
    ),
    "delay 8, momentum 0.9": stability.max_learning_rate(
        DELAY, sharpness=sharpness, momentum=0.9, dampening=False
    ),
    "delay 8, Nesterov 0.9": stability.optimizer_max_learning_rate(
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), DELAY, sharpness=sharpness
    ),
}
for name, rate in rates.items():
    print(f"{name:27} {rate:.6f}")

np.testing.assert_allclose(rates["no delay"], 2 / sharpness)
np.testing.assert_allclose(rates["delay 8"], 0.1845367 / sharpness, rtol=1e-6)
np.testing.assert_allclose(rates["delay 8, momentum 0.9"], 0.0139420 / sharpness, rtol=1e-5)

# %% [markdown]
# ## 3. On both sides of the edge
#
# We start a little off the minimum, along the sharp direction, and follow the component of the
# parameters along it for rates 5 % below and above the edge. In the other directions the network
# may drift: they are flat, and any of these rates is stable there.

# %%
start = jax.tree.map(lambda leaf, sharp: leaf + 1e-3 * sharp, minimum, found.vector)


@jax.jit
def distances(rate):
    tx = asgd_jax.delayed(optax.inject_hyperparams(optax.sgd)(rate), DELAY)

    def step(carry, _):
        params, state = carry
        _, grads = asgd_jax.value_and_grad(loss, state, params, batch)
        updates, state = tx.update(grads, state, params)
        moved = jax.tree.map(jnp.subtract, params, minimum)
        return (optax.apply_updates(params, updates), state), optax.tree.vdot(found.vector, moved)

    return jax.lax.scan(step, (start, tx.init(start)), length=540)[1]


growth = {}
for share in (0.95, 1.05):
    rate = share * rates["delay 8"]
    along = np.abs(np.asarray(distances(rate)))
    peaks = along.reshape(-1, 60).max(axis=1)  # of an oscillation of 34 updates
    growth[share] = np.polyfit(60 * np.arange(1, 9), np.log(peaks[1:]), 1)[0]
    predicted = np.log(stability.spectral_radius(DELAY, step=rate * sharpness))
    print(f"{share:.2f} of the edge: {growth[share]:+.5f} an update, predicted {predicted:+.5f}")
    np.testing.assert_allclose(growth[share], predicted, rtol=0.25)

assert growth[0.95] < 0 < growth[1.05]

# %% [markdown]
# Close to the edge it takes hundreds of updates to see which side one is on:
# `stability.growth_time` says how many. A run that "looks stable" after one epoch may not be.

# %%
steps = stability.growth_time(DELAY, step=1.05 * rates["delay 8"] * sharpness)
print(f"5 % above the edge the distance grows e-fold in {steps:.0f} updates")
np.testing.assert_allclose(1 / growth[1.05], steps, rtol=0.25)

# %% [markdown]
# ## 4. What to do with a rate that worked without delay
#
# `rescale_learning_rate` keeps the same minima stable (`exact`), or divides by the delay as the
# paper does (`inverse`, its eq. 8).

# %%
exact = stability.rescale_learning_rate(0.1, DELAY, rule="exact")
inverse = stability.rescale_learning_rate(0.1, DELAY, rule="inverse")
print(f"0.1 without delay is {exact:.5f} (exact) or {inverse:.5f} (inverse) with a delay of 8")
np.testing.assert_allclose(exact, 0.1 * 0.1845367 / 2, rtol=1e-6)
np.testing.assert_allclose(inverse, 0.1 / 8)
