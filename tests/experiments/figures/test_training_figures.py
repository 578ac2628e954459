"""The figures of training runs: every preset is valid, smoke runs through, killed ones go on."""

import csv
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from scipy import stats

from asgd_jax.training import default_config
from asgd_jax.training.config import validate_config
from asgd_jax.training.folder.table import read_records
from experiments import reproduce as driver
from experiments.figures import (
    fig01,
    fig03,
    fig05,
    fig09,
    spikes,
    training_runs,
)
from experiments.figures.fig05 import NORMAL, SHIFTED

ROOT = Path(__file__).parents[3]
GROUPS = [("1", "13"), ("2", "12"), ("3",), ("5", "9"), ("11",)]


def committed(folder):
    return pd.DataFrame(read_records(ROOT / "results" / folder / "records.csv"))


def training_configs(config):
    """Those of runs, in a preset or its panels."""
    for value in config.values():
        if isinstance(value, ConfigDict) and set(value) == set(default_config()):
            yield value
        elif isinstance(value, ConfigDict):
            yield from training_configs(value)


@pytest.mark.parametrize("figure", [figure for group in GROUPS for figure in group])
def test_presets_differ_in_configuration_only(figure):
    presets = importlib.import_module(driver.FIGURES[figure]).PRESETS
    assert set(presets) == {"smoke", "cpu", "paper"}
    assert len({tuple(sorted(config)) for config in presets.values()}) == 1
    for config in presets.values():
        found = list(training_configs(config))
        assert found
        for train in found:
            validate_config(train)


@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_the_smoke_preset_runs_through_and_shares_runs(group, tmp_path, monkeypatch):
    from asgd_jax.training import sweep

    blocks = sweep.run_blocks
    for number, figure in enumerate(group):
        summary = driver.reproduce(figure, "smoke", tmp_path)
        assert summary["claims"]
        assert all(isinstance(claim["holds"], bool) for claim in summary["claims"])
        assert (tmp_path / driver.folder_name(figure) / "records.csv").stat().st_size > 500
        if number == 0:  # the second figure of a group trains nothing
            monkeypatch.setattr(sweep, "run_blocks", None)
    monkeypatch.setattr(sweep, "run_blocks", blocks)
    driver.clean_work(tmp_path)
    assert not (tmp_path / ".work").exists()


@pytest.mark.slow
def test_a_killed_figure_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py")]
    command += ["--figure=3", "--preset=smoke", "--out=r"]
    table = tmp_path / "r" / ".work" / "smoke" / "rates_vgg" / "records.csv"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not table.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "r" / "fig03").exists()
    first = table.read_text().splitlines()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "claims hold" in done.stdout
    records = (tmp_path / "r" / "fig03" / "records.csv").read_text().splitlines()
    # The finished runs were kept as they were: only the key is left out, panel and chance are new.
    kept = [list(row.values())[1:] for row in csv.DictReader(first)]
    rows = [list(row.values())[1:-1] for row in csv.DictReader(records)]
    assert kept == [row for row in rows if row in kept]


def test_means_and_deviations_over_seeds():
    records = [
        {"seed": seed, "epoch": epoch, "validation_error": 0.1 * epoch + seed, "diverged_at": -1}
        for seed in (0, 1)
        for epoch in (1, 2)
    ]
    table = pd.DataFrame(records)
    curve = training_runs.over_seeds(training_runs.by_seed(table, [1, 2], "validation_error"))
    assert curve.mean == pytest.approx([0.6, 0.7])
    assert curve.std == pytest.approx([0.5**0.5] * 2)
    assert training_runs.final_errors(table, 2) == pytest.approx([0.2, 1.2])
    table.loc[3, "diverged_at"] = 7
    assert training_runs.final_errors(table, 2) == pytest.approx([0.2, 0.9])
    assert training_runs.did_diverge(table)
    alone = training_runs.over_seeds(training_runs.by_seed(table[:2], [1, 2], "validation_error"))
    assert np.isnan(alone.std).all()
    assert list(alone.low) == list(alone.mean) == list(alone.high)


