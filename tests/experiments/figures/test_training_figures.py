"""The figures of training runs: every preset is valid, smoke runs through, killed ones go on."""

import importlib
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from asgd_jax.experiments import reproduce as driver
from asgd_jax.experiments.figures import fig11, training_runs
from asgd_jax.training import default_config
from asgd_jax.training.config import validate_config

ROOT = Path(__file__).parents[3]
GROUPS = [("1", "13"), ("2", "12"), ("3",), ("5", "9"), ("11",)]


def training_configs(config):
    return [
        value
        for value in config.values()
        if isinstance(value, ConfigDict) and set(value) == set(default_config())
    ]


@pytest.mark.parametrize("figure", [figure for group in GROUPS for figure in group])
def test_presets_differ_in_configuration_only(figure):
    presets = importlib.import_module(driver.FIGURES[figure]).PRESETS
    assert set(presets) == {"smoke", "cpu", "paper"}
    assert len({tuple(sorted(config)) for config in presets.values()}) == 1
    for config in presets.values():
        (train,) = training_configs(config)
        validate_config(train)


@pytest.mark.parametrize(
    ("figure", "file", "arm"),
    [
        ("1", "mnist_cnn", "ssgd"),
        ("2", "cifar10_vgg11", "ssgd"),
        ("3", "cifar10_vgg11", "ssgd"),
        ("5", "imagenet_resnet50", "ssgd"),
        ("11", "cifar10_resnet44", "no_momentum"),
    ],
)
def test_the_paper_preset_is_the_shipped_config(figure, file, arm):
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    config = importlib.import_module(driver.FIGURES[figure]).PRESETS["paper"]
    (train,) = training_configs(config)
    train, wanted = train.to_dict(), shipped.get_config(arm).to_dict()
    different = {field for field in wanted if train[field] != wanted[field]}
    # Rows are an epoch's; the ramp and its start are fields of figure 5's arms.
    assert different <= {"epochs", "log_every_steps", "warmup_from"}


@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_the_smoke_preset_runs_through_and_shares_runs(group, tmp_path, monkeypatch):
    from asgd_jax.experiments import sweep

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
    command += ["--figure=1", "--preset=smoke", "--out=r"]
    table = tmp_path / "r" / ".work" / "smoke" / "mnist_rates" / "records.csv"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not table.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "r" / "fig01").exists()
    first = table.read_text().splitlines()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "claims hold" in done.stdout
    records = (tmp_path / "r" / "fig01" / "records.csv").read_text().splitlines()
    # The finished runs were kept as they were: only the key of a run is left out of the records.
    assert [line.partition(",")[2] for line in first[1:]] == [
        line for line in records if line in {row.partition(",")[2] for row in first[1:]}
    ]


def test_means_and_deviations_over_seeds():
    records = [
        {"seed": seed, "epoch": epoch, "validation_error": 0.1 * epoch + seed, "diverged_at": -1}
        for seed in (0, 1)
        for epoch in (1, 2)
    ]
    curve = training_runs.over_seeds(records, [1, 2], "validation_error")
    assert curve.mean == pytest.approx([0.6, 0.7])
    assert curve.std == pytest.approx([0.5**0.5] * 2)
    assert training_runs.final_errors(records, 2) == pytest.approx([0.2, 1.2])
    records[-1] |= {"diverged_at": 7}
    assert training_runs.final_errors(records, 2) == pytest.approx([0.2, training_runs.CHANCE])
    assert training_runs.did_diverge(records)


def test_spikes_are_counted_by_the_stated_rule():
    rng = np.random.default_rng(0)
    calm = 0.05 + 0.005 * rng.random(60)
    assert fig11.count_spikes(calm) == 0
    calm[[10, 40, 41, 50]] = 0.5  # the first half does not count, neighbours count once
    assert fig11.count_spikes(calm) == 2
    falling = np.linspace(1.0, 0.0, 60)
    assert fig11.count_spikes(falling) == 0
