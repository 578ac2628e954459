"""The paper's point in a minute: what a delay of 32 does, and what eq. 8 repairs.

`make demo`, or `python -m experiments.demo --out=DIR`: scikit-learn's digits, a small CNN,
33 workers. No download, no accelerator.
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asgd_jax.training import train
from asgd_jax.training.command import named_folder, run_command
from asgd_jax.training.folder.metrics import read_rows
from configs import digits
from experiments import style

# Arms of configs/digits.py, and what the demo changes in them.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "S-SGD, large batch": ("ssgd", {}),
    # Logged more often than once an epoch: it does not last that long.
    "A-SGD, same learning rate": ("asgd_same", {"log_every_steps": 5}),
    "A-SGD, eq. 8 (learning rate / delay)": ("asgd", {}),
}


def run(out: Path) -> dict[str, dict[str, Any]]:
    """Trains every arm into a folder of its own; returns the summaries by arm."""
    summaries = {}
    for name, (arm, changes) in ARMS.items():
        print(f"training: {name}", flush=True)
        config = digits.get_config(arm)
        config.update(checkpoint_every_epochs=0, **changes)  # too short to need any
        summaries[name] = train(config, out / _folder(name))
    return summaries


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Returns the summaries as a table, a line an arm."""
    heads = f"{'delay':>6}{'learning rate':>15}{'train loss':>12}{'validation error':>18}  outcome"
    lines = [f"{'':38}{heads}"]
    for name, summary in summaries.items():
        final, diverged = summary["final"], summary["diverged_at_step"]
        outcome = "converged" if diverged is None else f"diverged at step {diverged}"
        lines.append(
            f"{name:38}{summary['batches']['delay']:>6}{summary['learning_rate']:>15.4g}"
            f"{final['train_loss']:>12.3g}{final['validation_error']:>18.1%}  {outcome}"
        )
    return "\n".join(lines)


def plot(out: Path) -> Any:
    """Returns the figure: validation error and train loss against epochs, a line an arm."""
    asgd = digits.get_config("asgd")
    figure, (left, right) = style.new_figure(2)
    for index, name in enumerate(ARMS):
        rows = read_rows(out / _folder(name))
        evaluated = [row for row in rows if not math.isnan(row["validation_error"])]
        look = {"color": style.COLOURS[index], "marker": style.MARKERS[index], "label": name}
        left.plot(
            [row["epoch"] for row in evaluated],
            [100 * row["validation_error"] for row in evaluated],
            **style.sparse_markers(len(evaluated)),
            **look,
        )
        right.plot(
            [row["epoch"] for row in rows],
            [row["train_loss"] for row in rows],
            **style.sparse_markers(len(rows)),
            **look,
        )
        if rows[-1]["epoch"] < asgd.epochs:
            for axis, column, scale in ((left, "validation_error", 100), (right, "train_loss", 1)):
                axis.annotate(
                    "diverged",
                    (rows[-1]["epoch"], scale * rows[-1][column]),
                    (8, -4),
                    textcoords="offset points",
                    color=style.COLOURS[index],
                )
    left.set(xlabel="epoch", ylabel="validation error (%)", ylim=(0, 100))
    right.set(xlabel="epoch", ylabel="train loss (nats)", yscale="log")
    left.set_title(f"A delay of {asgd.delay} updates, with and without eq. 8")
    right.set_title("the same runs, train loss")
    left.legend(loc="center right")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for all results")
    out = parser.parse_args(arguments).out
    return run_command("demo", lambda: _make(out), stopped="stopped; start it again, it is short")


def _make(folder: str) -> None:
    style.require_matplotlib()
    out = named_folder(folder, "out")
    # Made beside its place and moved there: a broken demo leaves the last good one alone.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        partial = Path(beside) / "demo"
        summaries = run(partial)
        style.save(plot(partial), partial / "demo.png")
        (partial / "table.txt").write_text(table(summaries) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    print(f"\n{table(summaries)}\n\ntable: {out / 'table.txt'}\npicture: {out / 'demo.png'}")


def _folder(name: str) -> str:
    words = name.partition("(")[0].replace(",", "").replace(".", "").lower().split()
    return "_".join(words)


if __name__ == "__main__":
    sys.exit(main())
