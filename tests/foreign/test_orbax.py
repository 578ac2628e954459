"""Checkpoints by Orbax and by `flax.serialization`, with and without a template."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from held import Held
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import asgd_jax
from asgd_jax import delays

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.array([1.0, -0.5])}
NUM_STEPS, SAVED_AT = 24, 9
INNER = optax.adam(0.1)

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@jax.jit
def gradient(params, step):
    return jax.tree.map(lambda leaf: jnp.tanh(leaf) - jnp.cos(step), params)


def make_step(tx):
    @jax.jit
    def step(params, state, index):
        stale = asgd_jax.stale_params(state, params)
        updates, state = tx.update(gradient(stale, index), state, params)
        return optax.apply_updates(params, updates), state, stale

    return step


def standard(folder, tree, template):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "standard", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "standard", template)


def pytree(folder, tree, template):
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(folder / "pytree", tree)
    return checkpointer.restore(folder / "pytree", item=template)


def flax_bytes(folder, tree, template):
    del folder
    data = flax.serialization.to_bytes(tree)
    if template is None:
        return tuple(flax.serialization.msgpack_restore(data).values())
    return flax.serialization.from_bytes(template, data)


CODECS = [standard, pytree, flax_bytes]


@pytest.fixture(scope="module")
def random_run():
    """A run of random delays and rounded history: all its states, and the step that made them."""
    process = delays.uniform(0, 4)
    tx = asgd_jax.delayed(INNER, process, seed=3, history_dtype=jnp.bfloat16)
    step, seen = make_step(tx), [(PARAMS, tx.init(PARAMS))]
    for index in range(NUM_STEPS):
        seen.append(step(*seen[-1], index)[:2])
    return tx, step, seen


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("abstract", [False, True])
def test_a_run_restored_into_a_template_goes_on_bitwise(codec, abstract, tmp_path, random_run):
    tx, step, seen = random_run
    template = (PARAMS, tx.init(PARAMS))
    if abstract and codec is not flax_bytes:  # which replaces the template's leaves unseen
        template = jax.eval_shape(lambda: template)
    params, state = codec(tmp_path, seen[SAVED_AT], template)
    assert isinstance(state, asgd_jax.DelayedState)
    for index in range(SAVED_AT, NUM_STEPS):
        params, state, _ = step(params, state, index)
    jax.tree.map(np.testing.assert_array_equal, (params, state), seen[NUM_STEPS])


@pytest.mark.parametrize("codec", CODECS)
def test_without_a_template_a_state_is_dicts_and_is_refused(codec, tmp_path, random_run):
    params, state = codec(tmp_path, random_run[2][SAVED_AT], None)
    with pytest.raises(
        ValueError, match=r"^no DelayedState in an optimizer state of type dict"
    ) as e:
        asgd_jax.stale_params(state, params)
    assert "\n" not in str(e.value)


def carried_over(before, after):
    """Staleness of every gradient when the delay changes at SAVED_AT: it ramps up from the oldest
    parameters that are still known, as at the start of a run."""
    known = max(0, SAVED_AT - before)
    return lambda step: min(before, step) if step < SAVED_AT else min(after, step - known)


@pytest.mark.parametrize(("before", "after"), [(3, 8), (8, 3)])
@pytest.mark.parametrize("codec", [pytree, flax_bytes])
def test_another_delay_is_refused_and_a_resized_history_goes_on(codec, before, after, tmp_path):
    old, new = asgd_jax.delayed(INNER, before), asgd_jax.delayed(INNER, after)
    held, step = Held(carried_over(before, after)), make_step(old)
    params, state = PARAMS, old.init(PARAMS)
    for index in range(NUM_STEPS):
        if index == SAVED_AT:
            # Both fill the template of the new delay with what was stored, without a word.
            params, state = codec(tmp_path, (params, state), (PARAMS, new.init(PARAMS)))
            step = make_step(new)
            with pytest.raises(
                ValueError,
                match=rf"has {before} slots for \['b'\] and its delay needs {after}: .*"
                r"asgd_jax.resize_history\(state, delay\)",
            ):
                jax.eval_shape(step, params, state, index)
            state = asgd_jax.resize_history(state, after)
        past = params
        params, state, stale = step(params, state, index)
        held.check(stale, past)
    held.check_trajectory(INNER, gradient)


def test_a_sharded_template_gives_every_slot_its_parameters_sharding(tmp_path, random_run):
    tx, _, seen = random_run
    mesh = jax.make_mesh((2,), ("data",))
    specs = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        seen[0][1],
        {"w": P("data"), "b": P()},
        transform_non_params=lambda _: P(),
    )
    template = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        seen[0][1],
        specs,
    )
    state = standard(tmp_path, seen[SAVED_AT][1], template)
    assert state.history.slots["w"].addressable_shards[0].data.shape == (4, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, state, seen[SAVED_AT][1])
