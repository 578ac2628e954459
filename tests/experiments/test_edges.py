"""The search for the rate at which a minimum is left, against a minimum whose edge is known."""

import math

import numpy as np
import pandas as pd
import pytest

from asgd_jax import stability
from asgd_jax.training import default_config
from asgd_jax.training.feed import load_dataset
from experiments.edges import minibatch
from experiments.edges.judge import brackets, judge_runs
from experiments.edges.leaving import first_left, has_left, left_for_good
from experiments.edges.minibatch import Grid, Start, find_edges, grid_rate, num_epochs

START = Start(params={}, loss=0.02, sharpness=5.0)


def rows_of(point, left):
    losses = [0.5, 3.0] if left else [0.02, 0.02, 0.02]
    return [
        {
            **point,
            "epoch": k + 1,
            "steps": 8 * (k + 1),
            "train_error": 0.0,
            "full_train_loss": loss,
            "diverged_at": -1,
        }
        for k, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("resolution", [0.08, 0.04])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.07, 5.0])
def test_the_search_brackets_an_edge_wherever_it_is(monkeypatch, tmp_path, factor, resolution):
    """Edges far below and above S-SGD's, with neighbouring rates at the end, in few runs.

    The first seed's runs above the edge go on after they have left; where the first of them ends
    is measured.
    """
    runs, goes_on, ended = [], [], []

    def edge(delay):
        return factor * stability.max_learning_rate(delay, sharpness=START.sharpness)

    def fake_sweep(config, points, *, leave_loss, **_):
        (goes_on if leave_loss == config.divergence_loss else runs).extend(points)
        return [
            row
            for point in points
            for row in rows_of(point, point["learning_rate"] > edge(point["delay"]))
        ]

    def fake_end(config, point, start, work):
        ended.append(point)
        return 3.0

    monkeypatch.setattr(minibatch, "sweep", fake_sweep)
    monkeypatch.setattr(minibatch, "_end_sharpness", fake_end)
    config = default_config()
    config.worker_batch_size = 64
    records = find_edges(
        config, START, (1, 4, 32), (0, 1), tmp_path, Grid(resolution, above=(1, 3))
    )
    for delay in (1, 4, 32):
        for seed in (0, 1):
            mine = [r for r in records if (r["delay"], r["seed"]) == (delay, seed)]
            left = min(r["learning_rate"] for r in mine if r["left"])
            stayed = max(r["learning_rate"] for r in mine if not r["left"])
            assert stayed <= edge(delay) < left
            assert left / stayed == pytest.approx(1 + resolution, rel=1e-4)
            indices = {r["index"] for r in mine}
            upper = min(r["index"] for r in mine if r["left"])
            assert ({upper + 1, upper + 3} <= indices) or seed == 1
            assert len(indices) < 22
            known = {r["index"] for r in mine if not math.isnan(r["end_sharpness"])}
            assert known == ({upper} if seed == 0 else set())
    assert [(point["delay"], point["seed"]) for point in ended] == [(1, 0), (4, 0), (32, 0)]
    assert len(goes_on) == 3 * 3
    assert len(runs) == len({tuple(sorted(point.items())) for point in runs})
    assert {record["minimum_loss"] for record in records} == {START.loss}
    edges = brackets(judge_runs(pd.DataFrame(records)))
    assert list(zip(edges.delay, edges.seed, strict=True)) == [
        (delay, seed) for delay in (1, 4, 32) for seed in (0, 1)
    ]
    assert edges.ratio.to_numpy() == pytest.approx(factor, rel=0.05)


def test_a_minimum_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        minibatch,
        "sweep",
        lambda config, points, **_: [r for p in points for r in rows_of(p, True)],
    )
    with pytest.raises(ValueError, match="is this a minimum"):
        find_edges(default_config(), START, (1,), (0,), tmp_path, Grid())


@pytest.mark.parametrize("delay", [0, 1, 8, 32])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 100])
def test_every_run_has_time_for_twelve_e_folds(delay, steps_per_epoch):
    epochs, between = num_epochs(delay, steps_per_epoch, Grid())
    step = 1.08 * stability.max_learning_rate(delay)
    assert epochs * steps_per_epoch >= 12 * stability.growth_time(delay, step=step)
    assert epochs % between == 0


