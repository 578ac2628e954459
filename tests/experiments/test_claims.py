"""Claims and line fits against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import claims

NUMBERS = st.floats(-100, 100)


@given(st.lists(st.tuples(st.integers(0, 50), NUMBERS), min_size=3, max_size=20))
def test_line_is_numpys(points):
    x, y = np.array(points, np.float64).T
    if np.ptp(x) == 0 or np.ptp(y) < 1e-3:
        return
    line = claims.fit_line(x, y)
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose([line.slope, line.intercept], [slope, intercept], atol=1e-7)
    assert line.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-7)


def test_a_line_needs_two_values_of_x():
    with pytest.raises(ValueError, match="two different values of x"):
        claims.fit_line([3, 3], [1, 2])


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (claims.near("", 1.009, 1.0, 0.01), True),
        (claims.near("", 1.011, 1.0, 0.01), False),
        (claims.near("", -1.009, -1.0, 0.01), True),
        (claims.at_most("", 1.0, 1.0), True),
        (claims.at_most("", 1.1, 1.0), False),
        (claims.at_least("", 1.0, 1.0), True),
        (claims.at_least("", 0.9, 1.0), False),
    ],
)
def test_verdicts(claim, holds):
    assert claim.holds is holds


SEEDS = st.lists(NUMBERS, min_size=2, max_size=8)


@given(SEEDS, SEEDS, st.floats(0.1, 200))
def test_differences_are_scipys_paired_tests(first, second, margin):
    n = min(len(first), len(second))
    first, second = np.array(first[:n]), np.array(second[:n])
    if n < 2 or np.ptp(first - second) < 1e-3:
        return

    def p_value(bound, alternative):
        return stats.ttest_rel(first - bound, second, alternative=alternative).pvalue

    below, above = p_value(margin, "less"), p_value(-margin, "greater")
    if min(abs(below - 0.05), abs(above - 0.05)) < 1e-6:
        return
    assert claims.less_by("", first, second, margin).holds == (below < 0.05)
    assert claims.more_by("", first, second, -margin).holds == (above < 0.05)
    same = claims.equivalent("", first, second, margin)
    assert same.holds == (max(below, above) < 0.05)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert same.interval == pytest.approx(tuple(expected), rel=1e-9, abs=1e-9)


def test_one_seed_shows_nothing():
    for claim in (
        claims.less_by("", [0.0], [0.0], 1.0),
        claims.more_by("", [5.0], [0.0], 1.0),
        claims.equivalent("", [0.0], [0.0], 1.0),
    ):
        assert not claim.holds
        assert claim.interval is None


def test_arms_of_other_seeds_are_not_paired():
    with pytest.raises(ValueError, match=r"equal seeds, got \(2,\) and \(3,\)"):
        claims.equivalent("", [0, 1], [0, 1, 2], 1.0)


def test_few_seeds_do_not_make_arms_equal():
    """The same scatter: two seeds can't show what eight show."""
    scatter = np.array([-1, 1]) * 0.4
    assert not claims.equivalent("", scatter, np.zeros(2), 1.0).holds
    assert claims.equivalent("", np.tile(scatter, 4), np.zeros(8), 1.0).holds


@given(st.lists(st.tuples(st.integers(0, 50), NUMBERS), min_size=3, max_size=20))
def test_the_slope_has_scipys_error(points):
    x, y = np.array(points, np.float64).T
    if np.ptp(x) == 0 or np.ptp(y) < 1e-3:
        return
    slope, interval = claims.estimate_slope(x, y)
    fit = stats.linregress(x, y)
    reach = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    assert slope == pytest.approx(fit.slope, abs=1e-7)
    assert interval == pytest.approx((fit.slope - reach, fit.slope + reach), rel=1e-4, abs=1e-4)


def test_a_ratio_has_the_interval_of_its_logarithm():
    value, (low, high) = claims.estimate_ratio([0.9, 1.0, 1.2])
    assert value**3 == pytest.approx(0.9 * 1.2)
    assert low * high == pytest.approx(value**2)
    assert claims.inside("", claims.Estimate(value, (low, high)), low - 0.1, high + 0.1).holds
    assert not claims.inside("", claims.Estimate(value, (low, high)), low + 0.01, 9).holds


def test_outcomes_tell_the_interval():
    claim = claims.inside("c", claims.Estimate(1.0, (0.5, 1.5)), 0.0, 2.0)
    assert claims.outcome(claim) == "c: 1 [0.5, 1.5], expected interval within 0 to 2"


def test_a_nan_holds_nowhere():
    nan = math.nan
    checked = (
        claims.near("", nan, 1.0, 0.5),
        claims.at_most("", nan, 1.0),
        claims.at_least("", nan, 1.0),
    )
    assert not any(claim.holds for claim in checked)
