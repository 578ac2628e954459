"""Rounds of many workers against the parameter server that makes one update after another."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parameter_server import simulate
from round_problem import (
    CASES,
    DATA,
    NUM_UPDATES,
    PARAMS,
    assert_close,
    gradient,
    mesh_of,
    one_gradient,
    serve,
    train,
)

import asgd_jax
from asgd_jax import delays
from asgd_jax.transforms.worker_axis import WorkerLayout

pytestmark = pytest.mark.standard_promotion  # optax.adamw


@pytest.mark.parametrize(
    ("name", "num_workers", "num_devices"),
    [
        ("sgd with a schedule", 2, 2),
        ("momentum", 5, None),
        ("nesterov", 8, 1),
        ("adamw", 8, 8),
        ("clip and decay", 8, 4),
        ("shifted", 8, 2),
        ("compensated", 8, 8),
    ],
)
@pytest.mark.optimised
def test_rounds_are_the_server_s_updates(name, num_workers, num_devices):
    inner = CASES[name](num_workers - 1)
    engine = asgd_jax.rounds(inner, num_workers, mesh=mesh_of(num_devices))
    updates = np.arange(NUM_UPDATES).reshape(-1, num_workers)
    state, losses = train(engine, updates, [num_workers] * len(updates))
    versions, expected = serve(inner, np.minimum(np.arange(NUM_UPDATES), num_workers - 1))
    assert int(state.count) == NUM_UPDATES // num_workers
    assert_close(state.params, versions[-1])
    pulled = jax.tree.map(lambda *leaves: np.stack(leaves), *versions[-num_workers:])
    assert_close(state.pulled, pulled)
    assert_close(losses, expected)
    assert np.abs(versions[-1]["first"] - PARAMS["first"]).max() > 0.1


TRACES = {
    "uniform": np.random.default_rng(0).integers(1, 13, NUM_UPDATES),
    "random workers": delays.simulate_workers(8, NUM_UPDATES, "random"),
    "normal workers": delays.simulate_workers(8, NUM_UPDATES, "normal"),
    # Half of the run: the trace then repeats, and its ramp is no ramp the second time.
    "zeros": np.random.default_rng(1).integers(0, 4, NUM_UPDATES // 2),
}


@pytest.mark.parametrize(
    ("name", "trace", "num_devices", "longest"),
    [
        ("compensated", "uniform", 4, None),
        ("clip and decay", "random workers", 8, 8),
        ("shifted", "normal workers", 2, None),
        ("adamw", "zeros", None, None),
    ],
)
def test_rounds_of_a_recorded_schedule(name, trace, num_devices, longest):
    trace = TRACES[trace]
    blocks = delays.rounds_of(trace, longest)
    inner = CASES[name](delays.from_trace(trace))
    engine = asgd_jax.rounds(inner, blocks, mesh=mesh_of(num_devices))
    passes = NUM_UPDATES // trace.size
    here = blocks.updates(num_devices or 1)
    updates = np.concatenate([here + trace.size * number for number in range(passes)])
    state, losses = train(engine, updates, np.tile(blocks.lengths, passes))
    staleness = np.minimum(np.resize(trace, NUM_UPDATES), np.arange(NUM_UPDATES))
    versions, expected = serve(inner, staleness)
    assert_close(state.params, versions[-1])
    assert_close(losses, expected)


@pytest.mark.parametrize(("delay", "num_devices"), [(3, 2), (1, 8)])
def test_groups_average_their_gradients(delay, num_devices):
    num_workers, inner = 8, CASES["clip and decay"](delay)
    engine = asgd_jax.rounds(inner, num_workers, delay=delay, mesh=mesh_of(num_devices))
    updates = np.arange(NUM_UPDATES).reshape(-1, num_workers)
    state, losses = train(engine, updates, [num_workers] * len(updates))
    size, expected = num_workers // (delay + 1), []

    def mean_gradient(params, step):
        batches = range(step * size, (step + 1) * size)
        pairs = [one_gradient(params, tuple(leaf[at] for leaf in DATA)) for at in batches]
        expected.extend(value for _, value in pairs)
        return jax.tree.map(lambda *each: sum(each) / size, *(grads for grads, _ in pairs))

    staleness = np.minimum(np.arange(NUM_UPDATES // size), delay)
    assert_close(state.params, simulate(inner, staleness, PARAMS, mean_gradient)[-1])
    assert_close(losses, np.array(expected))


def test_workers_of_a_device_at_once_or_in_turn_are_the_same(monkeypatch):
    """Accelerators take them as one batch, a CPU one after another."""
    made = []
    for in_turn in (True, False):
        monkeypatch.setattr(WorkerLayout, "in_turn", in_turn)
        engine = asgd_jax.rounds(optax.sgd(0.1), 4, delay=1)
        batches = tuple(leaf[:4] for leaf in DATA)
        state, losses = engine.round(gradient, engine.init(PARAMS), batches)
        made.append((state, losses))
    assert_close(*made)


def test_workers_get_predicted_parameters():
    """x - n eta m v, by hand, n the staleness of the gradient that the worker will push."""
    num_workers, rate, momentum = 4, 0.02, 0.9

    def predict(params, inner_state, staleness):
        ahead = rate * momentum * staleness.astype(jnp.float32)
        return jax.tree.map(lambda x, v: x - ahead * v, params, inner_state[0].trace)

    engine = asgd_jax.rounds(optax.sgd(rate, momentum), num_workers, predict=predict)
    updates = np.arange(40).reshape(-1, num_workers)
    state, losses = train(engine, updates, [num_workers] * len(updates))

    params, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    workers, expected = [PARAMS] * num_workers, []
    for step in range(40):
        grads, value = one_gradient(workers[step % num_workers], tuple(x[step] for x in DATA))
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        params = jax.tree.map(lambda x, v: x - rate * v, params, velocity)
        ahead = rate * momentum * (num_workers - 1)
        workers[step % num_workers] = jax.tree.map(lambda x, v: x - ahead * v, params, velocity)
        expected.append(value)
    assert_close(losses, np.array(expected))
    assert_close(state.params, params)


def test_parameters_that_are_divided_themselves():
    mesh = jax.make_mesh((4, 2), ("workers", "model"))  # of explicit axes
    specs = {"first": PartitionSpec(None, "model"), "second": PartitionSpec("model"),
             "bias": PartitionSpec()}  # fmt: skip
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    params = jax.tree.map(place, PARAMS, specs)
    inner = CASES["clip and decay"](3)
    engine = asgd_jax.rounds(inner, 4, mesh=mesh, specs=specs)
    updates = np.arange(NUM_UPDATES).reshape(-1, 4)
    state, _ = train(engine, updates, [4] * len(updates), params)
    versions, _ = serve(inner, np.minimum(np.arange(NUM_UPDATES), 3))
    assert_close(state.params, versions[-1])
    assert state.pulled["first"].sharding.spec == PartitionSpec("workers", None, "model")
    assert {shard.data.shape for shard in state.params["second"].addressable_shards} == {(8, 3)}
    with pytest.raises(ValueError, match=r"params\['first'\] is divided .* pass specs="):
        asgd_jax.rounds(inner, 4, mesh=mesh).init(params)


def test_training_donates_nothing_of_the_user_s():
    engine = asgd_jax.rounds(optax.sgd(0.1), 2)
    params = jnp.ones(3)
    state = engine.init(params)
    step = jax.jit(engine.round, static_argnums=0, donate_argnums=1)
    for _ in range(2):
        state, _ = step(lambda x, batch: (x * batch, None), state, jnp.ones(2))
    assert not params.is_deleted()
    mesh = mesh_of(2)
    placed = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("workers")))
    state = asgd_jax.rounds(optax.sgd(0.1), 2, mesh=mesh).init(placed)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    assert not placed.is_deleted()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: asgd_jax.rounds(optax.sgd(1.0), 0), "num_workers must be >= 1, got 0"),
        (lambda: asgd_jax.rounds(optax.sgd(1.0), 2.5), "num_workers must be an integer"),
        (lambda: asgd_jax.rounds(optax.sgd(1.0), 8, delay=2), "delay=2 does not fit num_workers=8"),
        (
            lambda: asgd_jax.rounds(optax.sgd(1.0), 9, mesh=mesh_of(8)),
            "num_workers=9 cannot be divided over the 8 devices",
        ),
        (
            lambda: asgd_jax.rounds(optax.sgd(1.0), 8, mesh=mesh_of(8), axis="batch"),
            "axis='batch' is none of the mesh's axes",
        ),
        (
            lambda: asgd_jax.rounds(
                optax.sgd(1.0), 8, mesh=mesh_of(8), specs=PartitionSpec("workers")
            ),
            "every worker needs them whole",
        ),
        (
            lambda: asgd_jax.rounds(optax.sgd(1.0), delays.rounds_of([0, 1]), delay=1),
            "predict= and delay= are for a number of workers",
        ),
        (lambda: asgd_jax.rounds(optax.sgd(1.0), 2).init(None), "params holds no arrays, got None"),
        (
            lambda: asgd_jax.rounds(asgd_jax.delayed(optax.sgd(1.0), 1), 2).init(PARAMS),
            "give it the optimizer that is inside delayed",
        ),
    ],
)
def test_engines_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("made_for", "gradient", "batches", "said"),
    [
        (4, lambda x, b: (x, b), np.ones(3), "batches has shape (3,): its first axis must be"),
        (4, lambda x, b: (x, b), np.float32(1), "batches has shape ()"),
        (4, lambda x, b: (x, b), (), "batches holds no arrays: a round takes 4"),
        (4, lambda x, b: (b[None], x), np.ones(4), "gradient(params, batch) must return"),
        (4, lambda x, b: x, np.ones(4), "gradient(params, batch) must return"),
        (2, lambda x, b: (x, b), np.ones(4), "it is the state of other workers"),
        (delays.rounds_of([0]), lambda x, b: (x, b), np.ones(4), "it is the state of a recorded"),
        (
            4,
            lambda x, b: ({"x": b}, b),
            np.ones(4),
            "gradient(params, batch) returned ['x'] of shape () for a parameter of shape (2,)",
        ),
    ],
)
def test_rounds_that_cannot_be(made_for, gradient, batches, said):
    state = asgd_jax.rounds(optax.sgd(0.1), made_for).init({"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        asgd_jax.rounds(optax.sgd(0.1), 4).round(gradient, state, batches)
    assert "\n" not in str(error.value)


def test_a_recorded_state_goes_on_only_where_a_block_begins():
    """Updates under one cut, then under another: exact at a common edge, NaN within a block."""
    trace = np.array([3, 2, 2, 1, 1, 0, 0, 0, 0, 3, 2, 3])
    inner, whole = optax.sgd(0.1, momentum=0.9), delays.rounds_of(trace)
    versions, _ = serve(inner, np.minimum(trace, np.arange(trace.size)))

    halved = delays.rounds_of(trace, 2)
    assert {3, 5} <= {*whole.starts.tolist()}
    assert 5 in halved.starts
    assert 3 not in halved.starts
    engines = [asgd_jax.rounds(inner, blocks) for blocks in (whole, halved)]
    start = engines[0].init(PARAMS)
    for first, exact in ((5, True), (3, False)):
        state = start
        for number, row in enumerate(whole.updates()):
            if whole.starts[number] < first:
                batches = tuple(leaf[row] for leaf in DATA)
                state, _ = jax.jit(engines[0].round, static_argnums=0)(gradient, state, batches)
        assert int(state.count) == first
        number = int(np.searchsorted(halved.starts, first, side="right")) - 1
        for row in halved.updates()[number:]:
            batches = tuple(leaf[row] for leaf in DATA)
            state, _ = jax.jit(engines[1].round, static_argnums=0)(gradient, state, batches)
        if exact:
            assert_close(state.params, versions[-1])
        else:
            assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(state.params))
    other, batches = asgd_jax.rounds(inner, delays.rounds_of(range(6))), DATA
    with pytest.raises(ValueError, match="it is the state of other blocks"):
        other.round(gradient, start, tuple(leaf[:6] for leaf in batches))


def test_an_explicit_mesh_around_it_is_one_line():
    mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Explicit,))
    engine = asgd_jax.rounds(optax.sgd(0.1), 2, mesh=mesh)
    assert float(engine.init(jnp.ones(())).params) == 1.0
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"axes \('workers',\) are Explicit"):
        engine.init(jnp.ones(()))


def test_an_optimizer_that_keeps_the_parameters_keeps_its_own():
    keeping = optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, s))
    params = jnp.ones(2)
    state = asgd_jax.rounds(keeping, 2).init(params)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert params.unsafe_buffer_pointer() not in pointers
    assert len(pointers) == len(jax.tree.leaves(state))
