"""What became of the runs from a minimum: judged from the records alone, by either rule.

`records` has the raw columns of `minibatch.find_edges`: delay, seed, index, learning_rate, steps,
train_error, full_train_loss, diverged_at, minimum_loss, sharpness and, in newer tables,
minimum_error (older minima had none).
"""

import numpy as np
import pandas as pd

from asgd_jax import stability
from experiments.edges.leaving import first_left, left_for_good

RUN = ["delay", "seed", "index"]


def judge_runs(records: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for every run.

    Columns: delay, seed, index, learning_rate, predicted (h*/sharpness), left (0 or 1), left_step
    (updates at the row by which it had left; the last one of a run that stayed), left_for_good (by
    the rule before) and catapult: left, and not for good.
    """
    rows = []
    for _, run in records.groupby(RUN):
        measured = run.to_dict("records")
        first, loss = measured[0], measured[0]["minimum_loss"]
        where = first_left(measured, loss, first.get("minimum_error", 0.0))
        for_good = left_for_good(measured, loss)
        threshold = stability.max_learning_rate(first["delay"], sharpness=first["sharpness"])
        rows.append(
            {
                **{name: first[name] for name in (*RUN, "learning_rate")},
                "predicted": threshold,
                "left": int(where is not None),
                "left_step": measured[-1 if where is None else where]["steps"],
                "left_for_good": int(for_good),
                "catapult": int(where is not None and not for_good),
            }
        )
    return pd.DataFrame(rows)


def brackets(runs: pd.DataFrame, rule: str = "left") -> pd.DataFrame:
    """Returns a row for every delay and seed: between which rates its edge lies.

    Columns: delay, seed, predicted; upper, the smallest rate that left; lower, the largest below it
    that stayed; edge, their geometric mean; ratio, edge over predicted.

    Args:
      runs: of `judge_runs`.
      rule: the column that says whether a run left: left or left_for_good.

    Raises:
      ValueError: naming the delay and seed of which every run, or none, left.
    """
    rows = []
    for (delay, seed), mine in runs.groupby(["delay", "seed"]):
        upper = mine.learning_rate[mine[rule] == 1].min()
        lower = mine.learning_rate[mine.learning_rate < upper].max()
        if not lower < upper:
            raise ValueError(
                f"delay {delay}, seed {seed}: no edge among {len(mine)} learning rates"
            )
        rows.append({"delay": delay, "seed": seed, "lower": lower, "upper": upper})
    found = pd.DataFrame(rows)
    found["predicted"] = found.delay.map(runs.groupby("delay").predicted.first())
    found["edge"] = np.sqrt(found.lower * found.upper)
    found["ratio"] = found.edge / found.predicted
    return found


def by_delay(edges: pd.DataFrame, column: str) -> pd.Series:
    """Returns the geometric mean over seeds of a column of `brackets`, by delay."""
    return np.exp(np.log(edges.set_index("delay")[column]).groupby("delay").mean())
