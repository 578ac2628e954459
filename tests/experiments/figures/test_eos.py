"""The smoke run on real digits; claims on made-up tables, right and wrong; the picture's labels."""

import functools
import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from asgd_jax import stability
from asgd_jax.training.folder.table import open_table
from asgd_jax.transforms import delayed_sgd
from experiments.figures import eos, eos_runs
from experiments.figures.eos_runs import edges_of
from experiments.sharpness_track import Sample, make_track


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def smoke(smoke_folder):
    return eos.run(eos.PRESETS["smoke"], smoke_folder)


@functools.cache
def cpu_runs():
    """The runs of the cpu preset, with their edges: those of typical runs take a moment."""
    config = eos.PRESETS["cpu"]
    return [(run, edges_of(run, config.random_longest)) for run in eos_runs.all_runs(config)]


def made_up(profile):
    """A cpu-sized table; `profile(run, share of the time)` is sharpness over the edge."""
    records = []
    for (run, edges), seed, share in itertools.product(
        cpu_runs(), range(3), np.linspace(0.0, 1.0, 31)
    ):
        # Seeds differ by a thousandth.
        sharpness = profile(run, share) * edges.typical * (1.0 + 1e-3 * seed)
        records.append(
            {
                **{name: getattr(run, name) for name in ("panel", "delay", "momentum", "kind")},
                "data": run.data.name,
                "delays": run.delays,
                "seed": seed,
                "learning_rate": run.learning_rate,
                "edge": edges.mean,
                "mean_square_edge": edges.mean_square,
                "typical_edge": edges.typical,
                "step": round(share * run.time / run.learning_rate),
                "time": share * run.time,
                "loss": 1.0,
                "sharpness": sharpness,
                "ratio": sharpness / edges.mean,
            }
        )
    return pd.DataFrame(records)


def hovering(_, share):
    return min(0.3 + 5.0 * share, 1.02)


def failures(records):
    return [claim.claim for claim in eos.claims(pd.DataFrame(records)) if not claim.holds]


def test_sharpness_rises_to_every_edge_on_digits(smoke):
    config = eos.PRESETS["smoke"]
    ends = [
        claim
        for claim in eos.claims(pd.DataFrame(smoke))
        if re.search(r"over (h\*/eta|the Lyapunov edge), mean of the last", claim.claim)
    ]
    assert len(ends) == 2 + 2 + 2 + 3  # cross-entropy on so few images is over at once
    for claim in ends:
        assert claim.measured == pytest.approx(1.0, abs=0.1), claim
    runs = len(list(eos_runs.all_runs(config))) * len(config.seeds)
    assert len(smoke) == (config.num_samples + 1) * runs
    assert all(list(record) == list(smoke[0]) for record in smoke)
    for record in smoke:
        assert record["ratio"] == pytest.approx(record["sharpness"] / record["edge"])
    # Loss falls all the while: sharpness doesn't hover because descent has stopped at a start.
    assert smoke[config.num_samples]["loss"] < 0.1 * smoke[0]["loss"]


def test_finished_runs_are_kept(smoke, smoke_folder, monkeypatch):
    monkeypatch.setattr(eos_runs, "make_track", None)
    assert eos.run(eos.PRESETS["smoke"], smoke_folder) == smoke
    with pytest.raises(ValueError, match="seeds"):
        eos.run(eos.PRESETS["smoke"]._replace(seeds=(1,)), smoke_folder)


def test_a_killed_figure_goes_on(smoke, smoke_folder, tmp_path, monkeypatch):
    table = open_table(tmp_path / "eos", eos.PRESETS["smoke"]._asdict())
    kept = open_table(smoke_folder / "eos", eos.PRESETS["smoke"]._asdict()).runs
    keys = list(kept)
    file = (smoke_folder / "eos" / "records.csv").read_text().splitlines(keepends=True)
    lost = len(kept[keys[-1]])
    table.file.parent.mkdir()
    table.file.write_text("".join(file[:-lost]))
    made = []

    def track_of(_):
        def track(optimizer, steps, start):
            made.append(steps)
            return [Sample(step, 0.5, 2.0) for step in steps]

        return track

    monkeypatch.setattr(eos_runs, "make_track", track_of)
    again = eos.run(eos.PRESETS["smoke"], tmp_path)
    assert len(made) == 1
    assert again[:-lost] == smoke[:-lost]
    assert all(record["sharpness"] == 2.0 for record in again[-lost:])


def test_the_made_up_table_holds():
    claims = eos.claims(made_up(hovering))
    assert all(claim.holds for claim in claims)
    assert len({claim.claim for claim in claims}) == len(claims)


