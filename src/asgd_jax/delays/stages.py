"""Delays of an asynchronous pipeline: how old the weights of each stage are, and whose they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from asgd_jax.delays.processes import as_integer

PIPELINES = ("1f1b", "gpipe-async")


def pipeline(num_stages: int, schedule: str = "1f1b") -> tuple[int, ...]:
    r"""The delay of every stage of a pipeline without flushes, in updates; stage 0 is the input's.

    A micro-batch sees one version of a stage's weights in its forward and its backward pass (weight
    stashing), and every micro-batch makes an update.

    * "1f1b": one forward, one backward (PipeDream). Between the two passes of a micro-batch at
      stage l the S - 1 - l stages after it are busy with as many others, so that its gradient is
      S - 1 - l updates old; that of the last stage is fresh.
    * "gpipe-async": the forward passes of all micro-batches of a mini-batch, then their backward
      passes, and the next mini-batch does not wait; one update a mini-batch, at weights kept twice.
      Every stage is one update old, as in PipeDream-2BW.

    Args:
      num_stages: S >= 1.
      schedule: "1f1b" or "gpipe-async".

    Returns:
      S ints, to be given to leaves by `by_stage`.

    Raises:
      ValueError: for no stages or another schedule.

    >>> pipeline(4), pipeline(4, "gpipe-async")
    ((3, 2, 1, 0), (1, 1, 1, 1))

    References:
      Narayanan et al., "PipeDream", SOSP 2019; "Memory-Efficient Pipeline-Parallel DNN Training",
      ICML 2021.
    """
    stages = as_integer(num_stages, "num_stages")
    if stages < 1:
        raise ValueError("num_stages must be >= 1, got 0: a pipeline has a stage")
    if schedule not in PIPELINES:
        raise ValueError(f"unknown schedule {schedule!r}: use one of {', '.join(PIPELINES)}")
    if schedule == "gpipe-async":
        return (1,) * stages
    return tuple(range(stages - 1, -1, -1))


def by_stage(
    params: Any, assign: Callable[[tuple[Any, ...]], int], profile: Sequence[int] | None = None
) -> Any:
    """Maps every leaf of the parameters to its stage, or to the delay of its stage.

    Args:
      params: pytree of parameters.
      assign: from the path of a leaf, as in `jax.tree_util.tree_map_with_path`, to its stage.
      profile: delays by stage, as `pipeline` gives them; None returns the stages themselves.

    Returns:
      A pytree of ints like `params`: with a profile what `delayed` and
      `stability.stages_max_learning_rate` take.

    Raises:
      ValueError: for a stage that is no integer >= 0 or not in the profile, naming the leaf.

    >>> params = {"embed": 0.0, "block": [0.0, 0.0], "head": 0.0}
    >>> def assign(path):
    ...     return {"embed": 0, "block": 1, "head": 2}[path[0].key]
    >>> by_stage(params, assign, pipeline(3))
    {'block': [1, 1], 'embed': 2, 'head': 0}
    """

    def of_leaf(path: tuple[Any, ...], _: Any) -> int:
        name = f"the stage of params{jax.tree_util.keystr(path)}"
        stage = as_integer(assign(path), name)
        if profile is None:
            return stage
        if stage >= len(profile):
            raise ValueError(f"{name} is {stage}, and the profile has {len(profile)} stages")
        return int(profile[stage])

    return jax.tree_util.tree_map_with_path(of_leaf, params)
