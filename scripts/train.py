"""Trains one configuration: python scripts/train.py --config=configs/X.py[:arm] --workdir=DIR."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/X.py or configs/X.py:arm")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run is written to.")


def main(argv: list[str]) -> None:
    """Runs the configuration; a mistake of the user's is one line and exit code 2."""
    from asgd_jax.training import train
    from asgd_jax.training.mesh import initialize_processes

    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS reports every file that it opens
    config = _CONFIG.value
    try:
        if config.multihost:
            initialize_processes(config.coordinator, config.num_processes, config.process_id)
        summary = train(config, _WORKDIR.value)
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))
    final = summary["final"]
    print(
        f"{summary['status']} after {summary['steps']} steps: "
        f"train loss {final['train_loss']:.4g}, validation error {final['validation_error']:.2%}; "
        f"see {_WORKDIR.value}"
    )


def _complain(error: Exception) -> int:
    # An error within a config file arrives with its traceback; what it says is the last line.
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    print(f"train.py: {last.strip().removeprefix('ValueError: ')}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None or not _WORKDIR.value:
            raise ValueError("needs --config=configs/X.py and --workdir=DIR")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}: options start with --")
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        sys.exit(_complain(error))
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
