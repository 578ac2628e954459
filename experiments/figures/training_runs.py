"""What the figures of training runs share: curves over seeds from flat records, and their lines."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from asgd_jax.training.folder.table import Record
from asgd_jax.training.plan import num_classes
from experiments.claims import deviation

_TEN_CLASSES = 0.9  # error of a guess: of tables that are older than their column chance_error


class Curve(NamedTuple):
    """A column over epochs, all seeds together; float64 arrays of shape (num_epochs,).

    Attributes:
      epochs: whole numbers.
      mean: over the seeds.
      std: standard deviation over the seeds, NaN for one seed.
      low, high: one standard deviation below and above the mean, within what the seeds gave: of
        one seed there is no band.
    """

    epochs: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray


def select(records: Sequence[Record], **fields: Any) -> list[Record]:
    """Returns the records that have these values.

    >>> select([{"delay": 0, "x": 1}, {"delay": 3, "x": 2}], delay=3)
    [{'delay': 3, 'x': 2}]
    """
    return [
        record for record in records if all(record[name] == value for name, value in fields.items())
    ]


def with_chance(records: Sequence[Record], config: ConfigDict) -> list[Record]:
    """Returns the records with the error of a guess among the classes of the data set."""
    chance = 1.0 - 1.0 / num_classes(config.dataset)
    return [{**record, "chance_error": chance} for record in records]


def chance_error(records: Sequence[Record]) -> float:
    """Returns the error of a guess, which a diverged run is given.

    >>> chance_error([{"chance_error": 0.999}])
    0.999
    """
    return float(records[0].get("chance_error", _TEN_CLASSES))


def by_seed(
    records: Sequence[Record], epochs: Sequence[float], column: str
) -> dict[int, np.ndarray]:
    """Returns a column of every seed at the given epochs.

    A run that diverged has chance's error from then on, and NaN in other columns.

    Args:
      records: of one arm, with columns seed and epoch.
      epochs: whole ones, increasing.
      column: its name.
    """
    seeds: dict[int, dict[float, float]] = {}
    for record in records:
        rows = seeds.setdefault(int(record["seed"]), {})
        if int(record["diverged_at"]) < 0:
            rows[float(record["epoch"])] = float(record[column])
    is_error = column in ("validation_error", "train_error")
    missing = chance_error(records) if is_error else np.nan
    return {
        seed: np.array([rows.get(float(epoch), missing) for epoch in epochs])
        for seed, rows in seeds.items()
    }


def over_seeds(records: Sequence[Record], epochs: Sequence[float], column: str) -> Curve:
    """Returns the mean over seeds and its spread."""
    values = np.stack(list(by_seed(records, epochs, column).values()))
    std, mean = deviation(values), values.mean(axis=0)
    low, high = np.fmax(mean - std, values.min(axis=0)), np.fmin(mean + std, values.max(axis=0))
    return Curve(np.asarray(epochs, np.float64), mean, std, low, high)


def final_errors(
    records: Sequence[Record], last_epoch: float, column: str = "validation_error", rows: int = 1
) -> np.ndarray:
    """Returns each seed's error, averaged over the last `rows` measurements of the run."""
    epochs = sorted({float(r["epoch"]) for r in records if int(r["diverged_at"]) < 0})[-rows:]
    epochs = epochs if epochs and epochs[-1] == last_epoch else [last_epoch]
    return np.array([v.mean() for v in by_seed(records, epochs, column).values()])


def last_epoch(records: Sequence[Record]) -> int:
    """Returns the last epoch that was run."""
    return int(max(float(record["epoch"]) for record in records))


def did_diverge(records: Sequence[Record]) -> bool:
    """Whether any of the runs diverged."""
    return any(int(record["diverged_at"]) >= 0 for record in records)


def plot_curve(axis: Any, curve: Curve, *, scale: float = 100.0, **look: Any) -> None:
    """Draws a mean and a band of one standard deviation; errors in percent by default."""
    (line,) = axis.plot(curve.epochs, scale * curve.mean, **look)
    band = scale * curve.low, scale * curve.high
    axis.fill_between(curve.epochs, *band, color=line.get_color(), alpha=0.2, linewidth=0)


def run_points(arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a sweep's points: every arm with every seed, all with the same fields.

    Raises:
      ValueError: when an arm names other fields than the first.

    >>> run_points({"a": {"delay": 0}, "b": {"delay": 3}}, [0])
    [{'delay': 0, 'seed': 0}, {'delay': 3, 'seed': 0}]
    """
    fields = {tuple(sorted(arm)) for arm in arms.values()}
    if len(fields) > 1:
        raise ValueError(f"arms must name the same fields, got {sorted(fields)}")
    return [{**arm, "seed": seed} for arm in arms.values() for seed in seeds]


def with_arm(records: Sequence[Record], arms: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Returns the records of `run_points` with their arm's name as the first column.

    >>> with_arm([{"delay": 0, "seed": 1}], {"a": {"delay": 0}, "b": {"delay": 3}})
    [{'arm': 'a', 'delay': 0, 'seed': 1}]
    """
    named = []
    for record in records:
        (arm,) = (
            arm
            for arm, fields in arms.items()
            if all(record[name] == value for name, value in fields.items())
        )
        named.append({"arm": arm, **record})
    return named