@pytest.mark.parametrize(
    ("dataset", "chance"), [("digits", 0.9), ("cifar100", 0.99), ("imagenet2012", 0.999)]
)
@pytest.mark.parametrize("module", [fig01, fig03, fig05])
def test_a_diverged_arm_has_the_error_of_a_guess_among_its_classes(
    module, dataset, chance, monkeypatch, tmp_path
):
    def diverging(config, points, **_):
        row = {"epoch": 1, "validation_error": 0.5, "train_error": 0.5, "diverged_at": 3}
        return [point | row for point in points]

    monkeypatch.setattr(module, "sweep", diverging)
    if module is fig01:  # it measures besides between epochs
        monkeypatch.setattr(fig01, "measure_along", lambda *args, **_: diverging(*args[:2]))
    config = module.PRESETS["smoke"].copy_and_resolve_references()
    for train in training_configs(config):
        train.dataset = dataset
    records = pd.DataFrame(module.run(config, tmp_path))
    for column in ("validation_error", "train_error"):
        assert set(training_runs.final_errors(records, 1, column)) == {chance}


@pytest.mark.parametrize("figure", ["1", "3", "5", "9", "13"])
@pytest.mark.filterwarnings("error")
def test_one_seed_is_drawn_without_a_band(figure):
    """No spread between seeds is known then, and no claim rests on one."""
    module = importlib.import_module(driver.FIGURES[figure])
    records = committed(driver.folder_name(figure))
    records = records[records.seed == 0]
    assert all("nan" not in claim.expected for claim in module.claims(records))
    module.plot(records).canvas.draw()


def test_equivalence_of_delays_is_the_paired_test():
    records = committed("fig09")
    arms = [fig05.errors_of(records, arm) for arm in (NORMAL, SHIFTED)]
    expected = stats.ttest_rel(*arms).confidence_interval(0.9)
    (claim,) = fig09.claims(records)
    assert claim.interval == pytest.approx(tuple(expected), rel=1e-9)


def spiky(arms):
    """A table of fig. 11 (a): calm runs of 400 epochs, with so many spikes a run of an arm."""
    rows = []
    for arm in spikes.ARM_COLOURS:
        for rate in (0.03, 0.045, 0.06):
            for seed in range(5):
                error = np.full(400, 0.001)
                error[20 : 20 + 10 * arms.get((arm, rate), 0) : 10] = 0.5
                run = {"arm": arm, "learning_rate": rate, "seed": seed, "sharpness": 1.0}
                rows += [
                    {**run, "epoch": k + 1, "steps": 90 * (k + 1), "full_train_error": each}
                    for k, each in enumerate(error)
                ]
    return pd.DataFrame(rows)


AS_PREDICTED = {
    (spikes.WITH_DAMPED, 0.045): 3,
    (spikes.WITH_DAMPED, 0.06): 6,
    (spikes.NONE, 0.06): 3,
}


def test_the_order_of_arms_is_that_of_poisson_intervals():
    assert all(claim.holds for claim in spikes.claims(spiky(AS_PREDICTED)))
    exposure = 5 * (399 - 3) * 90 / 1000  # an epoch that follows a spike is at no risk
    found = spikes.spike_rate(spikes.spike_table(spiky(AS_PREDICTED)), spikes.NONE, 0.06)
    assert found.value == pytest.approx(15 / exposure)
    # The ends are the means at which so many, or so few, are seen in 2.5 % of all cases.
    assert stats.poisson.sf(14, found.low * exposure) == pytest.approx(0.025)
    assert stats.poisson.cdf(15, found.high * exposure) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({(spikes.NONE, 0.045): 3}, [0]),
        ({(spikes.SHIFTED, 0.045): 3}, [1, 3]),
        ({(spikes.SHIFTED, 0.06): 3}, [2]),
        ({(spikes.WITH_DAMPED, 0.03): 1}, [3]),
    ],
)
def test_every_claim_on_spikes_can_fail(change, failing):
    claims = spikes.claims(spiky(AS_PREDICTED | change))
    assert [number for number, claim in enumerate(claims) if not claim.holds] == failing


def test_a_run_that_never_settles_is_at_no_risk():
    assert spikes.count_crossings(np.full(10, 0.3)) == (0, 0)
    assert np.isnan(spikes.poisson_rate(0, 0.0)).all()
    # Nor is one that has left and does not come back, from then on.
    assert spikes.count_crossings(np.array([0.001, np.nan, np.nan])) == (1, 1)
