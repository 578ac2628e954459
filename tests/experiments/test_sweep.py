"""Sweeps against single runs of `train`: the same numbers, resumable, divergence contained."""

import math

import numpy as np
import pytest

from asgd_jax.experiments import sweep as sweep_module
from asgd_jax.experiments.sweep import group_runs, point_config, sweep
from asgd_jax.training import default_config, train
from asgd_jax.training.feed import load_dataset
from asgd_jax.training.metrics import read_rows


def small_config(**changes):
    config = default_config()
    config.model = "mlp"
    config.model_options.hidden = (16,)
    config.num_train, config.num_validation = 200, 100
    config.num_workers, config.worker_batch_size = 4, 10
    config.epochs, config.num_devices = 2, 1
    config.update(changes)
    return config


def curve(records, point, column):
    mine = [r for r in records if all(r[field] == value for field, value in point.items())]
    return [record[column] for record in mine]


POINTS = [
    {"learning_rate": rate, "delay": delay, "num_workers": delay + 1, "seed": seed}
    for rate, delay, seed in ((0.05, 0, 0), (0.05, 3, 1), (0.2, 3, 0))
]


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory):
    """The rows that `train` writes for every point."""
    folder = tmp_path_factory.mktemp("single")
    for number, point in enumerate(POINTS):
        config = point_config(small_config(), point)
        train(config, folder / str(number), progress=False)
    return [read_rows(folder / str(number)) for number in range(len(POINTS))]


@pytest.mark.parametrize("runs_at_once", [1, 4])
def test_a_sweep_gives_the_curves_of_single_runs(single_runs, runs_at_once):
    config = small_config()
    records = sweep(config, POINTS, runs_at_once=runs_at_once)
    assert len(records) == len(POINTS) * config.epochs
    for point, rows in zip(POINTS, single_runs, strict=True):
        assert curve(records, point, "steps") == [row["step"] for row in rows]
        for column in ("train_loss", "train_error", "validation_loss", "validation_error"):
            assert curve(records, point, column) == pytest.approx(
                [row[column] for row in rows], rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0.9, "momentum_kind": "shifted", "dampening": True},
        {"momentum": 0.5, "delay_distribution": "uniform"},
        {"delay_distribution": "workers", "worker_schedule": "normal"},
    ],
    ids=["shifted", "heavy_ball, uniform", "workers"],
)
def test_momentum_and_random_delays_are_those_of_single_runs(tmp_path, changes):
    config = small_config(delay=3, learning_rate=0.05, **changes)
    (record,) = sweep(config, [{"seed": 2}], runs_at_once=1)[-1:]
    config.seed = 2
    final = train(config, tmp_path, progress=False)["final"]
    assert record["validation_loss"] == pytest.approx(final["validation_loss"], rel=1e-4)
    assert record["train_loss"] == pytest.approx(final["train_loss"], rel=1e-4)


@pytest.mark.parametrize("runs_at_once", [1, 4])
def test_a_diverging_run_ends_and_leaves_the_others_alone(single_runs, runs_at_once):
    worse = dict(POINTS[1], learning_rate=1e4)
    records = sweep(small_config(), [POINTS[1], worse, POINTS[2]], runs_at_once=runs_at_once)
    (last,) = [record for record in records if record["learning_rate"] == 1e4]
    assert 0 < last["diverged_at"] < 10
    for number in (1, 2):
        assert curve(records, POINTS[number], "validation_error") == pytest.approx(
            [row["validation_error"] for row in single_runs[number]], abs=1e-6
        )