def test_random_delays_at_another_edge_fail():
    def at(column):
        edges = {run: getattr(each, column) / each.typical for run, each in cpu_runs()}
        return failures(made_up(lambda run, share: hovering(run, share) * edges[run]))

    assert any("(none or all): sharpness over the Lyapunov edge" in claim for claim in at("mean"))
    assert any("(none or all): sharpness over the mean edge" in claim for claim in at("mean"))
    square = at("mean_square")
    for name in ("uniform", "none or all"):
        assert any(f"({name}): sharpness over the mean-square edge" in claim for claim in square)


def test_sharpness_that_ignores_the_delay_fails():
    def two_over_eta(run, share):
        step = 2.0 / stability.max_learning_rate(run.delay, momentum=run.momentum, kind=run.kind)
        return hovering(run, share) * step

    broken = failures(made_up(two_over_eta))
    constant = [run for run, _ in cpu_runs() if run.delay and run.delays == "constant"]
    assert sum("over h*/eta" in claim for claim in broken) == len(constant)
    assert any("ratio of their h*" in claim for claim in broken)
    assert any("all delays end at one sharpness" in claim for claim in broken)


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (lambda run, share: 0.3 + 0.4 * share, "ended before it reached the edge, highest 0.7"),
        (lambda run, share: 0.3 if share < 0.2 else 2.0 - 0.8 * share, "and is falling"),
        (lambda run, share: 0.3 + share, "not on its way to the edge"),
        (lambda run, share: 0.3 if share < 0.9 else math.nan, "the run diverged"),
    ],
)
def test_a_run_that_misses_its_edge_says_why(profile, reason):
    def one_misses(run, share):
        misses = run.panel == eos.MOMENTUM and run.kind == "shifted" and run.momentum == 0.9
        return profile(run, share) if misses else hovering(run, share)

    broken = [claim for claim in failures(made_up(one_misses)) if "last third (" in claim]
    assert len(broken) == 1
    assert "shifted 0.9" in broken[0]
    assert reason in broken[0]


def test_a_start_at_the_edge_and_a_wild_end_fail():
    assert any("starts" in claim for claim in failures(made_up(lambda run, share: 1.0)))
    swinging = made_up(lambda run, share: 0.3 if share == 0 else 1 + 0.3 * math.sin(300 * share))
    assert any("hovers" in claim for claim in failures(swinging))


@pytest.mark.parametrize("preset", eos.PRESETS)
def test_rates_of_a_preset_put_the_edges_where_it_says(preset):
    config = eos.PRESETS[preset]
    runs = list(eos_runs.all_runs(config))
    for run in runs:
        if run.panel == eos.RESCALED:
            edge = stability.max_sharpness(run.learning_rate, run.delay)
            assert edge == pytest.approx(config.common_edge)
        elif run.panel == eos.SAME_RATE:
            assert run.learning_rate == config.same_rate
    assert len(set(runs)) == len(runs)


def test_undamped_momentum_at_the_smaller_rate_is_the_damped_run():
    track = make_track(eos_runs.network_problem(eos.PRESETS["smoke"].data, seed=0))
    damped, undamped = (
        track(
            delayed_sgd(
                jnp.float32(rate), delay=2, momentum=0.9, kind="heavy_ball", dampening=dampening
            ),
            [40],
        )[0]
        for rate, dampening in ((0.1, True), (0.01, False))
    )
    assert undamped.loss == pytest.approx(damped.loss, rel=1e-4)
    assert undamped.sharpness == pytest.approx(damped.sharpness, rel=1e-3)


@pytest.mark.realdata
def test_mnist_is_brought_to_the_scale_of_digits(tfds_data_dir):
    data = eos.PRESETS["cpu"].same_rate_data
    problem = eos_runs.network_problem(data, seed=0)
    images, targets = problem.batches[0]
    assert len(images) == len(targets) == data.num_train
    norms = np.linalg.norm(np.asarray(images).reshape(data.num_train, -1), axis=1)
    assert np.sqrt(np.mean(norms**2)) == pytest.approx(8.0, rel=1e-5)


def test_the_picture_names_every_run_and_draws_its_edge():
    records = made_up(hovering)
    figure = eos.plot(records)
    assert figure.get_suptitle()
    runs = [run for run, _ in cpu_runs()]
    panels = (eos.SAME_RATE, eos.RESCALED, eos.MOMENTUM, eos.CROSS_ENTROPY, eos.RANDOM)
    for axis, panel in zip(figure.axes, panels, strict=True):
        here = [run for run in runs if run.panel == panel]
        assert axis.get_title()
        assert axis.get_xlabel()
        dashed = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
        edges = set(records[records.panel == panel].edge)
        assert {line.get_ydata()[0] for line in dashed} == edges
        assert len({text.get_text() for text in axis.texts}) == len(here)
    figure.canvas.draw()
