"""A progress bar on a terminal, and nothing anywhere else: no run ends for want of one."""

import sys
from typing import Any


def progress_bar(total: int, *, unit: str, initial: int = 0, show: bool = True) -> Any:
    """Returns tqdm's bar, a context manager with `update(n)`; silent where no terminal sees it.

    Args:
      total: units in all.
      unit: what is counted.
      initial: units done already.
      show: False for silence on a terminal too.
    """
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit=unit, disable=not (show and _on_terminal()))


def _on_terminal() -> bool:
    # None where the descriptor is closed (`2>&-`); a stand-in for a stream may lack the method.
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError, OSError):
        return False
