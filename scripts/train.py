"""Trains one configuration: python scripts/train.py --config=configs/X.py[:arm] --workdir=DIR.

The same command again resumes an interrupted run; --config.FIELD=VALUE overrides a field. Exit
codes: 0 the run is finished (or diverged), 2 a mistake in the arguments or a folder that cannot be
used, 75 stopped by SIGTERM or SIGINT with everything saved, 130 stopped by SIGINT with the last
checkpoint as it was. With --plan it prints the memory that the run will take on each device, and
needs neither data nor workdir.
"""

import argparse
import inspect
import logging as stdlib_logging
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags


class Command(NamedTuple):
    """What the command line asks for; without a workdir it is a plan."""

    config: ConfigDict
    workdir: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line, the config file included, and makes nothing.

    Raises:
      ValueError: one line about the first mistake.
    """
    from asgd_jax.training.command import named_folder
    from asgd_jax.training.config import check_field

    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE[:ARM]", help="configs/X.py or configs/X.py:arm")
    parser.add_argument("--workdir", metavar="DIR", help="folder that the run is written to")
    parser.add_argument("--plan", action="store_true", help="print the memory needed; don't run")
    options, overrides = parser.parse_known_args(arguments)
    if not options.config or not (options.workdir or options.plan):
        raise ValueError("needs --config=configs/X.py and --workdir=DIR")
    workdir = None if options.plan else named_folder(options.workdir, "workdir")
    config = load_config(options.config)
    for override in overrides:
        if field := re.match(r"--?(?:no)?config\.([^=]*)", override):
            check_field(config, field[1])
    values = flags.FlagValues()
    words = ["train.py", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
        _, *rest = values(words)
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: options start with --")
    return Command(config, workdir)


def load_config(address: str) -> ConfigDict:
    """Returns the configuration of FILE or FILE:ARM; folders and arms may hold colons too.

    Raises:
      ValueError: one line, when there is no such file or it has no such arm or is no config file.
    """
    parts = address.split(":")
    ways = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(1, len(parts) + 1)]
    found = [(file, arm) for file, arm in ways if Path(file).expanduser().is_file()]
    if not found:
        raise ValueError(f"--config={address}: there is no such file")
    file, arm = found[0]
    try:
        get_config = runpy.run_path(str(Path(file).expanduser()), run_name="config")["get_config"]
        config = get_config(arm) if len(file) < len(address) else get_config()
    except ValueError:  # in the file's own words
        raise
    except Exception as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{file}: get_config must return a ConfigDict, got {config!r}")
    return config.lock()


def main(arguments: Sequence[str]) -> int:
    """Runs the configuration; returns the exit code, see `exit_code`."""
    import jax

    from asgd_jax.training import train
    from asgd_jax.training.command import exit_code
    from asgd_jax.training.curves import save_curves
    from asgd_jax.training.mesh import initialize_processes
    from asgd_jax.training.plan import format_plan, make_plan

    with exit_code("train.py") as code:
        config, workdir = parse(arguments)
        if config.multihost:
            initialize_processes(
                config.coordinator,
                config.num_processes,
                config.process_id,
                config.coordinator_timeout,
            )
        if workdir is None:
            print(format_plan(config, make_plan(config)))
        else:
            summary = train(config, workdir)
            if jax.process_index() == 0:
                save_curves(workdir)
            final = summary["final"]
            print(
                f"{summary['status']} after {summary['steps']} steps: "
                f"train loss {final['train_loss']:.4g}, "
                f"validation error {final['validation_error']:.2%}; see {workdir}"
            )
    return code[0]


def quiet() -> None:
    """Leaves the terminal to this program's own lines, and to warnings."""
    # TFDS reports every file that it opens, Orbax the traceback of every error that it also raises.
    # A warning may be all that is ever said.
    logging.set_verbosity(logging.WARNING)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)  # Orbax raises it too
    logging.get_absl_logger().addFilter(lambda record: record.levelname == "WARNING")

    def report(unraisable: Any) -> None:
        # When one array cannot be read or written, the coroutines of all others say so as well.
        if not (
            inspect.iscoroutine(unraisable.object)
            or str(unraisable.exc_value) == "Event loop is closed"
        ):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


if __name__ == "__main__":
    from asgd_jax.training.command import use_compilation_cache, use_threaded_convolutions

    quiet()
    use_compilation_cache()
    use_threaded_convolutions()
    sys.exit(main(sys.argv[1:]))
