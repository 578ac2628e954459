"""What the paper's own runs take: memory of one device and updates of the arms of every config.

Not of those in rounds, which need as many devices as they have workers to be planned.

`python -m experiments.paper_plans --out=results/paper_plans.md` prints what `scripts/train.py
--plan` does for each of them, without data and without running any. Steps of large models are
compiled for it, which takes a few minutes.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from asgd_jax.command_line import OneLineParser
from asgd_jax.data import FACTS
from asgd_jax.training.command import run_command, use_compilation_cache
from asgd_jax.training.feed import plan_of
from asgd_jax.training.plan import MemoryPlan, make_plan
from experiments.distance import papers_panel
from experiments.reproduce import FIGURES
from experiments.tables import markdown_table

# A config, and a figure whose paper preset says for how many epochs.
CONFIGS = {
    "mnist_cnn": "1",
    "cifar10_vgg11": "3",
    "cifar10_resnet44": "11",
    "imagenet_resnet50": "5",
}
# Of which neither the memory nor its layout depends.
_NO_SHAPE = (
    *("learning_rate", "learning_rate_rule", "epochs", "decay_epochs", "seed"),
    *("warmup_epochs", "warmup_from", "log_every_steps"),
)
_MIB = 2**20

_HEAD = """# Plans of the paper's runs

Written by `python -m experiments.paper_plans --out=results/paper_plans.md`: for one run of every
arm at the paper's own size, on one device, what `--plan` says of its memory (MiB), and its updates
of the server, in the epochs of the figures' `paper` preset. The history is tau sets of parameters;
activations are those of the step as compiled for {backend}, and differ elsewhere. Each is launched
by

    python scripts/train.py --config=configs/NAME.py:ARM --workdir=DIR

on all devices that it finds, over which batch and activations are divided, and with
`--config.shard_history=True` the history as well; each figure, with all its rates and seeds, by

    python scripts/reproduce.py --figure=N --preset=paper --out=results
"""


def plans() -> Iterator[dict[str, Any]]:
    """Yields a row for every arm of the configs that one device can run."""
    known: dict[str, MemoryPlan] = {}
    for name, figure in CONFIGS.items():
        preset = papers_panel(importlib.import_module(FIGURES[figure]).PRESETS["paper"])
        module = importlib.import_module(f"configs.{name}")
        for arm in module.ARMS:
            config: ConfigDict = module.get_config(arm)
            if config.parallelism == "workers":  # of as many chips as workers: --plan there
                continue
            config.num_devices, config.epochs = 1, preset["train"].epochs
            shape = repr(sorted(_shape(config).items()))
            if shape not in known:
                known[shape] = make_plan(config).memory
            yield {"config": f"{name}:{arm}", **plan_row(config, known[shape])}


def plan_row(config: ConfigDict, plan: MemoryPlan) -> dict[str, Any]:
    """Returns the row of an arm: sizes in MiB, and how many updates it makes."""
    per_epoch = plan_of(config, FACTS[config.dataset].num_train).steps_per_epoch
    return {
        "model": config.model,
        "delay": config.delay,
        "batch of an update": config.num_workers // (config.delay + 1) * config.worker_batch_size,
        **{field: round(size / _MIB, 1) for field, size in plan._asdict().items()},
        "total": round(plan.total / _MIB, 1),
        "updates": round(per_epoch * config.epochs),
    }


def plans_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page as Markdown."""
    return f"{_HEAD.format(backend=jax.default_backend())}\n{markdown_table(rows)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code, see `run_command`."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/paper_plans.md", help="file to write")
    options = parser.parse_args(arguments)
    return run_command("paper_plans", lambda: _make(options))


def _make(options: argparse.Namespace) -> None:
    use_compilation_cache()
    rows = []
    for row in plans():
        print(f"{row['config']}: {row['total']:,.1f} MiB, {row['updates']:,} updates", flush=True)
        rows.append(row)
    Path(options.out).write_text(plans_page(rows))


def _shape(config: ConfigDict) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _NO_SHAPE}


if __name__ == "__main__":
    sys.exit(main())
