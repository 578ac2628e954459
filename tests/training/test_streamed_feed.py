"""The loop over a stream: it runs ahead of the check, and stops where a plain loop would."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.training import Batch, set_up
from asgd_jax.training.chunk import NOT_DIVERGED, add_step, zero_totals
from asgd_jax.training.streamed_feed import _make_advance, _make_step

DELAY = 3


class Flag:
    """A `diverged_at` that notes when the host waits for it."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def addressable_data(self, _):
        self.log.append(("wait", self.step))
        return np.int32(NOT_DIVERGED)


def test_a_step_is_dispatched_while_the_one_before_may_still_run(tiny_config):
    log = []
    state = set_up(tiny_config).state

    def step(state, totals, batch):
        log.append(("dispatch", batch))
        return state, totals._replace(diverged_at=Flag(batch, log))

    advance = _make_advance(lambda start: iter(range(start, 99)), step, lambda b: b, 8, DELAY)
    advance(state, 1, 0, 5)
    waits = {"dispatch": -1}
    for kind, number in log:
        if kind == "wait":
            waits["dispatch"] = number
        else:
            assert waits["dispatch"] == (number - 2 if number >= 10 else -1)
    assert [number for kind, number in log if kind == "dispatch"] == [8, 9, 10, 11, 12]


def streamed(config):
    """Setup, the stream's step and `advance` on digits, as if they were read from disk."""
    setup = set_up(config)
    dataset = data.load("digits", num_train=256)
    sharding = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    step = _make_step(setup.train_step, config, setup.mesh, sharding)

    def batches(start):
        for samples in np.asarray(data.epoch_batches(0, 0, setup.feed.plan))[start:]:
            yield Batch(dataset.train_images[samples], dataset.train_labels[samples])

    advance = _make_advance(batches, step, jax.device_put, 16, DELAY)
    return setup, batches, step, advance


def without_rings(state):
    """Leaves of a state by path, but the past parameters and momenta."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    kept = {name: leaf for name, leaf in named.items() if not re.search(r"history|trace", name)}
    assert 0 < len(kept) < len(named)
    return kept


@pytest.mark.parametrize(
    "arm",
    [
        {"learning_rate": 50.0, "divergence_loss": 30.0},
        {"learning_rate": 1e6},
        {
            "learning_rate": 50.0,
            "divergence_loss": 30.0,
            "momentum": 0.9,
            "momentum_kind": "shifted",
        },
        {"learning_rate": 0.1},
    ],
    ids=["too_large_a_loss", "not_finite", "shifted", "does_not_diverge"],
)
def test_a_run_stops_exactly_where_a_plain_loop_does(tiny_config, arm):
    tiny_config.update(delay=DELAY, **arm)
    setup, batches, _, advance = streamed(tiny_config)
    plain_step = jax.jit(setup.train_step)
    expected, totals = jax.tree.map(jnp.array, setup.state), zero_totals(DELAY)
    for batch in batches(0):
        before = expected.step
        expected, metrics = plain_step(expected, batch)
        totals = add_step(totals, metrics, before, tiny_config.divergence_loss)
        if totals.diverged_at != NOT_DIVERGED:
            break
    state, found = advance(setup.state, 0, 0, 16)
    assert int(found.diverged_at) == int(totals.diverged_at)
    assert int(found.steps) == int(totals.steps) == int(state.step)
    assert (int(found.steps) < 14) == (arm["learning_rate"] > 1)
    np.testing.assert_array_equal(found.staleness, totals.staleness)
    np.testing.assert_allclose(found.loss, totals.loss, rtol=1e-5)
    kept, wanted = without_rings(state), without_rings(expected)
    assert kept.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(kept[name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["heavy_ball", "shifted"])
def test_the_check_copies_no_ring(tiny_config, kind):
    tiny_config.update(delay=DELAY, momentum=0.9, momentum_kind=kind)
    setup, batches, step, _ = streamed(tiny_config)
    compiled = step.lower(setup.state, zero_totals(DELAY), next(batches(0))).compile()
    lines = [line for line in compiled.as_text().splitlines() if "= f32[4,64,8]" in line]
    assert lines
    assert not [line for line in lines if " copy(" in line or " select(" in line]
