"""What the figures of training runs share: curves over seeds from flat records, and their lines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.data import FACTS
from asgd_jax.training.folder.table import Record
from experiments.claims import deviation

_TEN_CLASSES = 0.9  # error of a guess: of tables that are older than their column chance_error
_ERRORS = ("validation_error", "train_error")
NEXT_RATE = 1.42  # factor between rates that counts as next to each other: sqrt(2), rounded up


class Band(NamedTuple):
    """A mean over seeds and how far they are from it; arrays of shape (n,).

    Attributes:
      mean: over the seeds.
      std: standard deviation over the seeds, NaN for one seed.
      low, high: one standard deviation below and above the mean, within what the seeds gave: of
        one seed there is no band.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray


def with_overrides(config: ConfigDict, **fields: Any) -> ConfigDict:
    """Returns the configuration with these fields in the place of its own.

    Unlike `ConfigDict.update` it replaces the options of a model as a whole.
    """
    if "model_options" in fields:
        config.model_options = ConfigDict(convert_dict=True)
    config.update(fields)
    return config


def take_arms(
    get_config: Callable[[str], ConfigDict], arms: Mapping[str, str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the values that a recipe's arms give these fields.

    Args:
      get_config: of a module of `configs`.
      arms: what a figure calls an arm -> what the recipe calls it.
      fields: in which the arms differ.
    """
    configs = {name: get_config(arm) for name, arm in arms.items()}
    return {name: {field: each[field] for field in fields} for name, each in configs.items()}


def select(records: pd.DataFrame, **fields: Any) -> pd.DataFrame:
    """Returns the records that have these values.

    >>> select(pd.DataFrame({"delay": [0, 3], "x": [1, 2]}), delay=3).x.tolist()
    [2]
    """
    return records[np.all([records[name] == value for name, value in fields.items()], axis=0)]


def with_chance(records: Sequence[Record], config: ConfigDict) -> list[Record]:
    """Returns the records with the error of a guess among the classes of the data set."""
    chance = 1.0 - 1.0 / FACTS[config.dataset].num_classes
    return [{**record, "chance_error": chance} for record in records]


def chance_error(records: pd.DataFrame) -> float:
    """Returns the error of a guess, which a diverged run is given.

    >>> chance_error(pd.DataFrame({"chance_error": [0.999]}))
    0.999
    """
    return float(records.chance_error.iloc[0]) if "chance_error" in records else _TEN_CLASSES


def by_seed(records: pd.DataFrame, epochs: Sequence[float], column: str) -> np.ndarray:
    """Returns a column at the given epochs, shape (num_seeds, num_epochs).

    A run that diverged has chance's error from then on, and NaN in other columns.

    Args:
      records: of one arm, with columns seed and epoch.
      epochs: whole ones, increasing.
      column: its name.
    """
    alive = records[records.diverged_at < 0].set_index(["seed", "epoch"])[column].astype(float)
    wanted = pd.MultiIndex.from_product([records.seed.unique(), epochs])
    missing = chance_error(records) if column in _ERRORS else np.nan
    return alive.reindex(wanted, fill_value=missing).to_numpy().reshape(-1, len(epochs))


def over_seeds(values: np.ndarray) -> Band:
    """Returns the mean over seeds, the first axis, and its spread."""
    std, mean = deviation(values), values.mean(axis=0)
    low, high = np.fmax(mean - std, values.min(axis=0)), np.fmin(mean + std, values.max(axis=0))
    return Band(mean, std, low, high)


def final_errors(
    records: pd.DataFrame, last_epoch: float, column: str = "validation_error", rows: int = 1
) -> np.ndarray:
    """Returns each seed's error, averaged over the last `rows` measurements of the run."""
    epochs = sorted(records[records.diverged_at < 0].epoch.unique())[-rows:]
    epochs = epochs if epochs and epochs[-1] == last_epoch else [last_epoch]
    return by_seed(records, epochs, column).mean(axis=1)


def last_epoch(records: pd.DataFrame) -> int:
    """Returns the last epoch that was run."""
    return int(records.epoch.max())


def did_diverge(records: pd.DataFrame) -> bool:
    """Whether any of the runs diverged."""
    return bool((records.diverged_at >= 0).any())


def plot_curve(axis: Any, records: pd.DataFrame, epochs: Sequence[float], **look: Any) -> None:
    """Draws the mean validation error of an arm in percent, in a band of a standard deviation."""
    band = over_seeds(100 * by_seed(records, epochs, "validation_error"))
    (line,) = axis.plot(epochs, band.mean, **look)
    axis.fill_between(epochs, band.low, band.high, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_seeds(
    axis: Any, places: Sequence[float], values: Sequence[np.ndarray], **look: Any
) -> None:
    """Draws a line through means over seeds and each seed as a point: a band would hide two modes.

    Args:
      axis: to draw on.
      places: where on the horizontal axis, shape (n,).
      values: for each place, an array with a number for every seed.
      **look: of the line.
    """
    (line,) = axis.plot(places, [each.mean() for each in values], **look)
    for place, each in zip(places, values, strict=True):
        axis.plot(
            np.full(len(each), place),
            each,
            linestyle="",
            marker="o",
            markersize=3.5,
            color=line.get_color(),
            alpha=0.6,
        )


def plot_both_errors(
    axis: Any, records: pd.DataFrame, epochs: Sequence[float], *, label: str, color: str
) -> None:
    """Draws the validation error of an arm, and dashed its training error."""
    plot_curve(axis, records, epochs, label=label, color=color)
    train = by_seed(records, epochs, "train_error").mean(axis=0)
    axis.plot(epochs, 100 * train, color=color, linestyle="--", linewidth=1)


def run_points(arms: Iterable[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a sweep's points: every arm with every seed.

    >>> run_points([{"delay": 0}, {"delay": 3}], [0])
    [{'delay': 0, 'seed': 0}, {'delay': 3, 'seed': 0}]
    """
    return [{**arm, "seed": seed} for arm in arms for seed in seeds]


def with_arm(records: Sequence[Record], arms: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Returns the records of `run_points` with their arm's name as the first column.

    >>> with_arm([{"delay": 0, "seed": 1}], {"a": {"delay": 0}, "b": {"delay": 3}})
    [{'arm': 'a', 'delay': 0, 'seed': 1}]
    """
    return [
        {"arm": name, **record}
        for record in records
        for name, arm in arms.items()
        if arm.items() <= record.items()
    ]
