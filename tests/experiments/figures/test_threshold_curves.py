"""The records against dense root finding; the labels against what they must not do."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from asgd_jax import delays, stability
from experiments.figures import random_delay
from experiments.reproduce import FIGURES
from experiments.style import move_apart


def smoke(number):
    module = importlib.import_module(FIGURES[str(number)])
    return module, module.run(module.PRESETS["smoke"])


def largest_root(polynomial):
    return abs(np.roots(polynomial)).max()


def test_figure_6_is_the_closed_form():
    _, records = smoke(6)
    for record in records:
        tau = record["delay"]
        assert record["threshold"] == pytest.approx(2 * math.sin(math.pi / (2 * (2 * tau + 1))))
        assert record["approximate_inverse"] == pytest.approx((2 * tau + 1) / math.pi)


@pytest.mark.parametrize(("number", "kind"), [(4, "shifted"), (10, "heavy_ball")])
def test_momentum_thresholds_put_the_largest_root_on_the_circle(number, kind):
    _, records = smoke(number)
    for record in records:
        if record["mean_delay"] > 64:
            continue
        polynomial = stability.characteristic_polynomial(
            int(record["mean_delay"]),
            step=record["threshold"],
            momentum=record["momentum"],
            kind=kind,
            dampening=record.get("damping") != "undamped",
        )
        assert largest_root(polynomial) == pytest.approx(1.0, abs=1e-7)


def test_figure_8_has_the_captions_masses():
    _, records = smoke(8)
    for record in records:
        if record["series"] != random_delay.MEAN:
            continue
        mu = record["mu"]
        k = np.arange(1, 2 * mu + 1)
        masses = norm.cdf(k + 0.5, mu) - norm.cdf(k - 0.5, mu)
        masses /= masses.sum()
        assert record["mean_delay"] == pytest.approx(masses @ k)
        # z - 1 + h sum_k p_k z^-k, eq. 19, times z^(2 mu)
        polynomial = np.concatenate([[1.0, -1.0], record["threshold"] * masses])
        assert largest_root(polynomial) == pytest.approx(1.0, abs=1e-9)


def test_figure_7_has_uniform_masses():
    _, records = smoke(7)
    for record in records:
        if record["series"] != random_delay.MEAN:
            continue
        b = record["b"]
        assert record["mean_delay"] == pytest.approx((1 + b) / 2)
        polynomial = np.concatenate([[1.0, -1.0], np.full(b, record["threshold"] / b)])
        assert largest_root(polynomial) == pytest.approx(1.0, abs=1e-9)


def test_mean_square_records_are_the_mean_square_threshold():
    record = random_delay.gain_record("s", "b", 8, delays.uniform(1, 8), "mean_square")
    assert record["threshold"] == pytest.approx(0.3621, abs=5e-5)
    assert record["largest_root"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("number", [4, 6, 7, 8, 10])
def test_a_wrong_table_breaks_claims(number):
    module, records = smoke(number)
    assert all(claim.holds for claim in module.claims(pd.DataFrame(records)))
    # Thresholds that fall as 1/sqrt(delay), the rule that the paper refutes.
    wrong = []
    for record in records:
        inverse = math.sqrt(1.0 + float(record["mean_delay"]))
        gain = {"gain": 0.5} if "gain" in record else {}
        wrong.append(
            {**record, "threshold": 1 / inverse, "inverse_threshold": inverse, "largest_root": 1.1}
            | gain
        )
    broken = [claim.claim for claim in module.claims(pd.DataFrame(wrong)) if not claim.holds]
    assert any("unit circle" in claim for claim in broken)
    assert any("linear" in claim for claim in broken)
    assert any("slope" in claim or "gain" in claim for claim in broken)


@pytest.mark.parametrize("number", [4, 6, 7, 8, 10])
def test_pictures_are_labelled_and_drawn(number):
    module, records = smoke(number)
    figure = module.plot(pd.DataFrame(records))
    assert figure.get_suptitle()
    for axis in figure.axes:
        assert axis.get_title()
        assert axis.get_xlabel()
        assert axis.get_ylabel()
        names = [text.get_text() for text in axis.texts]
        labels = [line.get_label() for line in axis.get_lines()]
        assert all(label in names for label in labels if not label.startswith("_"))
    figure.canvas.draw()


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=8).map(sorted),
    st.floats(0.1, 10),
)
def test_spread_keeps_order_and_distance(heights, gap):
    moved = np.array(move_apart(heights, gap))
    assert (np.diff(moved) >= gap - 1e-9).all()
    assert moved.mean() == pytest.approx(np.mean(heights), abs=1e-6)
    if (np.diff(heights) >= gap).all():
        np.testing.assert_allclose(moved, heights, atol=1e-9)
