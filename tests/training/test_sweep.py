"""Sweeps against single runs of `train`: the same numbers, resumable, divergence contained."""

import math
import sys
from collections import OrderedDict
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.training import default_config, sweep_groups, train
from asgd_jax.training import single_runs as single_runs_module
from asgd_jax.training import sweep as sweep_module
from asgd_jax.training.feed import load_dataset
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.sweep import point_config, sweep
from asgd_jax.training.sweep_groups import group_runs


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
    ("seed", "changes"),
    [
        (2, {"momentum": 0.9, "momentum_kind": "shifted", "dampening": True}),
        (2**31, {"momentum": 0.5, "delay_distribution": "uniform"}),
        (2**32 - 1, {"delay_distribution": "workers", "worker_schedule": "normal"}),
    ],
    ids=["shifted", "heavy_ball, uniform", "workers"],
)
def test_momentum_random_delays_and_large_seeds_are_those_of_single_runs(tmp_path, seed, changes):
    config = small_config(delay=3, learning_rate=0.05, **changes)
    (record,) = sweep(config, [{"seed": seed}], runs_at_once=1)[-1:]
    assert record["seed"] == seed
    config.seed = seed
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


@pytest.mark.parametrize("runs_at_once", [1, 4])
def test_the_next_sweep_of_the_same_shapes_compiles_nothing(monkeypatch, runs_at_once):
    """A search for an edge sweeps a dozen times; other data and momenta are programs anew."""
    compile_runs, compiled = sweep_groups.compile_runs, []

    def counted(*arguments):
        compiled.append(compile_runs(*arguments))
        return compiled[-1]

    monkeypatch.setattr(sweep_groups, "compile_runs", counted)
    monkeypatch.setattr(sweep_groups, "_programs", OrderedDict())
    first = sweep(small_config(), POINTS, runs_at_once=runs_at_once)
    other = [dict(point, learning_rate=point["learning_rate"] / 2) for point in POINTS]
    second = sweep(small_config(), other, runs_at_once=runs_at_once)
    assert curve(second, other[0], "train_loss") != curve(first, POINTS[0], "train_loss")
    assert str(sweep(small_config(), POINTS, runs_at_once=runs_at_once)) == str(first)
    assert [program._cache_size() for program in compiled] == [1]
    for number, change in enumerate(({"num_train": 160}, {"normalize": "half"}, {"momentum": 0.9})):
        sweep(small_config(**change), POINTS, runs_at_once=runs_at_once)
        assert len(compiled) == number + 2


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
    points = [{"learning_rate": rate} for rate in (0.01, 20.0)]
    records = sweep(config, points, initial=zeros, leave_loss=math.log(10) + 0.5)
    stayed = [record for record in records if record["learning_rate"] == 0.01]
    left = [record for record in records if record["learning_rate"] == 20.0]
    assert len(stayed) == 6
    assert stayed[0]["full_train_loss"] == pytest.approx(math.log(10), rel=0.01)
    limit = math.log(10) + 0.5
    above = [record["full_train_loss"] > limit for record in left]
    twice = [above[k] and above[k - 1] for k in range(1, len(left))]
    assert twice == [False] * (len(twice) - 1) + [True]  # its last row, whoever shares its vmap


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
    full = {"full_train_loss", "full_train_error"}
    assert set(records[0]) == {"epoch", *full, *points[0], *read_columns()}
    with pytest.raises(ValueError, match="lives in memory"):
        sweep(config, points, work=tmp_path / "other", leave_loss=1.0)


def read_columns():
    return {
        *("steps", "train_loss", "train_error", "validation_loss", "validation_error"),
        "diverged_at",
    }


@pytest.fixture
def made(monkeypatch):
    """The configurations that are run, in order; each gives a row and trains nothing."""
    found = []

    def blocks(runs, *_):
        columns = dict.fromkeys(sorted(read_columns()), 0.5) | {"full_train_loss": math.nan}
        for index, config in zip(runs.indices, runs.configs, strict=True):
            found.append(config)
            yield [(index, [columns | {"steps": 4, "diverged_at": -1}])]

    monkeypatch.setattr(sweep_module, "run_blocks", blocks)
    return found


