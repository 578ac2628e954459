"""The memory plan against the bytes of a real state, and at paper scale."""

import jax
import pytest

from asgd_jax.training import set_up
from asgd_jax.training.plan import format_plan, make_plan


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_plan_is_the_size_of_the_real_state(tiny_config):
    tiny_config.update(delay=3, momentum=0.9, momentum_kind="shifted")
    whole_plan = make_plan(tiny_config)
    plan = whole_plan.memory
    state = set_up(tiny_config).state
    assert plan.parameters == num_bytes(state.params)
    assert plan.history == 3 * num_bytes(state.params)
    assert plan.stale == num_bytes(state.params)
    assert plan.optimizer == num_bytes(state.opt_state.inner_state)
    assert plan.batch == 16 * (64 + 4)
    assert plan.activations > 0
    assert f"{plan.total / 2**20:,.1f}" in format_plan(tiny_config, whole_plan)


def test_half_precision_and_shards_save_what_they_promise(tiny_config):
    tiny_config.update(delay=3, num_devices=8)
    tiny_config.model_options.hidden = (64,)
    whole = make_plan(tiny_config).memory
    tiny_config.history_dtype = "bfloat16"
    assert make_plan(tiny_config).memory.history * 2 == whole.history
    tiny_config.update(history_dtype=None, shard_history=True)
    sharded = make_plan(tiny_config).memory
    assert whole.history / 8 <= sharded.history <= whole.history / 8 * 1.05
    assert sharded.stale == whole.stale
    assert whole.batch == 16 * (64 + 4) // 8


def test_a_round_holds_pieces_and_receives_about_what_an_all_reduce_does(tiny_config):
    tiny_config.update(delay=7, num_workers=8, num_devices=8)
    tiny_config.model_options.hidden = (64,)
    alone = make_plan(tiny_config)
    params = alone.memory.parameters
    assert alone.exchange.updates == 1
    assert alone.exchange.received == pytest.approx(2 * params, rel=0.01)
    tiny_config.parallelism = "workers"
    plan = make_plan(tiny_config)
    state = set_up(tiny_config).state
    assert plan.memory.history == sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state.pulled)
    )
    # Ten biases are divided by nothing: they are whole on every device, and so is each version.
    assert plan.memory.history <= params + 8 * 4 * 10
    assert plan.memory.batch == pytest.approx(16 * (64 + 4), abs=4)
    assert plan.exchange.updates == 8
    assert plan.exchange.received <= 1.1 * alone.exchange.received
    assert "a round of 8 updates" in format_plan(tiny_config, plan)


def test_what_cannot_be_planned_is_refused(tiny_config):
    tiny_config.dataset = "svhn"
    with pytest.raises(ValueError, match=r"unknown data set 'svhn': use one of digits"):
        make_plan(tiny_config)
    tiny_config.update(dataset="digits", parallelism="pmap")
    with pytest.raises(ValueError, match=r"--plan needs parallelism='jit'"):
        make_plan(tiny_config)
