"""Every large config trains on real images here, at a reduced size, by overrides alone.

`python -m experiments.reduced --out=results/reduced`, from the root of the repository. It
does what scripts/train.py does with the commands that it lists, one after the other, and writes
records.csv, summary.json and README.md. Each run has a folder below `--workdir`: one that is
finished isn't repeated. It needs CIFAR-10 and TFDS's imagenet2012, of which 800 images are enough.
"""

import argparse
import importlib
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from asgd_jax.command_line import OneLineParser
from asgd_jax.data import FACTS
from asgd_jax.training import train
from asgd_jax.training.command import named_folder, run_command
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.folder.provenance import environment, write_json
from asgd_jax.training.folder.table import Record, write_records
from experiments.claims import Claim, at_most, count_held, verdict
from experiments.tables import markdown_table

FAR_BELOW_CHANCE = 0.1  # of the validation error: ten standard deviations on 1,000 images


class ReducedRun(NamedTuple):
    """One run: an arm of a config file, and the overrides that make it small.

    Attributes:
      config: name of the file in configs/.
      arm: of that file.
      overrides: field -> value, as `--config.field=value` would set them.
      learns: whether unseen images can be told apart after so little training: then the validation
        error is to be far below chance, else the train loss is to fall.
    """

    config: str
    arm: str
    overrides: dict[str, Any]
    learns: bool


_CIFAR: dict[str, Any] = {
    "num_train": 5000,
    "num_validation": 1000,
    "augment": False,
    "epochs": 2,
    "decay_epochs": (1.7,),
    "log_every_steps": 125,
    "checkpoint_every_epochs": 0,
    "num_devices": 1,
}
_RESNET20 = _CIFAR | {"model": "resnet20", "width": 0.5, "worker_batch_size": 8}
# Without BatchNorm the loss stays on a plateau for some thousand updates: small batches make them,
# clipping keeps what comes after the plateau from leaping back.
_VGG11 = _CIFAR | {
    "width": 0.25,
    "worker_batch_size": 2,
    "learning_rate": 0.2,
    "clip_norm": 1.0,
    "log_every_steps": 500,
}
# The first gradients are all taken at the first parameters: 60 updates of which 28 are not.
_IMAGENET: dict[str, Any] = {
    "image_size": 64,
    "width": 0.25,
    "worker_batch_size": 40,
    "warmup_epochs": 0.0,
    "epochs": 3,
    "eval_every_epochs": 3,
    "log_every_steps": 5,
    "eval_batch_size": 100,
    "checkpoint_every_epochs": 0,
    "num_devices": 1,
}

REDUCED_RUNS: dict[str, ReducedRun] = {
    "resnet20_no_momentum": ReducedRun(
        "cifar10_resnet44", "no_momentum", _RESNET20 | {"learning_rate": 0.5}, True
    ),
    "resnet20_shifted": ReducedRun(
        "cifar10_resnet44", "shifted", _RESNET20 | {"learning_rate": 0.7}, True
    ),
    "vgg11_tau31": ReducedRun("cifar10_vgg11", "asgd_tau31", _VGG11, True),
    **{
        f"resnet50_{arm}": ReducedRun("imagenet_resnet50", arm, _IMAGENET | changes, False)
        for arm, changes in {
            "ssgd": {
                "worker_batch_size": 5,
                "epochs": 4,
                "eval_every_epochs": 4,
                "learning_rate": 0.02,
            },
            "standard": {"learning_rate": 0.15},
            "standard_damped": {"learning_rate": 1.5},
            "no_momentum": {"learning_rate": 1.5},
            "shifted": {"learning_rate": 10.0},
            "shifted_normal": {"learning_rate": 10.0},
        }.items()
    },
}


def load_config(run: ReducedRun) -> ConfigDict:
    """Returns the configuration of a run: its file's `get_config(arm)`, then the overrides."""
    config: ConfigDict = importlib.import_module(f"configs.{run.config}").get_config(run.arm)
    config.update(run.overrides)
    return config


def command(name: str, run: ReducedRun) -> str:
    """Returns the command line that makes the same run.

    >>> command("a", ReducedRun("digits", "asgd", {"epochs": 2}, True))
    'python scripts/train.py --config=configs/digits.py:asgd --workdir=runs/reduced/a
    --config.epochs=2'
    """
    overrides = [f"--config.{field}={value}" for field, value in run.overrides.items()]
    config = f"--config=configs/{run.config}.py:{run.arm}"
    head = ["python", "scripts/train.py", config, f"--workdir=runs/reduced/{name}"]
    return shlex.join([*head, *overrides])


def make_record(name: str, run: ReducedRun, workdir: Path, summary: Mapping[str, Any]) -> Record:
    """Returns the row of a finished run; losses are means over `log_every_steps` updates."""
    losses = [row["train_loss"] for row in read_rows(workdir)]
    error = float(summary["final"]["validation_error"])
    chance = 1.0 - 1.0 / FACTS[summary["config"]["dataset"]].num_classes
    return {
        "run": name,
        "config": f"{run.config}:{run.arm}",
        "status": summary["status"],
        "updates": summary["steps"],
        "delay": summary["batches"]["delay"],
        "max_staleness": summary["staleness"]["max"],
        "learning_rate": summary["learning_rate"],
        "first_train_loss": losses[0],
        "last_train_loss": losses[-1],
        "validation_error": error,
        "chance_error": chance,
        "beats_chance": ("yes" if error < chance else "no") if run.learns else "not asked",
        "wall_time_s": summary["wall_time_s"],
        "commit": summary["commit"] or "unknown",
        "command": command(name, run),
    }