def test_a_killed_sweep_continues(tmp_path, monkeypatch):
    config = small_config()
    whole = sweep(config, POINTS, work=tmp_path / "whole", runs_at_once=1)
    blocks = sweep_module.run_blocks

    def killed_in_the_middle(*arguments):
        for number, block in enumerate(blocks(*arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(sweep_module, "run_blocks", killed_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, POINTS, work=tmp_path / "killed", runs_at_once=1)
    done = []

    def counted(runs, *arguments):
        done.extend(runs.indices)
        return blocks(runs, *arguments)

    monkeypatch.setattr(sweep_module, "run_blocks", counted)
    assert str(sweep(config, POINTS, work=tmp_path / "killed", runs_at_once=1)) == str(whole)
    assert len(done) == len(POINTS) - 1
    assert str(sweep(config, POINTS, work=tmp_path / "killed", runs_at_once=1)) == str(whole)
    assert len(done) == len(POINTS) - 1
    with pytest.raises(ValueError, match="width"):
        sweep(small_config(width=2.0), POINTS, work=tmp_path / "killed")


def test_one_program_for_all_points_of_one_shape():
    config = small_config()
    dataset = load_dataset(config)

    def num_programs(points, runs_at_once=1):
        configs = [point_config(config, point) for point in points]
        groups = group_runs(configs, range(len(points)), dataset, runs_at_once, False)
        assert sorted(index for runs in groups for index in runs.indices) == list(
            range(len(points))
        )
        return len(groups)

    assert num_programs(POINTS) == 1
    assert num_programs([{"delay": delay} for delay in (0, 1, 3)]) == 3  # samples of an update
    momenta = [{"momentum": m, "momentum_kind": "shifted"} for m in (0.0, 0.5, 0.9)]
    assert num_programs(momenta) == 2
    rows = [{"epochs": 4, "eval_every_epochs": 2}, {"epochs": 2, "eval_every_epochs": 1}]
    assert num_programs(rows) == 1
    assert num_programs(rows, runs_at_once=2) == 2  # one vmap measures at the same epochs


def test_a_sweep_over_eight_devices(single_runs):
    records = sweep(small_config(num_devices=8), POINTS, runs_at_once=2)
    alone = [row["validation_loss"] for rows in single_runs for row in rows]
    assert [record["validation_loss"] for record in records] == pytest.approx(alone, rel=1e-4)


def test_runs_leave_from_given_parameters():
    """From zero parameters a linear loss cannot fall below log 10 at once: nothing leaves there."""
    import jax

    from asgd_jax.training.setup import make_model

    config = small_config(epochs=6, learning_rate=0.01)
    images = np.zeros((1, 8, 8, 1), np.float32)
    model = make_model(config, 10)
    params = model.init(jax.random.key(0), images, train=False)["params"]
    zeros = jax.tree.map(np.zeros_like, params)
    points = [{"learning_rate": rate} for rate in (0.01, 5.0)]
    records = sweep(config, points, initial=zeros, leave_loss=math.log(10) + 0.5)
    stayed = [record for record in records if record["learning_rate"] == 0.01]
    left = [record for record in records if record["learning_rate"] == 5.0]
    assert len(stayed) == 6
    assert stayed[0]["full_train_loss"] == pytest.approx(math.log(10), rel=0.01)
    limit = math.log(10) + 0.5
    above = [record["full_train_loss"] > limit for record in left]
    assert len(left) == 6 or above[-2:] == [True, True]


@pytest.mark.realdata
def test_streamed_data_is_trained_run_by_run(tmp_path):
    config = small_config(
        dataset="imagenet2012", image_size=32, num_train=None, num_validation=None,
        worker_batch_size=100, epochs=1,
    )  # fmt: skip
    points = [{"delay": 3, "learning_rate": rate} for rate in (1e-3, 1e6)]
    records = sweep(config, points, work=tmp_path)
    assert [record["learning_rate"] for record in records] == [0.001, 1_000_000]
    assert records[0]["steps"] == 8
    assert records[0]["diverged_at"] == -1
    assert 0 < records[1]["diverged_at"] < 8
    assert set(records[0]) == {"epoch", "full_train_loss", *points[0], *read_columns()}
    with pytest.raises(ValueError, match="lives in memory"):
        sweep(config, points, work=tmp_path / "other", leave_loss=1.0)


def read_columns():
    return {
        *("steps", "train_loss", "train_error", "validation_loss", "validation_error"),
        "diverged_at",
    }


@pytest.mark.parametrize(
    ("changes", "point", "message"),
    [
        ({}, {"learning_rat": 1.0}, "learning_rat"),
        ({"batch_stats": "recalibrate"}, {"seed": 0}, "recalibrate"),
        ({}, {"delay": 2}, "delay=2 with num_workers=4"),
        ({"num_devices": 99}, {"seed": 0}, "num_devices=99"),
    ],
)
def test_what_a_sweep_refuses(changes, point, message):
    with pytest.raises(ValueError, match=message):
        sweep(small_config(**changes), [point])
