"""Measurements along a run: the same run as a sweep's, the same sharpness as a dense Hessian's."""

import jax
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.training.feed import feed_of, load_dataset
from asgd_jax.training.program import build_run
from asgd_jax.training.sweep import sweep
from configs.digits import get_config
from experiments import along

POINTS = [
    {"delay": 3, "learning_rate": 0.02, "seed": 0},
    {"delay": 3, "learning_rate": 1e4, "seed": 1},
]
MARKS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def config():
    config = get_config("asgd_same")
    config.update(num_train=128, num_validation=64, epochs=2, worker_batch_size=16, num_workers=4)
    config.update(learning_rate_rule="none", model="mlp", delay=3, num_devices=1)
    config.model_options = {"hidden": ()}  # a linear model: its Hessian is small
    return config


@pytest.fixture(scope="module")
def measured(config, tmp_path_factory):
    work = tmp_path_factory.mktemp("along")
    return work, along.measure_along(config, POINTS, MARKS, work, num_sharpness=32)


def test_whole_epochs_are_those_of_a_sweep(config, measured):
    rows = [row for row in measured[1] if row["seed"] == 0]
    assert [(row["epoch"], row["steps"]) for row in rows] == [(0, 0), (0.5, 4), (1, 8), (2, 16)]
    swept = sweep(config, POINTS[:1], progress=False)
    for ours, theirs in zip(rows[2:], swept, strict=True):
        assert ours["validation_error"] == pytest.approx(theirs["validation_error"], abs=1e-6)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)


def test_a_run_that_diverges_ends_with_its_row(measured):
    *before, last = [row for row in measured[1] if row["seed"] == 1]
    assert [row["diverged_at"] for row in before] == [-1] * len(before)
    assert last["diverged_at"] + 1 == last["steps"] == round(8 * last["epoch"])
    assert np.isnan(last["sharpness"])


def test_sharpness_is_the_largest_eigenvalue(config, measured):
    dataset = load_dataset(config)
    images = data.normalizer(dataset)(dataset.train_images[:32]).reshape(32, -1)
    start = build_run(config, feed_of(config, dataset).facts).init(jax.random.PRNGKey(0))
    (layer,) = start.params.values()

    def loss(weights):
        logits = images @ weights[:640].reshape(64, 10) + weights[640:]
        return -jax.nn.log_softmax(logits)[np.arange(32), dataset.train_labels[:32]].mean()

    weights = np.concatenate([layer["kernel"].ravel(), layer["bias"]])
    dense = np.linalg.eigvalsh(jax.hessian(loss)(weights))[-1]
    assert measured[1][0]["sharpness"] == pytest.approx(dense, rel=1e-2)


def test_finished_runs_are_kept(config, measured, monkeypatch):
    work, rows = measured
    monkeypatch.setattr(along, "_make_programs", None)
    again = along.measure_along(config, POINTS, MARKS, work, num_sharpness=32)
    np.testing.assert_equal(again, rows)
    with pytest.raises(ValueError, match="num_sharpness"):
        along.measure_along(config, POINTS, MARKS, work, num_sharpness=16)
