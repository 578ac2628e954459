"""The two programs in the order of a record, against the simulator's compiled loop."""

import jax
import numpy as np
import pytest

from asgd_jax.cluster.log import UPDATES_FILE, open_updates
from asgd_jax.cluster.programs import Pushed, first_fault
from asgd_jax.cluster.real_run import real_config
from asgd_jax.cluster.replay import compare, replay_loop, replay_programs
from asgd_jax.training.feed import open_feed
from asgd_jax.training.recorded import read_updates


def record(folder, versions, batches):
    """An updates.csv of these versions pulled, as a server would write it."""
    rows = [
        (update, update % 3, version, update - version, batch, update / 10, 0.05)
        for update, (version, batch) in enumerate(zip(versions, batches, strict=True))
    ]
    log = open_updates(folder, 0)
    log.write(rows)
    log.close()
    return folder / UPDATES_FILE


def random_record(folder, num_updates, num_shards=1):
    """Any version at any time: workers die, are dropped, are far behind; batches in any order."""
    rng = np.random.default_rng(7)
    versions = [int(rng.integers(max(0, update - 9), update + 1)) for update in range(num_updates)]
    return record(folder, versions, rng.permutation(num_updates + 6)[:num_updates])


OPTIMIZERS = {
    "sgd": {},
    "heavy ball": {"momentum": 0.5, "weight_decay": 1e-3, "clip_norm": 1.0},
    "nesterov": {"momentum": 0.5, "momentum_kind": "nesterov", "warmup_epochs": 0.5},
    "shifted": {"momentum": 0.5, "momentum_kind": "shifted"},
    "shifted, damped": {"momentum": 0.9, "momentum_kind": "shifted", "dampening": True},
    "shards": {"worker_data": "shard"},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_recorded_order_is_the_simulated_run(changes, small_config, tmp_path):
    small_config.update(changes)
    config = real_config(small_config)
    trace = random_record(tmp_path, 40)
    updates = read_updates(trace)
    state = replay_programs(config, open_feed(config), updates)
    simulated = replay_loop(config, trace, updates.update.size)
    assert int(state.step) == int(simulated.step) == 40
    found = compare(jax.device_get(simulated.params), jax.device_get(state.params))
    assert found.distance < 1e-5


def test_another_order_of_batches_is_another_run(small_config, tmp_path):
    """What is compared above does depend on versions and on batches."""
    config = real_config(small_config)
    feed = open_feed(config)
    ends = []
    for versions, batches in (
        ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4]),
        ([0, 0, 0, 1, 2], [0, 2, 1, 3, 4]),
        ([0, 0, 0, 2, 1], [0, 1, 2, 3, 4]),
    ):
        updates = read_updates(record(tmp_path, versions, batches))
        ends.append(jax.device_get(replay_programs(config, feed, updates).params))
    assert compare(ends[0], ends[0]).equal
    assert compare(ends[0], ends[1]).distance > 1e-4
    assert compare(ends[0], ends[2]).distance > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["server", "worker"])
def test_running_statistics_are_those_of_the_simulator(mode, small_config, tmp_path):
    small_config.update(model="resnet20", width=0.25, batch_stats=mode, learning_rate=0.05)
    small_config.model_options = {}
    config = real_config(small_config)
    trace = random_record(tmp_path, 12)
    updates = read_updates(trace)
    state = replay_programs(config, open_feed(config), updates)
    simulated = replay_loop(config, trace, 12)
    live = simulated.batch_stats
    if mode == "worker":  # a ring of chains, the last push's at slot `step`
        live = jax.tree.map(lambda slots: slots[12 % slots.shape[0]], live.slots)
    assert compare(jax.device_get(live), jax.device_get(state.batch_stats)).distance < 1e-4
    assert compare(jax.device_get(simulated.params), jax.device_get(state.params)).distance < 1e-4


def test_a_gradient_of_other_leaves_is_named():
    params = {"a": {"w": np.zeros((2, 3)), "b": np.zeros(3)}}
    right = {"a": {"w": np.ones((2, 3)), "b": np.ones(3)}}
    assert first_fault(Pushed(right, {}, 0, 0, 0), params) is None
    assert first_fault(Pushed({"a": {"w": np.ones((2, 3))}}, {}, 0, 0, 0), params) is not None
    large = {"a": {"w": np.full((2, 3), 3e38, np.float32), "b": np.ones(3)}}  # whose sum is not
    assert first_fault(Pushed(large, {}, 0, 0, 0), params) is None
    large["a"]["w"][1, 2] = np.inf
    assert first_fault(Pushed(large, {}, 0, 0, 0), params) == "['a']['w'] is not finite"
    stats = {"mean": np.array([np.nan])}
    assert first_fault(Pushed(right, stats, 0, 0, 0), params) == "['mean'] is not finite"
