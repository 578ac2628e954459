"""Trains one configuration: python scripts/train.py --config=configs/X.py[:arm] --workdir=DIR.

The same command again resumes an interrupted run. Exit codes: 0 the run is finished (or diverged),
2 a mistake in the arguments or a folder that cannot be used, 75 stopped by SIGTERM or SIGINT with
everything saved, 130 stopped by SIGINT with the last checkpoint as it was. With --plan it prints
the memory that the run will take on each device, and needs neither data nor workdir.
"""

import inspect
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/X.py or configs/X.py:arm")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run is written to.")
_PLAN = flags.DEFINE_bool("plan", False, "Print the memory that the run will take; don't run it.")


def main(argv: list[str]) -> None:
    """Runs the configuration; a mistake of the user's is one line and exit code 2."""
    from asgd_jax.training import preemption, train
    from asgd_jax.training.compilation_cache import use_compilation_cache
    from asgd_jax.training.mesh import initialize_processes
    from asgd_jax.training.plan import format_plan, plan_memory

    del argv
    _quiet()
    use_compilation_cache()
    config = _CONFIG.value
    try:
        if config.multihost:
            initialize_processes(
                config.coordinator,
                config.num_processes,
                config.process_id,
                config.coordinator_timeout,
            )
        if _PLAN.value:
            print(format_plan(config, plan_memory(config)))
            return
        summary = train(config, _WORKDIR.value)
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))
    except preemption.Preempted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except KeyboardInterrupt:
        print("train.py: interrupted; the last checkpoint is kept", file=sys.stderr)
        sys.exit(130)
    final = summary["final"]
    print(
        f"{summary['status']} after {summary['steps']} steps: "
        f"train loss {final['train_loss']:.4g}, validation error {final['validation_error']:.2%}; "
        f"see {_WORKDIR.value}"
    )


def _quiet() -> None:
    """Leaves the terminal to this program's own lines."""
    # TFDS reports every file that it opens, Orbax the traceback of every error that it also raises.
    logging.set_verbosity(logging.FATAL)

    def report(unraisable: Any) -> None:
        # When one array cannot be read or written, the coroutines of all others say so as well.
        if not (
            inspect.iscoroutine(unraisable.object)
            or str(unraisable.exc_value) == "Event loop is closed"
        ):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def _complain(error: Exception) -> int:
    # An error within a config file arrives with its traceback; what it says is the last line.
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    print(f"train.py: {last.strip().removeprefix('ValueError: ')}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None or not (_WORKDIR.value or _PLAN.value):
            raise ValueError("needs --config=configs/X.py and --workdir=DIR")
        if "://" in (_WORKDIR.value or ""):
            raise ValueError(
                f"workdir={_WORKDIR.value!r} must be a folder: mount the bucket (gcsfuse) and name "
                "its mount point"
            )
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}: options start with --")
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        sys.exit(_complain(error))
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
