"""Whole runs: what they leave in their folder, divergence, determinism, compiled programs."""

import csv
import json
import math

import jax
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.training import Batch, default_config, set_up, train
from asgd_jax.training.chunk import NOT_DIVERGED, make_run_chunk
from asgd_jax.training.folder.metrics import COLUMNS, read_rows
from asgd_jax.training.loop import _sharpest_stable_minimum
from asgd_jax.training.optimizer import make_delay_process


def test_a_run_leaves_config_metrics_events_and_summary(tiny_config, tmp_path):
    tiny_config.update(delay=3, learning_rate_rule="inverse", log_every_steps=5)
    summary = train(tiny_config, tmp_path / "run", progress=False)
    folder = tmp_path / "run"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 16, 21, 26, 31, 32]
    assert [bool(row["validation_error"]) for row in rows] == [False, False, False, True] * 2
    saved = json.loads((folder / "summary.json").read_text())
    assert saved["status"] == "completed"
    assert saved["diverged_at_step"] is None
    assert saved["steps"] == 32
    assert saved["learning_rate"] == pytest.approx(0.2 / 3)
    assert saved["staleness"]["max"] == 3
    assert saved["staleness"]["histogram"] == [1, 1, 1, 29]
    assert saved["staleness"]["mean"] == pytest.approx((0 + 1 + 2 + 3 * 29) / 32)
    assert saved["final"]["train_loss"] == pytest.approx(summary["final"]["train_loss"])
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["config"]["delay"] == 3
    assert json.loads((folder / "config.json").read_text()) == saved["config"]
    assert list(folder.glob("events.out.tfevents.*"))


def test_the_last_row_is_true_of_the_whole_validation_set(tiny_config, tmp_path):
    """The run's own last evaluation against a plain one of the same run, step by step."""
    summary = train(tiny_config, tmp_path, progress=False)
    setup = set_up(tiny_config)
    dataset = data.load("digits", num_train=256, num_validation=100)
    state, step = setup.state, jax.jit(setup.run.advance)
    losses = []
    for epoch in range(tiny_config.epochs):
        for samples in np.asarray(
            data.epoch_batches(tiny_config.seed, epoch, setup.feed.facts.plan)
        ):
            images, labels = (
                dataset.train_images[samples],
                dataset.train_labels[samples],
            )
            state, metrics = step(state, Batch(images, labels))
            losses.append(float(metrics.loss))
    images = data.normalizer(dataset)(dataset.validation_images)
    logits = setup.run.model.apply({"params": state.params}, images, train=False)
    wrong = np.argmax(np.asarray(logits), axis=-1) != dataset.validation_labels
    assert summary["final"]["validation_error"] == pytest.approx(wrong.mean(), abs=1e-6)
    per_epoch = setup.feed.facts.plan.steps_per_epoch
    rows = read_rows(tmp_path)
    for epoch, row in enumerate(rows):
        mean = np.mean(losses[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"momentum": 0.9, "momentum_kind": "nesterov"},
        {"delay": 3, "delay_distribution": "workers"},
        {"delay": 3, "delay_distribution": "pipeline"},
        {"momentum": 0.9, "predict": "optimizer"},
        {"delay": 3, "compensate": "power_scaling"},
        {"weight_decay": 1e-4},
        {"clip_norm": 1.0},
        {"warmup_epochs": 0.5},
        {"decay_epochs": (1,)},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_no_sharpest_minimum_is_claimed_without_an_exact_formula(changes):
    config = default_config()
    config.update(changes)
    field = list(changes)[-1]
    found = _sharpest_stable_minimum(config, make_delay_process(config, 8))
    assert found == {
        "sharpest_stable_minimum": None,
        "why_no_stable_minimum": f"no exact formula with {field}={changes[field]!r}",
    }


def test_the_sharpest_minimum_of_plain_delayed_sgd_is_the_closed_form():
    config = default_config()
    config.update(delay=3, learning_rate=0.2)
    for momentum_kind in ("heavy_ball", "nesterov"):  # without momentum, one and the same
        config.momentum_kind = momentum_kind
        found = _sharpest_stable_minimum(config, make_delay_process(config, 8))
        expected = 2 * math.sin(math.pi / (2 * (2 * 3 + 1))) / 0.2
        assert found == {"sharpest_stable_minimum": pytest.approx(expected, rel=1e-9)}


def test_divergence_is_recorded_and_ends_the_run(tiny_config, tmp_path):
    tiny_config.update(learning_rate=1e6, delay=3)
    summary = train(tiny_config, tmp_path, progress=False)
    assert summary["status"] == "diverged"
    at = summary["diverged_at_step"]
    assert summary["steps"] == at + 1 < 32
    saved = json.loads((tmp_path / "summary.json").read_text())  # NaN would not be JSON
    assert saved["diverged_at_step"] == at
    last = read_rows(tmp_path)[-1]
    assert last["step"] == at + 1
    assert not last["train_loss"] < tiny_config.divergence_loss


def test_the_same_seed_repeats_and_another_does_not(tiny_config, tmp_path):
    tiny_config.update(delay=3, delay_distribution="uniform")

    def rows(name, seed):
        tiny_config.seed = seed
        train(tiny_config, tmp_path / name, progress=False)
        return [
            {key: row[key] for key in row if key != "steps_per_second"}
            for row in read_rows(tmp_path / name)
        ]

    first = rows("first", 1)
    assert first == rows("again", 1)
    other = rows("other", 2)
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(first, other, strict=True))


@pytest.mark.optimised
def test_chunks_of_any_length_share_one_program_and_copy_no_large_ring(tiny_config):
    tiny_config.update(delay=3)
    setup = set_up(tiny_config)
    dataset = data.load("digits", num_train=256)
    run_chunk = jax.jit(make_run_chunk(setup.run.advance, 3, 1e3), donate_argnums=0)
    arrays = jax.device_put((dataset.train_images, dataset.train_labels))
    order = data.epoch_batches(0, 0, setup.feed.facts.plan)
    text = run_chunk.lower(setup.state, *arrays, order, 0, 5).compile().as_text()
    assert "f32[3,64,8]" in text
    assert not [line for line in text.splitlines() if "= f32[3,64,8]" in line and " copy(" in line]
    state = setup.state
    for start, stop in ((0, 1), (1, 4), (4, 16)):
        state, totals = run_chunk(state, *arrays, order, start, stop)
        assert (int(totals.steps), int(totals.diverged_at)) == (stop - start, NOT_DIVERGED)
    assert run_chunk._cache_size() == 1
    assert int(state.step) == 16


def test_a_folder_with_another_run_is_not_overwritten(tiny_config, tmp_path):
    tiny_config.epochs = 1
    train(tiny_config, tmp_path, progress=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    tiny_config.learning_rate = 0.3
    with pytest.raises(ValueError, match=r"has learning_rate=0.2 and this configuration .*0.3"):
        train(tiny_config, tmp_path, progress=False)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_gap_is_zero_without_delay_and_not_with(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "sync", progress=False)
    tiny_config.delay = 3
    train(tiny_config, tmp_path / "async", progress=False)
    assert all(row["gap"] == 0 for row in read_rows(tmp_path / "sync"))
    for row in read_rows(tmp_path / "async"):
        assert row["gap"] > 0
        assert row["relative_gap"] == pytest.approx(row["gap"] / row["parameter_norm"], rel=1e-5)
        assert math.isclose(row["staleness_max"], 3)
