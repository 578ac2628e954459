# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Actors and a learner: policy lag is a delay
#
# Eight actors play episodes with the policy they pulled last, compute a policy gradient on them,
# and push it. The learner applies it at once. By then seven other pushes have changed the policy:
# the gradient is seven updates old, and what is known of delayed SGD holds for the *return*.
#
# The environment is a noisy linear system, for which the expected cost, its minimum and its
# curvature have closed forms. The loop below knows nothing of them; they only check it.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import asgd_jax
from asgd_jax import delays, stability

HORIZON, EPISODES, NOISE = 10, 2048, 0.3
NUM_ACTORS = 8
LAG = NUM_ACTORS - 1


def play(gain, key):
    """Episodes of the policy a ~ Normal(-gain s, NOISE^2) in s' = s + a, of cost s^2 + a^2."""
    start_key, noise_key = jax.random.split(key)
    start = jax.random.normal(start_key, (EPISODES,))

    def step(position, noise):
        action = -gain * position + NOISE * noise
        return position + action, (position, action, position**2 + action**2)

    noise = jax.random.normal(noise_key, (HORIZON, EPISODES))
    return jax.lax.scan(step, start, noise)[1]


def policy_loss(gain, episodes, behaviour=None):
    """REINFORCE with the mean as its baseline: its gradient estimates that of the expected cost.

    With `behaviour`, the gain that played the episodes, every action has an importance weight.
    """
    positions, actions, costs = episodes
    log_probability = -((actions + gain * positions) ** 2) / (2 * NOISE**2)
    weights = jnp.ones_like(costs)
    if behaviour is not None:  # how much likelier the episode so far is under the live policy
        then = -((actions + behaviour * positions) ** 2) / (2 * NOISE**2)
        weights = jnp.exp(jnp.cumsum(jax.lax.stop_gradient(log_probability) - then, axis=0))
    to_go = jnp.cumsum((weights * costs)[::-1], axis=0)[::-1]
    advantage = to_go - weights * to_go.mean(axis=1, keepdims=True)
    return jnp.mean(jnp.sum(log_probability * advantage, axis=0)) / HORIZON


# %% [markdown]
# ## The closed form that checks the loop


# %%
def expected_cost(gain):
    variance, total = 1.0, 0.0
    for _ in range(HORIZON):
        total += variance + gain**2 * variance + NOISE**2
        variance = (1 - gain) ** 2 * variance + NOISE**2
    return total / HORIZON


best = jnp.float32(0.6)
for _ in range(20):  # Newton
    best = best - jax.grad(expected_cost)(best) / jax.grad(jax.grad(expected_cost))(best)
sharpness = float(jax.grad(jax.grad(expected_cost))(best))
edge = stability.max_learning_rate(LAG, sharpness=sharpness)
print(f"best gain {best:.3f}, cost {expected_cost(best):.3f}, curvature {sharpness:.3f}")
print(f"largest stable rate: {2 / sharpness:.3f} without lag, {edge:.3f} with a lag of {LAG}")
np.testing.assert_allclose(edge * sharpness, 2 * np.sin(np.pi / 30), rtol=1e-6)

# %% [markdown]
# ## The loop
#
# `stale_params` is what the actor pulled: it plays *and* differentiates there, as in A3C. Nothing
# else differs from the synchronous loop.

# %%
NUM_UPDATES = 400
keys = jax.random.split(jax.random.key(0), NUM_UPDATES)


def train(rate, lag, start=0.7):
    """The gain at every update."""
    tx = asgd_jax.delayed(optax.sgd(rate), lag)

    def update(carry, key):
        gain, state = carry
        pulled = asgd_jax.stale_params(state, gain)
        grads = jax.grad(policy_loss)(pulled, play(pulled, key))
        updates, state = tx.update(grads, state, gain)
        return (optax.apply_updates(gain, updates), state), gain

    start = jnp.float32(start)
    return np.asarray(jax.lax.scan(update, (start, tx.init(start)), keys)[1])


def wobble(gains):
    """How far from the best gain the last third of a run is, at most; infinite if it diverged."""
    distances = np.abs(gains[-NUM_UPDATES // 3 :] - float(best))
    return float(np.nan_to_num(distances, nan=np.inf).max())


runs = {
    "no lag, twice the edge": train(2 * edge, 0),
    "lag 7, 0.7 of the edge": train(0.7 * edge, LAG),
    "lag 7, 1.3 of the edge": train(1.3 * edge, LAG),
}
for name, gains in runs.items():
    print(
        f"{name:24} from {abs(gains[0] - float(best)):.2f} to {wobble(gains):.3f} off the best gain"
    )
assert wobble(runs["no lag, twice the edge"]) < 0.1
assert wobble(runs["lag 7, 0.7 of the edge"]) < 0.1
assert wobble(runs["lag 7, 1.3 of the edge"]) > 0.2

# %% [markdown]
# The policy that learns without lag at twice the edge is lost with lag at 1.3 times it: the very
# episodes, an older policy.
#
# ## Correcting the data is another thing
#
# An off-policy learner takes its gradient at the *live* policy, on episodes of an old one, with
# importance weights. Then only the data is old and not the point of the gradient: the delay is gone
# from the mean dynamics, at the price of variance. The history is the same, only the gradient's
# point differs.


# %%
def train_off_policy(rate, lag, start=0.7):
    tx = asgd_jax.delayed(optax.sgd(rate), lag)

    def update(carry, key):
        gain, state = carry
        behaviour = asgd_jax.stale_params(state, gain)
        grads = jax.grad(policy_loss)(gain, play(behaviour, key), behaviour)
        updates, state = tx.update(grads, state, gain)
        return (optax.apply_updates(gain, updates), state), gain

    start = jnp.float32(start)
    return np.asarray(jax.lax.scan(update, (start, tx.init(start)), keys)[1])


off_policy = wobble(train_off_policy(1.3 * edge, LAG))
print(f"off-policy, 1.3 of the edge: {off_policy:.3f} off the best gain")
assert off_policy < 0.1

# %% [markdown]
# ## Actors that push when they are done
#
# With episodes of random length the lag is random. Actors in random order have a lag of seven on
# average and sometimes of thirty; a recorded trace of a real run can be replayed in the same way.

# %%
trace = delays.simulate_workers(NUM_ACTORS, NUM_UPDATES, "random", seed=0)
print(f"lag {trace.mean():.1f} on average, {trace.max()} at most")
gains = train(0.5 * edge, delays.from_trace(trace))
print(f"random lag, half the edge: {wobble(gains):.3f} off the best gain")
assert 4 < trace.mean() < 8 < trace.max()
assert wobble(gains) < 0.1
