"""Claims and line fits against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_a_nan_holds_nowhere():
    nan = math.nan
    checked = (
        claims.near("", nan, 1.0, 0.5),
        claims.at_most("", nan, 1.0),
        claims.at_least("", nan, 1.0),
    )
    assert not any(claim.holds for claim in checked)
