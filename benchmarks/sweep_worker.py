"""A sweep in a process that stays: `python -m` this, with a JSON task."""

import json
import sys
from typing import Any

import jax

from asgd_jax.training.command import use_threaded_convolutions
from benchmarks.sweeps import CASES, QUICK_CASES, CompiledRuns, make_block
from benchmarks.workers import serve, use_cores


def answer_with(task: dict[str, Any]) -> Any:
    """Returns the function that answers `{"at_once": k}` once all runs are through.

    Args:
      task: number of the case, quick, devices, and `shares`: it makes one of so many of the runs.
    """
    case = (QUICK_CASES if task["quick"] else CASES)[task["number"]]
    blocks = dict[int, CompiledRuns]()

    def answer(request: dict[str, Any]) -> dict[str, int]:
        at_once = request["at_once"]
        if at_once not in blocks:
            num_train = 256 if task["quick"] else case.num_train
            runs = case.runs // task["shares"]
            blocks[at_once] = make_block(case, runs, at_once, num_train, task["devices"])
        block = blocks[at_once]
        jax.block_until_ready(block.call())
        return {"updates": block.updates * task["shares"], "default": block.default_at_once}

    return answer


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    if words["core"] is not None:
        use_cores(1, first=words["core"])
    use_threaded_convolutions()
    serve(answer_with(words))