def make_claim(run: ReducedRun, record: Record) -> Claim:
    """Returns what a run is to show: see `ReducedRun.learns`. A run that diverged shows nothing."""
    name, first, last = record["run"], record["first_train_loss"], record["last_train_loss"]
    if run.learns:
        bound = float(record["chance_error"]) - FAR_BELOW_CHANCE
        claim = at_most(
            f"{name}: validation error far below that of guessing",
            float(record["validation_error"]),
            bound,
        )
    else:
        claim = at_most(
            f"{name}: train loss finite and falling, last {run.overrides['log_every_steps']} "
            f"updates over the first",
            float(last) / float(first),
            0.999,
        )
    return claim._replace(holds=claim.holds and record["status"] == "completed")


def make_runs(
    out: Path, workdir: Path, runs: Mapping[str, ReducedRun] = REDUCED_RUNS
) -> dict[str, Any]:
    """Makes the runs that are not made yet, writes the three files and returns summary.json.

    Raises:
      ValueError: for a folder below `workdir` that holds another run.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
      OSError: where a folder cannot be written to.
    """
    records: list[Record] = []
    claims: list[Claim] = []
    content: dict[str, Any] = {}
    for name, run in runs.items():
        print(command(name, run), flush=True)
        summary = train(load_config(run), workdir / name)
        # Nothing will be continued, and a history is large.
        shutil.rmtree(workdir / name / "checkpoints", ignore_errors=True)
        records.append(make_record(name, run, workdir / name, summary))
        claims.append(make_claim(run, records[-1]))
        print(f"  {verdict(claims[-1])}", flush=True)
        content = {
            "title": "The paper's configs on real images, reduced by overrides alone",
            "claims": [claim._asdict() for claim in claims],
            "runs": {str(record["run"]): record for record in records},
            "wall_time_s": round(sum(float(record["wall_time_s"]) for record in records), 3),
            **environment(),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_records(out / "records.csv", records)
        (out / "README.md").write_text(describe_runs(content))
        write_json(out / "summary.json", content)
    return content


_TEXT = """
Written by `python -m experiments.reduced --out=results/reduced`: the shipped configs, run
as they are but for the overrides in the commands below. It shows that every one of them trains on
real images with the delay of the paper, not that it reaches the paper's error; for that a GPU or
TPU takes the configs without overrides.

A train loss is that of the parameters at which gradients are taken, the stale ones: with a delay of
31 the first 32 values are all those of the first parameters. The sample of ImageNet has one image a
class and 200 other classes for validation, so its error means nothing: there the train loss is to
fall. Momentum that is not damped takes steps ten times as large, and shifted momentum starts ten
times as small, so their learning rates differ.
"""


def describe_runs(content: Mapping[str, Any]) -> str:
    """Returns the README.md of a summary: the table, the claims, the commands, the versions."""
    records = list(content["runs"].values())
    rows = [
        {
            "run": record["run"],
            "updates": record["updates"],
            "largest staleness": record["max_staleness"],
            "learning rate": f"{record['learning_rate']:.3g}",
            "train loss, first and last": f"{record['first_train_loss']:.3f}, "
            f"{record['last_train_loss']:.3f}",
            "validation error": f"{record['validation_error']:.1%}",
            "chance": f"{record['chance_error']:.1%}",
            "beats chance": record["beats_chance"],
            "seconds": f"{record['wall_time_s']:.0f}",
        }
        for record in records
    ]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    device = content["device"]
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    lines = [
        f"# {content['title']}",
        _TEXT,
        markdown_table(rows),
        "\n## Claims\n",
        *(f"* {verdict(Claim(**claim))}" for claim in content["claims"]),
        "\n## Commands\n",
        *(f"    {record['command']}\n" for record in records),
        f"Made in {content['wall_time_s']:.0f} s on {device['host_cores']} cores of a "
        f"{device['platform']}; {versions}; commit {commits}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit code, see `run_command`."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/reduced", help="of the table")
    parser.add_argument("--workdir", default="runs/reduced", help="of the runs")
    parser.add_argument("--only", default="", help="comma-separated names of runs; all by default")
    options = parser.parse_args(arguments)
    return run_command("reduced", lambda: _make(options))


def _make(options: argparse.Namespace) -> None:
    names = options.only.split(",") if options.only else list(REDUCED_RUNS)
    unknown = [name for name in names if name not in REDUCED_RUNS]
    if unknown:
        raise ValueError(f"unknown run {unknown[0]!r}: use some of {', '.join(REDUCED_RUNS)}")
    chosen = {name: REDUCED_RUNS[name] for name in names}
    out, workdir = (named_folder(getattr(options, o), o) for o in ("out", "workdir"))
    content = make_runs(out, workdir, chosen)
    held = count_held([Claim(**claim) for claim in content["claims"]])
    print(f"{held} claims hold; see {out / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
