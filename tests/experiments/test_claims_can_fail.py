"""For every claim of every figure: records at which it fails.

A claim that no records can refute says nothing. Each line below is a pattern of claims and a change
of the committed records that makes every claim of that pattern fail.
"""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asgd_jax.training.folder.table import read_records
from experiments.figures import mitigations, spikes, spikes_resnet
from experiments.figures.fig05 import NONE, NORMAL, SHIFTED, SQRT, STANDARD
from experiments.reduced import REDUCED_RUNS, make_claim
from experiments.reproduce import FIGURES, folder_name

RESULTS = Path(__file__).parents[2] / "results"


def put(column, value, **where):
    """Sets a column, to a number or a function of the rows, where other columns have a value."""

    def change(table):
        rows = np.all([table[name] == wanted for name, wanted in where.items()], axis=0)
        chosen = table.loc[rows] if where else table
        table[column] = table[column].astype(float)
        new = value(chosen) if callable(value) else value
        table.loc[chosen.index, column] = new
        return table

    return change


def scale(column, factor, **where):
    return put(column, lambda rows: factor * rows[column], **where)


def scale_both(factor):
    """Sharpness, and with it its ratio to the edge."""
    return lambda table: scale("ratio", factor)(scale("sharpness", factor)(table))


def below_the_others(column):
    """The lowest learning rate of A-SGD becomes the best one, everywhere."""

    def change(table):
        alike = [name for name in ("panel", "delay") if name in table]
        least = table[table.delay > 0].groupby(alike).learning_rate.transform("min")
        best = table.index.isin(least.index[table.loc[least.index, "learning_rate"] == least])
        table.loc[best, column] = 0.0
        return table

    return change


def survive(rate):
    """S-SGD's runs in the place of those of A-SGD at the rate next to this one."""

    def change(table):
        rates = table[table.delay == 31].learning_rate.unique()
        name = min(rates, key=lambda each: abs(each - rate))
        gone = (table.delay == 31) & (table.learning_rate == name)
        copy = table[table.delay == 0].assign(delay=31, learning_rate=name)
        return pd.concat([table[~gone], copy], ignore_index=True)

    return change


def a_spike_at_the_lowest_rate(table):
    """Of no momentum, in an epoch of a run that is calm otherwise."""
    rows = (table.panel == "a") & (table.arm == spikes.NONE) & (table.learning_rate == 0.03)
    table.loc[rows, "full_train_error"] = 0.001
    table.loc[table.index[rows][50], "full_train_error"] = 0.5
    return table


def highest_rate_stays(table):
    """Of every delay and seed."""
    mini = table[table.series == "mini-batch"]
    top = mini.groupby(["delay", "seed"]).learning_rate.transform("max")
    rows = mini.index[mini.learning_rate == top]
    table.loc[rows, ["train_error", "diverged_at"]] = 0.0, -1
    table.loc[rows, "full_train_loss"] = table.loc[rows, "minimum_loss"]
    return table


def a_low_rate_leaves(table):
    return put("train_error", 0.5, series="mini-batch", delay=1, seed=2, index=-22)(table)


ROOT = scale("largest_root", 1.1)
BENT = put("inverse_threshold", lambda rows: rows.inverse_threshold**3)
STEEPER = scale("inverse_threshold", 1.1)
LINES = {r"largest root": ROOT, r"R\^2": BENT}
BAD_EQ_8 = put("validation_error", 0.8, learning_rate=0.0103226)
BAD_EXACT = put("validation_error", 0.8, learning_rate=0.00797782)

