# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Delayed gradients in Flax NNX, Equinox and Haiku
#
# What changes in a training loop when its gradients are to be old? Two things: the optimizer is
# wrapped in `delayed`, and the gradient is taken where `stale_params` says. Each of the three
# programs under `examples/` has the synchronous loop and the delayed one, complete; below are the
# lines that differ, and what both arrive at.

# %%
import runpy
from pathlib import Path

import jax
import numpy as np

# The checkout's examples, wherever in it this runs.
here = Path.cwd()
root = next(folder for folder in (here, *here.parents) if (folder / "examples").is_dir())


def load(name):
    return runpy.run_path(str(root / "examples" / f"{name}_loop.py"))


def compare(loop, delay=8):
    """Trains without and with delay, and returns the last losses."""
    batches = loop["make_batches"]()
    last = {}
    for name, (_, losses) in {
        "synchronous": loop["train"](batches),
        f"delay {delay}": loop["train_delayed"](batches, delay),
    }.items():
        last[name] = float(losses[-10:].mean())
        print(f"{name:12} loss {losses[:10].mean():.3f} -> {last[name]:.3f}")
        assert last[name] < 0.6 < 2.0 < losses[:3].mean()
    return last


# %% [markdown]
# ## Flax NNX
#
# An NNX model holds its parameters, so the worker needs a copy with the stale ones:
# `asgd_jax.flax.stale_model`. Only the parameters are the copy's own. BatchNorm's running
# averages and the dropout's counter are the live model's, and go on as they would.

# %%
nnx_loop = load("nnx")
print(nnx_loop["difference"]())

# %%
nnx_losses = compare(nnx_loop)

# %% [markdown]
# ## Equinox
#
# A model is a pytree of its parameters. `stale_params` takes the whole model, and returns one
# that can be called; leaves that are no arrays are handed through.

# %%
equinox_loop = load("equinox")
print(equinox_loop["difference"]())

# %%
equinox_losses = compare(equinox_loop)

# %% [markdown]
# ## Haiku
#
# Parameters are nested dicts and the loss is a function of them, so `asgd_jax.value_and_grad`
# replaces `jax.value_and_grad`. Plain JAX and Flax Linen look the same; for Linen's `TrainState`
# there is `asgd_jax.flax.DelayedTrainState`.

# %%
haiku_loop = load("haiku")
print(haiku_loop["difference"]())

# %%
haiku_losses = compare(haiku_loop)

# %% [markdown]
# ## With a delay of 0
#
# `delayed(optimizer, 0)` keeps no history and is the optimizer itself, so one loop serves both.

# %%
for name, loop in {"NNX": nnx_loop, "Equinox": equinox_loop, "Haiku": haiku_loop}.items():
    batches = jax.tree.map(lambda leaf: leaf[:20], loop["make_batches"]())
    ends = loop["train"](batches)[0], loop["train_delayed"](batches, 0)[0]
    leaves = zip(*map(jax.tree.leaves, ends), strict=True)
    apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in leaves)
    print(f"{name:8} {apart:.1e} apart after 20 updates")
    assert apart < 1e-6