def test_every_point_has_its_own_data(made, monkeypatch):
    """Whatever the other points have: the samples on the device are those that `train` loads."""
    on_device = []
    blocks = sweep_module.run_blocks

    def recorded(runs, samples, *rest):
        for config in runs.configs:
            on_device.append((config, samples, runs.shared.facts))
        return blocks(runs, samples, *rest)

    monkeypatch.setattr(sweep_module, "run_blocks", recorded)
    points = [
        {"num_train": train, "num_validation": 90, "normalize": way, "eval_batch_size": size}
        for train, way, size in (
            (80, "own", 45),
            (160, "own", 45),
            (80, "half", 45),
            (80, "own", 9),
        )
    ]
    assert len(sweep(small_config(), points)) == 4
    assert [config.num_train for config in made] == [80, 160, 80, 80]
    for point, (config, samples, facts) in zip(points, on_device, strict=True):
        wanted = load_dataset(point_config(small_config(), point))
        assert {field: config[field] for field in point} == point
        np.testing.assert_array_equal(samples.labels, wanted.train_labels)
        np.testing.assert_array_equal(samples.images, wanted.train_images)
        size = config.eval_batch_size
        assert samples.validation_batches[0].shape[:2] == (90 // size, size)
        images = wanted.train_images[:2]
        np.testing.assert_array_equal(facts.normalize(images), data.normalizer(wanted)(images))


def test_values_with_blanks_are_found_again(tmp_path, made):
    traces = [tmp_path / name for name in ("a trace.txt", 'b, "c".txt')]
    for trace in traces:
        trace.write_text("0\n1\n")
    points = [
        {"decay_epochs": epochs, "delay_trace": str(trace)}
        for epochs in ((1, 2), (1.5,), ())
        for trace in traces
    ]
    config = small_config(delay=1, delay_distribution="trace")
    first = sweep(config, points, work=tmp_path / "work")
    before = (tmp_path / "work" / "records.csv").read_bytes()
    assert str(sweep(config, points, work=tmp_path / "work")) == str(first)
    assert (tmp_path / "work" / "records.csv").read_bytes() == before
    assert [config.decay_epochs for config in made] == [p["decay_epochs"] for p in points]
    assert [{name: r[name] for name in points[0]} for r in first] == points
    traces[0].write_text("1\n0\n")  # another trace of the same name is another run
    sweep(config, points, work=tmp_path / "work")
    assert [config.delay_trace for config in made[6:]] == [str(traces[0])] * 3


def test_points_may_hold_numbers_of_numpy_and_jax(tmp_path, made):
    plain = {"learning_rate": 0.5, "momentum": 0.0, "delay": 3, "dampening": True, "seed": 1}
    plain["decay_epochs"] = (1, 2)
    point = {
        "learning_rate": np.float32(0.5),
        "decay_epochs": (np.int64(1), 2),
        "momentum": 0,
        "delay": np.int64(3),
        "dampening": np.bool_(True),
        "seed": jnp.int32(1),
    }
    records = sweep(small_config(), [point, plain, point], work=tmp_path)
    assert len(made) == 1
    assert len(records) == 3
    for record in records:
        assert {name: record[name] for name in plain} == plain
        assert all(type(record[name]) is type(value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"delay": 3}, r"name the same fields: \['learning_rate'\] and \['delay'\]"),
        ({}, "name the same fields"),
        ({"learning_rate": "fast"}, "learning_rate='fast': it must be of type float"),
        ({"learning_rate": np.ones(2)}, "it must be of type float"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
    ],
)
def test_all_points_are_checked_before_the_first_run(tmp_path, made, point, message):
    with pytest.raises(ValueError, match=message):
        sweep(small_config(), [{"learning_rate": 0.1}, point], work=tmp_path / "work")
    assert not made
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("num_train", 200, 5000),
        ("num_devices", 1, 99),
        ("model", "mlp", "lenet"),
        ("dataset", "digits", "svhn"),
        ("delay_trace", None, "no such file"),
    ],
)
def test_what_data_and_devices_refuse_is_refused_first(tmp_path, made, field, good, bad):
    base = {"delay_distribution": "constant", field: good}
    other = base | {field: bad}
    if field == "delay_trace":
        other["delay_distribution"] = "trace"
    with pytest.raises(ValueError, match=str(bad)):
        sweep(small_config(), [base, other], work=tmp_path / "work")
    assert not made
    assert not (tmp_path / "work").exists()


def test_a_folder_takes_the_same_sweep_elsewhere_and_no_other(tmp_path, made):
    points = [{"seed": 0}]
    first = sweep(small_config(), points, work=tmp_path)
    moved = small_config(num_devices=2, data_dir="/elsewhere", checkpoint_every_epochs=7)
    assert str(sweep(moved, points, work=tmp_path)) == str(first)
    assert len(made) == 1
    for changes in ({"epochs": 3}, {"eval_every_epochs": 2}, {"width": 2.0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            sweep(small_config(**changes), points, work=tmp_path)
    with pytest.raises(ValueError, match="fields of a point"):
        sweep(small_config(), [{"seed": 0, "delay": 3}], work=tmp_path)
    assert sweep(small_config(), []) == []


def test_a_point_put_in_before_others_leaves_their_folders_alone(tmp_path, made, monkeypatch):
    """Streamed runs: an interrupted one goes on in its own folder, wherever its point stands."""
    folders = {}

    def fake_train(config, workdir, *, progress):
        assert folders.setdefault(config.learning_rate, workdir) == workdir
        if interrupt:
            raise KeyboardInterrupt
        return {"diverged_at_step": None}

    row = dict.fromkeys(("epoch", "step", *read_columns()), 1.0)
    monkeypatch.setattr(single_runs_module, "train", fake_train)
    monkeypatch.setattr(single_runs_module, "read_rows", lambda workdir: [row])
    config = small_config(dataset="imagenet2012", num_train=None, num_validation=None)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        sweep(config, [{"learning_rate": 0.1}], work=tmp_path)
    interrupt = False
    points = [{"learning_rate": rate} for rate in (0.2, 0.1)]
    assert [r["learning_rate"] for r in sweep(config, points, work=tmp_path)] == [0.2, 0.1]
    assert len(set(folders.values())) == 2
    # A point may choose between data in memory and streamed data.
    config.learning_rate = 0.3
    both = [{"dataset": name} for name in ("imagenet2012", "digits")]
    records = sweep(config, both, work=tmp_path / "both")
    assert [record["dataset"] for record in records] == ["imagenet2012", "digits"]
    assert [config.dataset for config in made] == ["digits"]


@pytest.mark.parametrize("stream", [None, SimpleNamespace()])
def test_a_sweep_needs_no_standard_error(made, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(sweep(small_config(), [{"seed": 0}])) == 1


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
