"""The arithmetic of the timing: a clock of our own, so that every number is known."""

import pytest

from benchmarks.harness import MIN_ROUNDS, exponent, interleave, ratio, spread


class FakeClock:
    """Stands still until something takes time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds, called):
        def call():
            called.append(seconds)
            self.now += seconds

        return call


def test_every_call_is_timed_and_every_round_starts_with_another_variant():
    clock, called = FakeClock(), []
    variants = {str(seconds): clock.taking(seconds, called) for seconds in (1, 2, 4)}
    times = interleave(variants, 4, clock=clock)
    assert times == {"1": [1.0] * 4, "2": [2.0] * 4, "4": [4.0] * 4}
    warmup, rounds = called[:3], [tuple(called[k : k + 3]) for k in range(3, 15, 3)]
    assert warmup == [1, 2, 4]
    assert rounds == [(1, 2, 4), (2, 4, 1), (4, 1, 2), (1, 2, 4)]


def test_a_machine_that_slows_down_leaves_the_ratio_of_a_round_alone():
    clock = FakeClock()
    slowness = iter([1.0, 1.0, 1.0, 1.0, 7.0, 7.0, 3.0, 3.0])

    def work(seconds):
        return lambda: setattr(clock, "now", clock.now + seconds * next(slowness))

    times = interleave({"plain": work(2.0), "delayed": work(3.0)}, 3, clock=clock)
    assert times["plain"] == [2.0, 14.0, 6.0]
    assert ratio(times, "delayed", "plain") == (1.5, 1.5, 1.5)


def test_a_spent_budget_ends_the_rounds_but_not_the_first_ones():
    clock = FakeClock()
    slow = interleave({"a": clock.taking(10.0, [])}, 9, budget=1.0, clock=clock)
    assert len(slow["a"]) == MIN_ROUNDS
    quick = interleave({"a": clock.taking(0.25, [])}, 9, budget=1.0, clock=clock)
    assert len(quick["a"]) == 5  # the fifth began when the budget was spent to the second


def test_warmup_calls_are_not_timed():
    clock, called = FakeClock(), []
    times = interleave({"a": clock.taking(1.0, called)}, 2, warmup=3, clock=clock)
    assert (len(called), len(times["a"])) == (5, 2)


def test_spread_is_the_median_with_the_quartiles():
    assert spread([5.0]) == (5.0, 5.0, 5.0)
    assert spread([1.0, 2.0, 3.0, 4.0]) == (2.5, 1.75, 3.25)


def test_the_exponent_of_a_power_law_is_its_power():
    x = [1, 3, 10, 40]
    assert exponent(x, [5 * v**-0.5 for v in x]) == pytest.approx(-0.5, abs=1e-12)


def test_nothing_measured_is_refused():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        interleave({"a": lambda: None}, 0)
    with pytest.raises(ValueError, match="no measurement"):
        spread([])
