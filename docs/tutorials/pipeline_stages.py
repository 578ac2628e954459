# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A pipeline-parallel transformer, with a delay by stage
#
# In an asynchronous pipeline nobody waits: while a micro-batch is on its way through the later
# stages and back, the earlier ones make updates from the micro-batches before it. Of S stages the
# first works with weights that are S - 1 updates old, the last with fresh ones. Here a
# transformer of six stages is trained with just these delays, and the largest stable rate is
# predicted from its curvature.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import asgd_jax
from asgd_jax import curvature, delays, stability

NUM_BLOCKS, WIDTH, LENGTH = 4, 16, 12
TEXT = (
    "a gradient is old when the parameters have moved on since it was asked for. an old gradient "
    "still points downhill, if not too many steps were made and if the steps were small enough. "
    "how small is small enough is what the curvature says, and where in the network it lies."
)
LETTERS = sorted(set(TEXT))
codes = np.array([LETTERS.index(letter) for letter in TEXT])
windows = np.lib.stride_tricks.sliding_window_view(codes, LENGTH + 1)[::4].astype(np.int32)
batch = jnp.asarray(windows)

# %% [markdown]
# ## The network
#
# An embedding, four blocks, a head: six stages. The key of a leaf's first path entry says which.


# %%
def init_params(key):
    def matrix(*shape):
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) / np.sqrt(shape[0])

    def block():
        return {
            "attention": {name: matrix(WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
            "hidden": matrix(WIDTH, 4 * WIDTH),
            "back": matrix(4 * WIDTH, WIDTH),
        }

    return {
        "embed": {"token": matrix(len(LETTERS), WIDTH), "place": matrix(LENGTH, WIDTH)},
        **{f"block{index}": block() for index in range(NUM_BLOCKS)},
        "head": matrix(WIDTH, len(LETTERS)),
    }


def normalise(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def apply_block(weights, x):
    attention, seen = weights["attention"], normalise(x)
    scores = (seen @ attention["query"]) @ jnp.swapaxes(seen @ attention["key"], -1, -2)
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    shares = jax.nn.softmax(jnp.where(causal, scores / np.sqrt(WIDTH), -1e9))
    x = x + shares @ (seen @ attention["value"]) @ attention["out"]
    return x + jax.nn.gelu(normalise(x) @ weights["hidden"]) @ weights["back"]


def loss(params, batch):
    x = params["embed"]["token"][batch[:, :-1]] + params["embed"]["place"]
    for index in range(NUM_BLOCKS):
        x = apply_block(params[f"block{index}"], x)
    logits = normalise(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


# %% [markdown]
# ## The delays
#
# `delays.pipeline` knows the schedule, `delays.by_stage` lays it over the leaves. The history
# keeps of every leaf only as many versions as its stage needs.

# %%
STAGES = ["embed", *(f"block{index}" for index in range(NUM_BLOCKS)), "head"]
profile = delays.pipeline(len(STAGES))
params = init_params(jax.random.key(0))
ages = delays.by_stage(params, lambda path: STAGES.index(path[0].key), profile)
print(dict(zip(STAGES, profile, strict=True)))
assert profile == (5, 4, 3, 2, 1, 0)


def num_kept(delay):
    state = asgd_jax.delayed(optax.sgd(0.1), delay).init(params)
    return sum(leaf.size for leaf in jax.tree.leaves((state.history, state.stale)))


sizes = [sum(leaf.size for leaf in jax.tree.leaves(params[stage])) for stage in STAGES]
print(f"{sum(sizes)} parameters; history {num_kept(ages)}, were all 5 updates old {num_kept(5)}")
expected = sum(size * (age + 1) for size, age in zip(sizes, profile, strict=True) if age)
assert num_kept(ages) == expected < num_kept(5) == 6 * sum(sizes)


# %% [markdown]
# ## Training
#
# The loop is that of any delay; the gradient is that of the whole loss at the mixed point.


# %%
def train(tx, params, num_updates):
    def update(carry, _):
        params, state = carry
        value, grads = asgd_jax.value_and_grad(loss, state, params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(update, carry, length=num_updates))
    (params, _), losses = run((params, tx.init(params)))
    return params, np.asarray(losses)


trained, losses = train(asgd_jax.delayed(optax.adam(3e-3), ages), params, 300)
print(f"Adam through the pipeline: {losses[0]:.2f} -> {losses[-1]:.2f} nats")
assert losses[-1] < 0.6 * losses[0]

# %% [markdown]
# ## Which rate is stable from here on?
#
# The threshold follows from how the sharp directions lie in the stages. Neither the largest delay
# nor the mean one gives it.

# %%
top = curvature.eigenpairs(loss, trained, [batch], k=6)
sharpness = float(top.values[0])
edge = stability.stages_max_learning_rate(top, ages)
guesses = {
    "all as the oldest stage": stability.max_learning_rate(max(profile), sharpness=sharpness),
    "all at the mean of 2.5": stability.max_learning_rate(3, sharpness=sharpness),
    "no delay": stability.max_learning_rate(0, sharpness=sharpness),
}
print(f"sharpness {sharpness:.1f}; largest stable rate {edge:.4f}")
for name, guess in guesses.items():
    print(f"  {name:24} {guess:.4f}, {guess / edge:.2f} times that")
assert guesses["all as the oldest stage"] < edge < guesses["no delay"]

# %% [markdown]
# SGD from there, on both sides of the edge. Below it the loss falls at every update. Above it the
# sharp directions swing up until the loss rises at every other update; the network then moves on to
# where it is flatter, as it does at the edge of stability without delay.

# %%
rises = {}
for share in (0.7, 1.5):
    _, losses = train(asgd_jax.delayed(optax.sgd(share * edge), ages), trained, 400)
    rises[share] = int((np.diff(losses) > 0).sum())
    print(f"{share} of the edge: {losses[0]:.3f} -> {losses[-1]:.3f}, {rises[share]} rises")
assert rises[0.7] == 0
assert rises[1.5] > 20
