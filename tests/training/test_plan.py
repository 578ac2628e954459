"""The memory plan against the bytes of a real state, and at paper scale."""

import jax
import pytest

from asgd_jax.training import set_up
from asgd_jax.training.plan import format_plan, plan_memory


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_plan_is_the_size_of_the_real_state(tiny_config):
    tiny_config.update(delay=3, momentum=0.9, momentum_kind="shifted")
    plan = plan_memory(tiny_config)
    state = set_up(tiny_config).state
    assert plan.parameters == num_bytes(state.params)
    assert plan.history == 3 * num_bytes(state.params)
    assert plan.stale == num_bytes(state.params)
    assert plan.optimizer == num_bytes(state.opt_state.inner_state)
    assert plan.batch == 16 * (64 + 4)
    assert plan.activations > 0
    assert f"{plan.total / 2**20:,.1f}" in format_plan(tiny_config, plan)


def test_half_precision_and_shards_save_what_they_promise(tiny_config):
    tiny_config.update(delay=3, num_devices=8)
    tiny_config.model_options.hidden = (64,)
    whole = plan_memory(tiny_config)
    tiny_config.history_dtype = "bfloat16"
    assert plan_memory(tiny_config).history * 2 == whole.history
    tiny_config.update(history_dtype=None, shard_history=True)
    sharded = plan_memory(tiny_config)
    assert whole.history / 8 <= sharded.history <= whole.history / 8 * 1.05
    assert sharded.stale == whole.stale
    assert whole.batch == 16 * (64 + 4) // 8


def test_what_cannot_be_planned_is_refused(tiny_config):
    tiny_config.dataset = "svhn"
    with pytest.raises(ValueError, match=r"unknown data set 'svhn': use one of digits"):
        plan_memory(tiny_config)
    tiny_config.update(dataset="digits", parallelism="pmap")
    with pytest.raises(ValueError, match=r"--plan needs parallelism='jit'"):
        plan_memory(tiny_config)
