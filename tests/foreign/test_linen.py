"""Flax Linen: `TrainState`, on one device and with partitioning metadata on eight."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from held import Held
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import asgd_jax

DELAY, NUM_STEPS, BATCH = 3, 8, 16
RULES = (("embed", "data"), ("mlp", "model"), ("out", None))


class Model(nn.Module):
    """A residual block: fully sharded over `data`, tensor parallel over `model`."""

    wrap: str = "none"

    def names(self, logical, mesh_axes):
        init = nn.initializers.lecun_normal()
        if self.wrap == "none":
            return init
        if self.wrap == "logical":
            return nn.with_logical_partitioning(init, logical)
        return nn.with_partitioning(init, mesh_axes)

    @nn.compact
    def __call__(self, x):
        up = self.names(("embed", "mlp"), ("data", "model"))
        down = self.names(("mlp", "embed"), ("model", "data"))
        x = x + nn.Dense(8, kernel_init=down)(jnp.tanh(nn.Dense(16, kernel_init=up)(x)))
        return nn.Dense(4)(nn.LayerNorm()(x))


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


def create(tx, model):
    params = model.init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss(params, apply_fn, batch):
    x, y = batch
    logits = apply_fn({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch(step):
    random = np.random.default_rng(step)
    return (
        random.normal(size=(BATCH, 8)).astype(np.float32),
        random.integers(4, size=BATCH).astype(np.int32),
    )


def delayed_step(state, batch):
    stale = asgd_jax.stale_params(state.opt_state, state.params)
    grads = jax.grad(loss)(stale, state.apply_fn, batch)
    return state.apply_gradients(grads=grads)


def plain_step(state, batch):
    grads = jax.grad(loss)(state.params, state.apply_fn, batch)
    return state.apply_gradients(grads=grads)


@jax.jit
def gradient(params, batch):
    return jax.grad(loss)(params, Model().apply, batch)


def follow(state, step, put=lambda batch: batch):
    """Runs the loop and compares: with what it held, and with the simulator."""
    held = Held(DELAY)
    for index in range(NUM_STEPS):
        stale = jax.jit(asgd_jax.stale_params)(state.opt_state, state.params)
        held.check(nn.unbox(stale), nn.unbox(state.params))
        state = step(state, put(batch(index)))
    held.check_trajectory(optimizer(), lambda params, step: gradient(params, batch(step)))
    assert int(state.step) == NUM_STEPS


def test_stale_parameters_are_what_the_train_state_held():
    make = functools.partial(create, asgd_jax.delayed(optimizer(), DELAY), Model())
    follow(jax.jit(make)(), jax.jit(delayed_step))


def test_a_train_states_variables_in_the_place_of_its_params_are_refused():
    state = jax.eval_shape(lambda: create(asgd_jax.delayed(optimizer(), DELAY), Model()))
    with pytest.raises(ValueError, match=r"^\['Dense_0'\]\['bias'\] has a history and no place"):
        asgd_jax.stale_params(state.opt_state, {"params": state.params})


def shardings_of(make, wrap):
    """Specs and shardings by Flax's own functions, from the metadata of an abstract state."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = nn.get_partition_spec(jax.eval_shape(make))
    if wrap == "logical":
        return specs, nn.logical_to_mesh_sharding(specs, mesh, RULES)
    return specs, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def compiled_step(step, make, shardings):
    data = NamedSharding(shardings.step.mesh, P("data"))
    jitted = jax.jit(
        step, in_shardings=(shardings, data), out_shardings=shardings, donate_argnums=0
    )
    return jitted.lower(jax.eval_shape(make), batch(0)).compile()


def collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize("wrap", ["mesh axes", "logical"])
def test_every_slot_has_the_sharding_of_its_parameter(wrap):
    make = functools.partial(create, asgd_jax.delayed(optimizer(), DELAY), Model(wrap))
    specs, shardings = shardings_of(make, wrap)
    names = ("embed", "mlp") if wrap == "logical" else ("data", "model")
    assert specs.opt_state.history.slots["Dense_1"]["kernel"] == P(None, *names)
    assert specs.opt_state.history.slots["Dense_2"]["kernel"] == P()
    assert specs.opt_state.stale["Dense_1"]["kernel"] == P(*names)
    slots = shardings.opt_state.history.slots["Dense_1"]["kernel"]
    assert slots.spec == P(None, "data", "model")
    assert slots.shard_shape((DELAY, 8, 16)) == (DELAY, 8 // 4, 16 // 2)


@pytest.mark.optimised
def test_the_delay_of_a_sharded_run_adds_no_communication():
    make = functools.partial(create, asgd_jax.delayed(optimizer(), DELAY), Model("mesh axes"))
    plain = functools.partial(create, optimizer(), Model("mesh axes"))
    _, shardings = shardings_of(make, "mesh axes")
    step = compiled_step(delayed_step, make, shardings)
    plain_shardings = shardings_of(plain, "mesh axes")[1]
    assert collectives(step) == collectives(compiled_step(plain_step, plain, plain_shardings))
    data = NamedSharding(shardings.step.mesh, P("data"))
    state = jax.jit(make, out_shardings=shardings)()
    follow(state, step, lambda batch: jax.device_put(batch, data))
