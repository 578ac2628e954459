"""Training from the stream of JPEGs: the ImageNet sample, a small CNN with BatchNorm."""

import json

import numpy as np
import pytest

from asgd_jax.training import default_config, train
from asgd_jax.training.folder.metrics import read_rows

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


@pytest.fixture
def config(tfds_data_dir):
    config = default_config()
    config.update(
        dataset="imagenet2012",
        data_dir=str(tfds_data_dir),
        image_size=32,
        model="mnist_cnn_bn",
        conv_impl="lax",  # compiled in a third of the time
        width=0.25,
        num_workers=4,
        worker_batch_size=16,
        learning_rate=0.1,
        epochs=1,
        delay=3,
        log_every_steps=10,
        eval_batch_size=64,
        num_devices=1,
        weight_decay=1e-4,
        weight_decay_on="kernels",
    )
    return config


@pytest.mark.parametrize(
    "arm",
    [
        {"momentum": 0.9, "dampening": True},
        {"momentum": 0.9, "momentum_kind": "shifted", "dampening": True, "num_devices": 2},
    ],
    ids=["damped", "shifted_two_devices"],
)
def test_arms_train_on_real_images(config, arm, tmp_path):
    config.update(arm)
    summary = train(config, tmp_path, progress=False)
    assert summary["status"] == "completed"
    assert summary["steps"] == 800 // 16
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert rows[0]["train_loss"] == pytest.approx(np.log(1000), rel=0.1)
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    final = summary["final"]
    # One image a class, none of them seen in validation: all there is to learn is the logits' size.
    assert final["validation_loss"] == pytest.approx(np.log(1000), rel=0.2)
    assert 0 <= final["validation_error"] <= 1
    wrong = final["validation_error"] * 200  # the whole validation set, a whole number of errors
    assert wrong == pytest.approx(round(wrong), abs=1e-3)


def test_rounds_of_a_stream_leave_the_table_of_the_serial_run(config, tmp_path):
    config.update(model="mlp", width=0.5, num_workers=4, momentum=0.9, dampening=True)
    config.log_every_steps = 8
    tables = []
    for name, parallelism, num_devices in (("serial", "jit", 1), ("rounds", "workers", 2)):
        config.update(parallelism=parallelism, num_devices=num_devices)
        train(config, tmp_path / name, progress=False)
        tables.append(read_rows(tmp_path / name))
    for one, other in zip(*tables, strict=True):
        for column, value in one.items():
            if column != "steps_per_second":
                assert other[column] == pytest.approx(value, rel=1e-4, nan_ok=True), column


def test_a_diverged_stream_ends_at_once(config, tmp_path):
    config.update(learning_rate=1e6, log_every_steps=None)
    summary = train(config, tmp_path, progress=False)
    assert summary["status"] == "diverged"
    assert summary["diverged_at_step"] < 20
    assert summary["steps"] <= summary["diverged_at_step"] + 2
    json.loads((tmp_path / "summary.json").read_text())