def measured(*rows, diverged_at=-1):
    """Rows of (training error, loss)."""
    names = ("train_error", "full_train_loss")
    return [{**dict(zip(names, row, strict=True)), "diverged_at": diverged_at} for row in rows]


CALM, LEAPT, UPHILL = (0.0, 0.11), (0.3, 0.15), (0.0, 0.21)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (measured(CALM, CALM), None),
        (measured(CALM, (0.01, 0.2)), None),  # on both levels is not above them
        (measured(CALM, LEAPT, CALM), 1),  # a catapult
        (measured(CALM, CALM, UPHILL, CALM), 2),
        (measured(CALM, (0.0, math.nan)), 1),
        (measured(CALM, (math.nan, 0.1)), 1),
        (measured(CALM, diverged_at=7), 0),
    ],
)
def test_a_run_has_left_once_error_or_loss_was_above_its_level(rows, first):
    assert first_left(rows, loss=0.1) == first
    assert has_left(rows, loss=0.1) is (first is not None)


def test_the_level_is_the_minimums_own():
    assert first_left(measured((0.055, 0.1)), loss=0.1, error=0.05) is None
    assert first_left(measured((0.065, 0.1)), loss=0.1, error=0.05) == 0


def test_the_rule_before_missed_catapults():
    assert not left_for_good(measured(CALM, LEAPT, CALM), 0.1)
    assert not left_for_good(measured(CALM, (0.5, 5.0), CALM, (0.5, 5.0)), 0.1)
    assert left_for_good(measured((0.5, 5.0), (0.5, 5.0), CALM), 0.1)
    assert left_for_good(measured(CALM, diverged_at=7), 0.1)


def test_an_edge_needs_a_run_on_each_side():
    run = {"delay": 1, "seed": 0, "steps": 8, "minimum_loss": 0.1, "sharpness": 2.0}
    records = pd.DataFrame(
        [{**run, **measured(CALM)[0], "index": k, "learning_rate": 0.1 + k} for k in range(2)]
    )
    with pytest.raises(ValueError, match="delay 1, seed 0: no edge among 2 learning rates"):
        brackets(judge_runs(records))


def test_the_grid_has_eight_per_cent_steps_from_the_edge_of_s_sgd():
    rates = np.array([grid_rate(4.0, index, 0.08) for index in range(-3, 4)])
    assert rates[3] == 0.5
    assert rates[1:] / rates[:-1] == pytest.approx(np.full(6, 1.08), rel=1e-4)


def minimum_config(**changes):
    config = default_config()
    config.model, config.epochs, config.num_devices = "mlp", 2, 1
    config.model_options.hidden = (8,)
    config.num_train, config.num_workers, config.worker_batch_size = 128, 1, 32
    config.learning_rate = 0.1
    config.update(changes)
    return config


def test_a_minimum_is_trained_once_and_is_nobody_elses(tmp_path, monkeypatch):
    first = minibatch.reach_minimum(minimum_config(), tmp_path)
    trained = []
    monkeypatch.setattr(
        minibatch, "train_params", lambda config, *_: trained.append(config) or first.params
    )
    again = minibatch.reach_minimum(minimum_config(), tmp_path)
    assert (first.loss, first.sharpness) == pytest.approx((again.loss, again.sharpness), rel=1e-6)
    assert first.sharpness > 0
    assert 0.0 < first.error < 1.0  # two epochs of a tiny network
    changes = {"learning_rate": 0.2, "epochs": 3, "seed": 1, "num_train": 64, "normalize": "half"}
    for field, value in changes.items():
        with pytest.raises(
            ValueError, match=rf"{field}=.* and this configuration {field}={value!r}"
        ):
            minibatch.reach_minimum(minimum_config(**{field: value}), tmp_path)
    # Where it runs is no part of what it is.
    minibatch.reach_minimum(minimum_config(num_devices=2, checkpoint_every_epochs=0), tmp_path)
    config, file = minimum_config(), tmp_path / "minimum.npz"
    with pytest.raises(ValueError, match="initial"):
        minibatch.trained_params(config, load_dataset(config), file, first.params)
    assert not trained
    (tmp_path / "minimum.json").unlink()  # whose parameters these are nobody knows
    minibatch.reach_minimum(minimum_config(seed=1), tmp_path)
    assert [config.seed for config in trained] == [1]
