"""Rounds of many workers against the parameter server that makes one update after another."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from parameter_server import simulate

import asgd_jax
from asgd_jax import delays

pytestmark = pytest.mark.standard_promotion  # optax.adamw

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
        ("shifted", "uniform", 4, None),
        ("clip and decay", "random workers", 8, 8),
        ("compensated", "normal workers", 2, None),
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


WIDTH = 128
WIDE = {
    "first": np.full((WIDTH, WIDTH), 0.01, np.float32),
    "second": np.full((WIDTH, WIDTH), 0.02, np.float32),
    "bias": np.zeros(3, np.float32),  # no device has a piece of it
}
WIDE_BYTES = 4 * (2 * WIDTH * WIDTH + 3)


def wide_gradient(params, batch):
    def loss(params):
        hidden = jnp.tanh(batch @ params["first"])
        return jnp.mean((hidden @ params["second"]) ** 2) + jnp.sum(jnp.sin(params["bias"]))

    value, grads = jax.value_and_grad(loss)(params)
    return grads, value


def compile_round(num_workers, mesh, batch_axes=("workers",)):
    engine = asgd_jax.rounds(CASES["clip and decay"](0), num_workers, mesh=mesh)
    state = engine.init(WIDE)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*batch_axes))
    batches = jax.ShapeDtypeStruct((engine.num_batches, 4, WIDTH), jnp.float32, sharding=sharding)
    step = jax.jit(engine.round, static_argnums=0, donate_argnums=1)
    return step.lower(wide_gradient, state, batches).compile()


COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def collectives(text):
    """(kind, bytes that a device receives or its own share of them, where it was asked for)."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], 4 * sum(sizes), name[1] if name else ""))
    return found


def copies_of(text, shape):
    return [line for line in text.splitlines() if re.search(rf"= f32\[{shape}\]\S* copy\(", line)]


@pytest.mark.parametrize("schedule", ["round robin", "recorded"])
def test_a_round_sends_what_one_all_reduce_does_and_copies_no_pulled_sets(schedule):
    workers = 8 if schedule == "round robin" else delays.rounds_of(delays.simulate_workers(8, 64))
    compiled = compile_round(workers, mesh_of(8))
    found = collectives(compiled.as_text())
    kinds = [kind for kind, _, _ in found]
    # Two for each leaf in pieces; the gradients of the whole one; the norm that clips.
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "all-to-all": 4, "all-gather": 1, "all-reduce": 1,
    }  # fmt: skip
    assert not [where for _, _, where in found if "shard_map" in where]
    # A synchronous all-reduce of the gradients sends and receives twice its bytes.
    assert sum(size for _, size, _ in found) <= 1.01 * 2 * WIDE_BYTES
    sets = rf"1,{WIDTH},{WIDTH}" if schedule == "round robin" else rf"8,{WIDTH // 8},{WIDTH}"
    pulled_copies = [
        line for line in copies_of(compiled.as_text(), sets) if "wrapped_broadcast" not in line
    ]
    assert pulled_copies == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.999 * (1 + 2 / 8) * WIDE_BYTES
    # Its sets, gradients and versions; parameters; momentum of its piece.
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= (3 + 1 + 1 / 8) * WIDE_BYTES


def test_on_one_device_new_versions_are_written_over_the_old():
    compiled = compile_round(8, None)
    assert collectives(compiled.as_text()) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.999 * (8 + 2) * WIDE_BYTES
    assert memory.temp_size_in_bytes <= 1.2 * 8 * WIDE_BYTES  # the gradients


def test_the_gradient_s_own_axes_are_left_to_it():
    """Batches over one more axis are summed over it, and over nothing else."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("workers", "data"))
    compiled = compile_round(4, mesh, batch_axes=("workers", "data"))
    lines = [
        line
        for line in compiled.as_text().splitlines()
        if "shard_map" in line and re.search(rf" ({COLLECTIVES})(-start)?\(", line)
    ]
    assert lines
    assert all("all-reduce" in line and "replica_groups=[4,2]<=[8]" in line for line in lines)


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
    ],
)
def test_rounds_that_cannot_be(made_for, gradient, batches, said):
    state = asgd_jax.rounds(optax.sgd(0.1), made_for).init({"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        asgd_jax.rounds(optax.sgd(0.1), 4).round(gradient, state, batches)
    assert "\n" not in str(error.value)