FAILING = {
    "1": {
        "un-rescaled": put("validation_error", 0.9, delay=0),
        "share of the runs at rates above": survive(0.08),
        "best rate's distance": below_the_others("validation_error"),
        "at eq. 8's rate": BAD_EQ_8,
        "at the exact rate": BAD_EXACT,
    },
    "2": {
        "edge over h|slope": scale("sharpness", 1.5),
        "full batch": scale("upper", 1.1, series="full batch"),
    },
    "3": {
        "error at eq. 8's": put("validation_error", 0.0, delay=0),
        "best rate's distance": below_the_others("validation_error"),
    },
    "4": {
        **LINES,
        "a larger m": put("gain", lambda rows: 1.0 / (1.0 + rows.momentum)),
        "at most 2": scale("gain", 2.0),
        "4/pi|acos": scale("gain", 1.05),
    },
    "5": {
        "^standard momentum's": put("validation_error", 0.0, arm=STANDARD),
        "^no momentum's": put("validation_error", 0.9, arm=NONE),
        "^shifted momentum's": put("validation_error", 0.9, arm=SHIFTED),
        r"sqrt\(tau\)": lambda table: put("validation_error", 0.9, arm=STANDARD)(
            put("validation_error", 0.9, arm=SQRT)(table)
        ),
        "with such momentum|of the same largest": lambda table: put(
            "validation_error", 0.0, delay=0
        )(put("validation_error", 0.9, delay=15)(table)),
    },
    "6": {
        **LINES,
        "slope": STEEPER,
        "line .* is exact": scale("approximate_inverse", 1.05),
        "doubling": put("threshold", 1.0),
    },
    "7": {
        **LINES,
        "slope": STEEPER,
        r"nears pi\^2": scale("threshold", 1.1),
        "from b = 3 on": put("gain", 0.9),
        "ratio nears pi/2": scale("gain", 1.1),
    },
    "8": {**LINES, "slope": STEEPER, "from mu = 8 on": scale("gain", 1.1)},
    "9": {"Gaussian": put("validation_error", 0.9, arm=NORMAL)},
    "10": {
        **LINES,
        "slope grows": put(
            "inverse_threshold", lambda rows: rows.inverse_threshold * (1.0 - rows.momentum) ** 3
        ),
        "large delays the slope|acts as a delay": STEEPER,
    },
    "11": {
        r"\(a\) at 0.045": put("full_train_error", 0.001, panel="a", arm=spikes.WITH_DAMPED),
        r"\(a\) at 0.06": put("full_train_error", 0.001, panel="a", arm=spikes.NONE),
        r"\(a\) spikes at rates": a_spike_at_the_lowest_rate,
        r"\(b\) training error": put("train_error", 0.9, panel="b", arm=spikes_resnet.START),
        r"\(b\) at 0.03": put("train_error", 0.0, panel="b", arm=spikes_resnet.UNDAMPED),
        r"\(b\) at 0.06.* with standard": put(
            "train_error", 0.0, panel="b", arm=spikes_resnet.DAMPED
        ),
        r"\(b\) at 0.06.* with no": put("train_error", 0.0, panel="b", arm=spikes_resnet.NONE),
    },
    "12": {
        "above h": highest_rate_stays,
        "below h": a_low_rate_leaves,
        "exponent": put("learning_rate", lambda rows: rows.learning_rate * rows.delay**0.5),
    },
    "stages": {
        "measured over predicted": scale("measured", 1.2),
        "edge of the largest delay": scale("measured", 0.1),
        "edge of the smallest delay": scale("measured", 100.0),
        "guess of the mean": put("by_mean", lambda rows: rows.measured),
    },
    "mitigations": {
        "gradient / staleness": scale("threshold", 1.1, method=mitigations.SCALING),
        "DC-ASGD": scale("threshold", 1.1, method=mitigations.DC_ASGD),
        "DC-EMA": scale("threshold", 1.1, method=mitigations.DC_EMA),
        "shifted momentum's gain": scale("threshold", 1.1, method=mitigations.SHIFTED_MOMENTUM),
        "gain of damped": scale("threshold", 1.5, method=mitigations.DAMPED_MOMENTUM),
        "last update": scale("threshold", 10.0, method=mitigations.REPEATED),
        "a real minimum": scale("measured", 1.2, series="measured"),
    },
    "eos_adam": {
        "begins below|over the largest stable one": scale("ratio", 4.0),
        "oldest stage's delay": scale("by_oldest", 0.1),
    },
    "noise": {
        "furthest of": put("share", lambda rows: 1.0 - 2.0 * (1.0 - rows.share), series="edge"),
        "log-log slope": put("share", lambda rows: 1.0 - (1.0 - rows.share) ** 0.5, series="edge"),
        "below the edge|above the edge": scale("growth", -1.0, series="growth"),
    },
    "pipeline": {
        "pipeline's profile": put("validation_loss", 9.0, profile="pipeline"),
        "whose limit is the lower one": put("validation_loss", 9.0, method="prediction"),
        "best learning rate without": put(
            "validation_loss", 0.0, profile="uniform", method="adamw", learning_rate=0.01
        ),
    },
    "async": {
        "equal bits": put("value", 0.0, kind="equal bits"),
        "relative difference of train loss": scale("value", 1.1, source="replay"),
        "mean staleness": scale("at", 2.0, kind="staleness", source="measured"),
        "distance of measured": put(
            "at", lambda rows: rows["at"] + 1, kind="staleness", source="measured"
        ),
        "largest staleness where|where it is dropped": put("value", 9.0, kind="largest staleness"),
        "time of waiting": scale("value", 0.1, kind="seconds", policy="wait"),
    },
    "13": {"distance of the best rate": below_the_others("validation_error")},
    "eos": {
        "starts well below|over h|over the Lyapunov|over the mean edge": scale_both(1.5),
        "over the mean-square": scale_both(0.3),
        "hovers": put("ratio", lambda rows: rows.ratio * (1.0 + np.arange(len(rows)) % 2)),
        "ratio of their h*|one sharpness": put(
            "sharpness", lambda rows: rows.sharpness * (1.0 + rows.delay)
        ),
    },
}


def committed(figure):
    folder = RESULTS / folder_name(figure)
    claims = json.loads((folder / "summary.json").read_text())["claims"]
    return claims, pd.DataFrame(read_records(folder / "records.csv"))


@pytest.mark.parametrize("figure", FIGURES)
def test_every_claim_has_records_at_which_it_fails(figure):
    claims, records = committed(figure)
    module = importlib.import_module(FIGURES[figure])
    refuted = set()
    for pattern, change in FAILING[figure].items():
        wanted = {number for number, each in enumerate(claims) if re.search(pattern, each["claim"])}
        assert wanted, f"no claim of figure {figure} is like {pattern!r}"
        found = module.claims(change(records.copy()))
        refuted |= {number for number in wanted if not found[number].holds}
    assert refuted == set(range(len(claims))), [
        each["claim"] for number, each in enumerate(claims) if number not in refuted
    ]


def test_every_claim_of_the_reduced_runs_fails_at_chance_and_without_progress():
    for record in read_records(RESULTS / "reduced" / "records.csv"):
        run = REDUCED_RUNS[record["run"]]
        assert make_claim(run, record).holds
        bad = {"validation_error": 0.9, "last_train_loss": record["first_train_loss"]}
        assert not make_claim(run, {**record, **bad}).holds
        assert not make_claim(run, {**record, "status": "diverged"}).holds
