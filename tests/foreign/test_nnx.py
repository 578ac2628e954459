"""Flax NNX: `nnx.Optimizer` around `delayed`, plain, jitted, scanned and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from held import Held
from jax.sharding import PartitionSpec as P

import asgd_jax

DELAY, NUM_STEPS = 3, 8
INNER = {"sgd": lambda: optax.sgd(0.3), "adam": lambda: optax.adam(0.05)}


class Model(nnx.Module):
    """Two layers, and a variable that is no parameter."""

    def __init__(self, rngs, in_features=3, hidden=4, **options):
        self.first = nnx.Linear(in_features, hidden, rngs=rngs, **options)
        self.second = nnx.Linear(hidden, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def loss(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def batches(in_features=3):
    keys = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(keys[0], (NUM_STEPS, 8, in_features)),
        jax.random.normal(keys[1], (NUM_STEPS, 8, 2)),
    )


def train_step(model, optimizer, batch):
    """The documented loop; returns the parameters that the step took its gradient at."""
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    stale = asgd_jax.stale_params(nnx.as_pure(optimizer.opt_state), params)
    worker = nnx.clone(model)
    nnx.update(worker, stale)
    grads = nnx.grad(loss)(worker, batch)
    optimizer.update(model, grads)
    model.calls[...] += 1
    return stale, params


def make(inner="sgd", **options):
    model = Model(nnx.Rngs(0), **options)
    return model, nnx.Optimizer(model, asgd_jax.delayed(INNER[inner](), DELAY), wrt=nnx.Param)


def gradient_of(model, data):
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, step):
        batch = jax.tree.map(lambda leaf: leaf[step], data)
        return jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest), batch))(params)

    return gradient


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("how", ["plain", "jit", "scan"])
def test_stale_parameters_are_what_the_model_held(how, inner):
    model, optimizer = make(inner)
    data, held = batches(), Held(DELAY)
    if how == "scan":
        run = nnx.scan(
            lambda carry, batch: (carry, train_step(*carry, batch)),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )
        _, seen = run((model, optimizer), data)
        held.check_run(*seen)
    else:
        step = nnx.jit(train_step) if how == "jit" else train_step
        for index in range(NUM_STEPS):
            held.check(*step(model, optimizer, jax.tree.map(lambda leaf: leaf[index], data)))
    held.check_trajectory(INNER[inner](), gradient_of(model, data))
    assert int(model.calls[...]) == int(optimizer.step[...]) == NUM_STEPS


def test_a_model_in_the_place_of_its_parameters_is_refused():
    model, optimizer = make()
    for params in (model, nnx.as_pure(nnx.state(model, nnx.Param))):
        with pytest.raises(ValueError, match=r"^\['first'\]\['bias'\].value has .*nnx.as_pure of"):
            asgd_jax.stale_params(optimizer.opt_state, params)


def test_a_state_of_variables_is_as_good_as_its_pure_arrays():
    model, optimizer = make()
    state = nnx.state(model, nnx.Param)
    stale = asgd_jax.stale_params(optimizer.opt_state, state)
    assert isinstance(stale["first"]["bias"], nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, stale, state)


def functional_step(graphdef, state, batch):
    """The split and merge form."""
    model, optimizer = nnx.merge(graphdef, state)
    seen = train_step(model, optimizer, batch)
    return nnx.state((model, optimizer)), seen


def test_split_and_merge_under_plain_jit():
    model, optimizer = make()
    graphdef, state = nnx.split((model, optimizer))
    data, held, step = batches(), Held(DELAY), jax.jit(functional_step, static_argnums=0)
    for index in range(NUM_STEPS):
        state, seen = step(graphdef, state, jax.tree.map(lambda leaf: leaf[index], data))
        held.check(*seen)
    held.check_trajectory(INNER["sgd"](), gradient_of(model, data))


def test_a_delay_that_grows_in_the_middle():
    model, short = make()
    data, held = batches(), Held(lambda update: min(3, update) if update < 5 else update - 2)
    long = nnx.Optimizer(model, asgd_jax.delayed(INNER["sgd"](), 8), wrt=nnx.Param)
    for index in range(NUM_STEPS):
        if index == 5:
            state = asgd_jax.resize_history(nnx.as_pure(short.opt_state), 8)
            nnx.update(long.opt_state, nnx.state(state))
        optimizer = short if index < 5 else long
        held.check(*train_step(model, optimizer, jax.tree.map(lambda leaf: leaf[index], data)))


OPTIONS = {
    "with_partitioning": lambda names: {
        "kernel_init": nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    },
    "out_sharding": lambda names: {"kernel_metadata": {"out_sharding": names}},
    # What nnx.Optimizer takes instead of out_sharding, for its own variables.
    "optimizer_sharding": lambda names: {
        "kernel_metadata": {"out_sharding": (None, None), "optimizer_sharding": names}
    },
}


SIZES = {"in_features": 8, "hidden": 16}


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("how", OPTIONS)
def test_every_slot_has_the_sharding_of_its_parameter(how):
    with jax.set_mesh(mesh()):
        create = lambda: make("adam", **SIZES, **OPTIONS[how](("data", "model")))  # noqa: E731
        _, optimizer = nnx.eval_shape(create)
        specs = nnx.as_pure(nnx.get_partition_spec(nnx.state(optimizer)))["opt_state"]
    assert specs["history"]["slots"]["first"]["kernel"] == P(None, "data", "model")
    assert specs["history"]["slots"]["second"]["kernel"] == P()
    assert specs["stale"]["first"]["kernel"] == P("data", "model")
    assert specs["inner_state"][0]["mu"]["first"]["kernel"] == P("data", "model")


def test_a_sharded_model_made_under_jit():
    """By Flax's recipe: the state is constrained to the specs of its metadata."""

    @nnx.jit
    def create():
        model, optimizer = make(**SIZES, **OPTIONS["out_sharding"](("data", "model")))
        state = nnx.state(optimizer)
        shardings = nnx.get_partition_spec(state)
        nnx.update(optimizer, jax.lax.with_sharding_constraint(state, shardings))
        return model, optimizer

    with jax.set_mesh(mesh()):
        model, optimizer = create()
        data, held, step = batches(8), Held(DELAY), nnx.jit(train_step)
        for index in range(NUM_STEPS):
            held.check(*step(model, optimizer, jax.tree.map(lambda leaf: leaf[index], data)))
        slots = optimizer.opt_state.history.slots["first"]["kernel"]
        assert slots.sharding.shard_shape(slots.shape) == (DELAY, 8 // 4, 16 // 2)
    held.check_trajectory(INNER["sgd"](), gradient_of(make(**SIZES)[0], data))
