"""What XLA makes of a delayed step: no ring copy, one more parameter set, no recompile."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import asgd_jax
from asgd_jax import delays

pytestmark = pytest.mark.optimised

DELAY = 64
WIDTH = 128
BATCH = 16
NUM_RUNS = 3
PARAM_BYTES = 4 * (2 * WIDTH * WIDTH + WIDTH)


def init_params():
    return {
        "first": jnp.full((WIDTH, WIDTH), 0.01, jnp.float32),
        "bias": jnp.zeros(WIDTH),
        "second": jnp.full((WIDTH, WIDTH), 0.02, jnp.float32),
    }


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["first"] + params["bias"][None, :])
    return jnp.mean((hidden @ params["second"]) ** 2)


def plain_step(tx, params, state, batch):
    updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def delayed_step(tx, params, state, batch):
    grads = jax.grad(loss)(asgd_jax.stale_params(state, params), batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def scanned(step):
    def run(tx, params, state, batch):
        def body(carry, _):
            return step(tx, *carry, batch), None

        return jax.lax.scan(body, (params, state), length=10)[0]

    return run


CASES = {
    "sgd": (lambda: optax.sgd(0.1), lambda inner: asgd_jax.delayed(inner, DELAY)),
    "momentum": (
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda inner: asgd_jax.delayed(inner, DELAY),
    ),
    "uniform": (
        lambda: optax.sgd(0.1),
        lambda inner: asgd_jax.delayed(inner, delays.uniform(1, DELAY)),
    ),
    "by leaf": (
        lambda: optax.sgd(0.1),
        lambda inner: asgd_jax.delayed(inner, {"first": DELAY, "bias": 0, "second": DELAY + 1}),
    ),
    "bfloat16": (
        lambda: optax.sgd(0.1),
        lambda inner: asgd_jax.delayed(inner, DELAY, history_dtype=jnp.bfloat16),
    ),
    "shifted": (
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda _: asgd_jax.delayed(asgd_jax.shifted_sgd(0.1, 0.9, DELAY), DELAY),
    ),
}


def vmapped(step, runs):
    """One run per learning-rate-like axis: arrays get an axis, counters and keys stay shared."""

    def axes_of(state):
        return jax.tree.map(lambda leaf: 0 if _is_per_run(leaf) else None, state)

    def run(tx, params, state, batch):
        axes = axes_of(state)
        return jax.vmap(
            lambda params, state: step(tx, params, state, batch),
            in_axes=(0, axes),
            out_axes=(0, axes),
        )(params, state)

    def init(tx):
        params = init_params()
        return jax.tree.map(
            lambda leaf: jnp.repeat(leaf[None], runs, 0) if _is_per_run(leaf) else leaf,
            (params, tx.init(params)),
        )

    return run, init


def _is_per_run(leaf):
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def compile_step(step, tx, where):
    """Compiles one donated step the way a training program would."""
    init = lambda tx: (init_params(), tx.init(init_params()))  # noqa: E731
    shardings = {}
    if where == "scan":
        step = scanned(step)
    elif where == "vmap":
        step, init = vmapped(step, NUM_RUNS)
    elif where == "mesh":
        mesh = Mesh(np.array(jax.devices()[:8]), ("batch",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("batch"))
        shardings = {"in_shardings": (everywhere, everywhere, split), "out_shardings": everywhere}
    params, state = jax.eval_shape(lambda: init(tx))
    batch = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    function = jax.jit(
        lambda params, state, batch: step(tx, params, state, batch),
        donate_argnums=(0, 1),
        **shardings,
    )
    return function.lower(params, state, batch).compile()


# What may have the shape of a ring without touching all of it.
FREE = {
    "parameter", "bitcast", "bitcast-convert", "tuple", "get-tuple-element", "while", "fusion",
    "dynamic-update-slice", "call",
}  # fmt: skip


def ring_copies(text: str) -> list[str]:
    """Instructions in optimised HLO that produce a whole ring by anything but a slot write."""
    depth = rf"(?:{DELAY}|{DELAY + 1})"  # of past parameters; of momentum buffers
    pattern = re.compile(rf"= \w+\[(?:{NUM_RUNS},)?{depth},[\d,]*\]\S* ([\w-]+)\(")
    found = ((line.strip(), pattern.search(line)) for line in text.splitlines())
    return [line for line, match in found if match and match[1] not in FREE]


@pytest.mark.parametrize("where", ["jit", "scan", "vmap", "mesh"])
@pytest.mark.parametrize("case", CASES)
def test_the_delay_costs_no_ring_copy_and_one_parameter_set(case, where, request):
    if (case, where) == ("bfloat16", "vmap"):
        reason = "XLA:CPU copies a half-precision ring whose slot write is batched"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    make_inner, wrap = CASES[case]
    plain = compile_step(plain_step, make_inner(), where)
    compiled = compile_step(delayed_step, wrap(make_inner()), where)
    text = compiled.as_text()
    runs = NUM_RUNS if where == "vmap" else 1
    num_rings = 2 if case == "shifted" else 1
    assert f"[{'3,' if runs == 3 else ''}{DELAY},{WIDTH},{WIDTH}]" in text
    assert ring_copies(text) == []
    one_set_a_ring = 1.05 * num_rings * runs * PARAM_BYTES
    allowed = plain.memory_analysis().temp_size_in_bytes + one_set_a_ring
    assert compiled.memory_analysis().temp_size_in_bytes <= allowed


@pytest.mark.parametrize("where", ["jit", "scan", "vmap", "mesh"])
def test_a_queue_of_gradients_costs_no_ring_copy(where):
    tx = optax.chain(asgd_jax.delay_gradients(DELAY), optax.sgd(0.1))
    plain = compile_step(plain_step, optax.sgd(0.1), where)
    compiled = compile_step(plain_step, tx, where)
    assert ring_copies(compiled.as_text()) == []
    runs = NUM_RUNS if where == "vmap" else 1
    allowed = plain.memory_analysis().temp_size_in_bytes + 1.05 * runs * PARAM_BYTES
    assert compiled.memory_analysis().temp_size_in_bytes <= allowed


def test_the_copy_detector_sees_a_copy():
    """The order that the design rejects: a read at the start of the step, before the write."""

    def copying_step(tx, params, state, batch):
        oldest = state.num_updates % DELAY
        stale = jax.tree.map(lambda ring: ring[oldest], state.history.slots)
        grads = jax.grad(loss)(stale, batch)
        history = jax.tree.map(
            lambda ring, leaf: ring.at[oldest].set(leaf), state.history.slots, params
        )
        params = optax.apply_updates(params, jax.tree.map(lambda leaf: -0.1 * leaf, grads))
        history = state.history._replace(slots=history)
        return params, state._replace(history=history, num_updates=state.num_updates + 1)

    tx = asgd_jax.delayed(optax.sgd(0.1), DELAY)
    assert ring_copies(compile_step(copying_step, tx, "jit").as_text()) != []


def test_a_new_learning_rate_recompiles_nothing():
    traces = []
    make = optax.inject_hyperparams(
        lambda learning_rate: asgd_jax.delayed(optax.sgd(learning_rate), 4)
    )
    tx = make(learning_rate=0.1)

    @jax.jit
    def step(params, state, batch):
        traces.append(1)
        return delayed_step(tx, params, state, batch)

    params, batch = init_params(), jnp.ones((BATCH, WIDTH))
    state = tx.init(params)
    for learning_rate in (0.1, 0.01, 3.0):
        state.hyperparams["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
        params, state = step(params, state, batch)
    assert len(traces) == 1


def test_history_bytes_are_exactly_the_slots():
    params = jax.eval_shape(init_params)
    for dtype, factor in ((None, 1.0), (jnp.bfloat16, 0.5)):
        tx = asgd_jax.delayed(optax.sgd(0.1), DELAY, history_dtype=dtype)
        history = jax.eval_shape(tx.init, params).history
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(history))
        assert size == DELAY * PARAM_BYTES * factor
