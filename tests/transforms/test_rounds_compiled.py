"""What XLA makes of a round: who sends what, what is copied, what a device holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from round_problem import CASES, mesh_of

import asgd_jax
from asgd_jax import delays
from asgd_jax.training.collectives import collectives_of

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


def copies_of(text, shape):
    return [line for line in text.splitlines() if re.search(rf"= f32\[{shape}\]\S* copy\(", line)]


@pytest.mark.parametrize("schedule", ["round robin", "recorded"])
def test_a_round_sends_what_one_all_reduce_does_and_copies_no_pulled_sets(schedule):
    workers = 8 if schedule == "round robin" else delays.rounds_of(delays.simulate_workers(8, 64))
    compiled = compile_round(workers, mesh_of(8))
    found = collectives_of(compiled.as_text())
    kinds = [each.kind for each in found]
    # Two for each leaf in pieces; the gradients of the whole one; the norm that clips.
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "all-to-all": 4, "all-gather": 1, "all-reduce": 1,
    }  # fmt: skip
    assert not [each for each in found if "shard_map" in each.op_name]
    # A synchronous all-reduce of the gradients sends and receives twice its bytes.
    assert sum(each.received for each in found) <= 1.01 * 2 * WIDE_BYTES
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
    assert collectives_of(compiled.as_text()) == []
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


@pytest.mark.parametrize("num_devices", [None, 2])
def test_a_second_round_compiles_nothing(num_devices):
    engine = asgd_jax.rounds(CASES["momentum"](1), 2, mesh=mesh_of(num_devices))
    step = jax.jit(engine.round, static_argnums=0, donate_argnums=1)
    state = engine.init({"even": jnp.ones((3, 2)), "odd": jnp.ones(3)})

    def gradient(params, batch):
        return jax.tree.map(lambda leaf: leaf * batch, params), None

    for _ in range(3):
        state, _ = step(gradient, state, np.ones(2, np.float32))
    assert step._cache_size() == 1
