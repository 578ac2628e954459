"""Timing on a noisy machine: interleaved repetitions, medians, ratios within a round."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.claims import fit_line

Clock = Callable[[], float]
Times = dict[str, list[float]]

MIN_ROUNDS = 3


class Spread(NamedTuple):
    """The median of repeated measurements, and the quartiles beside it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles; an even count's median lies between the middle two.

    Raises:
      ValueError: for no values.

    >>> spread([4.0, 1.0, 2.0, 3.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if not values:
        raise ValueError("no measurement to summarize: ask for one round at least")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    budget: float = math.inf,
    clock: Clock = time.perf_counter,
) -> Times:
    """Times every variant once a round, each round starting with another one.

    What disturbs the machine for a while then disturbs all variants, and leaves their ratios within
    a round about as they were; whoever comes first or after whom is shared out equally.

    Args:
      variants: functions of no arguments, by name; what they return is waited for.
      rounds: repetitions of each.
      warmup: calls of each beforehand that are not timed: compilation, caches.
      budget: seconds; once they are spent no further round begins, but there are `MIN_ROUNDS`.
      clock: seconds.

    Returns:
      Seconds of every call, by name, in the order of the rounds.

    Raises:
      ValueError: for fewer than one round.

    >>> ticks = iter(range(100))
    >>> interleave({"a": lambda: 0, "b": lambda: next(ticks)}, 2, clock=lambda: next(ticks))
    {'a': [1, 1], 'b': [2, 2]}
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    for _ in range(warmup):
        for call in variants.values():
            jax.block_until_ready(call())
    times: Times = {name: [] for name in variants}
    names = list(variants)
    started = clock() if math.isfinite(budget) else 0.0
    for number in range(rounds):
        if number >= MIN_ROUNDS and math.isfinite(budget) and clock() - started > budget:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before = clock()
            jax.block_until_ready(variants[name]())
            times[name].append(clock() - before)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str) -> Spread:
    """Returns the spread over the rounds of the time of `name` over that of `base`.

    >>> ratio({"plain": [1.0, 10.0, 1.0], "delayed": [1.1, 11.0, 9.0]}, "delayed", "plain").median
    1.1
    """
    return spread([a / b for a, b in zip(times[name], times[base], strict=True)])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    r"""Returns p of the least-squares fit $y = c x^p$ in logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return fit_line([math.log(v) for v in x], [math.log(v) for v in y]).slope


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes) of a pytree.

    >>> tree_bytes({"a": jax.ShapeDtypeStruct((3, 2), "float32"), "b": jax.numpy.zeros(2, "int8")})
    26
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
