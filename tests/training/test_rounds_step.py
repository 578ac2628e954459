"""A run in rounds, a worker a device, against the same run one update after another."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import set_up, train
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.checkpoint import open_checkpoints
from asgd_jax.training.folder.metrics import read_rows
from configs import mnist_cnn

BATCH_NORM = {"model": "mnist_cnn_bn", "width": 0.1, "num_train": 128, "conv_impl": "lax"}
CASES = {
    # 16 updates an epoch in rows of 6, 6 and 4: rounds of 4, 2, 4, 2 and 4.
    "momentum": (2, {"momentum": 0.9, "decay_epochs": (1,), "clip_norm": 1.0}),
    "shifted": (2, {"momentum": 0.9, "momentum_kind": "shifted", "warmup_epochs": 1.0}),
    "nesterov one device": (1, {"momentum": 0.5, "momentum_kind": "nesterov"}),
    "groups": (8, {"num_workers": 8, "delay": 1, "worker_batch_size": 4}),
    "uniform": (2, {"delay_distribution": "uniform"}),
    "crops of two workers an update": (2, {"num_workers": 8, "augment": True}),
    "server statistics": (4, {**BATCH_NORM, "num_workers": 8, "delay": 7, "worker_batch_size": 4}),
    "worker statistics": (2, {**BATCH_NORM, "batch_stats": "worker"}),
    "recalibrated": (2, {**BATCH_NORM, "batch_stats": "recalibrate", "recalibration_batches": 2}),
}


def run(config, folder, **changes):
    config = config.copy_and_resolve_references()
    config.update(changes)
    train(config, folder, progress=False)
    rows = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in read_rows(folder)]
    return config, rows


def assert_same_rows(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("name", CASES)
def test_rounds_leave_the_table_of_the_serial_run(name, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "augmenter", lambda name: data.random_crop_flip)
    num_devices, changes = CASES[name]
    tiny_config.update(delay=3, log_every_steps=6, learning_rate=0.05)
    if "model" in changes:
        tiny_config.model_options = ConfigDict()
    tiny_config.update(changes)
    _, alone = run(tiny_config, tmp_path / "serial")
    _, rows = run(tiny_config, tmp_path / "rounds", parallelism="workers", num_devices=num_devices)
    assert_same_rows(rows, alone)


@pytest.mark.realdata
@pytest.mark.slow
def test_fig_1_s_network_on_mnist(tfds_data_dir, tmp_path):
    config = mnist_cnn.get_config("asgd")
    # All 32 workers, with batches of 8: it is their number that the rounds depend on.
    config.update(width=0.25, num_train=256, worker_batch_size=8)
    config.update(num_validation=200, eval_batch_size=200)
    config.update(data_dir=str(tfds_data_dir), num_devices=1, epochs=2, learning_rate=0.1)
    config.conv_impl = "lax"  # compiled in a third of the time
    _, alone = run(config, tmp_path / "serial")
    _, rows = run(config, tmp_path / "rounds", parallelism="workers", num_devices=2)
    assert_same_rows(rows, alone)
    assert [row["step"] for row in rows] == [32, 64]


@pytest.mark.parametrize("delay", [0, 3])
def test_a_run_that_diverges_ends_with_its_update(delay, tiny_config, tmp_path):
    """In the middle of a round: parameters and evaluation are those after that update."""
    tiny_config.update(learning_rate=3.0, delay=delay, divergence_loss=3.0, log_every_steps=None)
    _, alone = run(tiny_config, tmp_path / "serial")
    _, rows = run(tiny_config, tmp_path / "rounds", parallelism="workers", num_devices=2)
    assert 0 < alone[-1]["step"] < 32
    assert delay == 0 or alone[-1]["step"] % 4
    assert_same_rows(rows, alone)


def test_a_resumed_run_has_the_bytes_of_one_never_stopped(tiny_config, tmp_path):
    tiny_config.update(parallelism="workers", num_devices=2, delay=3, momentum=0.9)
    config, rows = run(tiny_config, tmp_path / "whole")
    run(tiny_config, tmp_path / "parts", epochs=1)
    _, resumed = run(tiny_config, tmp_path / "parts")
    assert resumed == rows
    states = []
    for folder in ("whole", "parts"):
        setup = set_up(config)
        mark = rerun.fingerprint(config) | rerun.data_fingerprint(config, setup.feed.facts.plan)
        checkpoints = open_checkpoints(tmp_path / folder, mark)
        states.append(checkpoints.restore(setup.state)[0])
        checkpoints.close()
    for left, right in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_devices": 8}, "num_workers=4 cannot be divided over 8 devices.*num_devices=4"),
        ({"delay": 2}, r"delay=2 with num_workers=4: delay \+ 1 must divide num_workers"),
        ({"shard_history": True}, "shard_history=True has no meaning for parallelism='workers'"),
        ({"history_dtype": "bfloat16"}, "history_dtype='bfloat16' has no meaning for"),
    ],
)
def test_what_rounds_cannot_do_is_one_line(changes, said, tiny_config):
    tiny_config.update(parallelism="workers", **changes)
    with pytest.raises(ValueError, match=said) as error:
        set_up(tiny_config)
    assert "\n" not in str(error.value)
