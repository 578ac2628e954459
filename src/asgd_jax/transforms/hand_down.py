"""What `delayed` tells the optimizer that it wraps."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

# The largest delay of the `delayed` whose update is being made: a static number, which as an extra
# argument would be traced by a jit inside, or refused by a neighbour in the chain.
MAX_DELAY_AROUND: ContextVar[int | None] = ContextVar("max_delay_around", default=None)


def hand_down(
    update: Callable[..., Any],
    arguments: tuple[Any, ...],
    given: Mapping[str, Any],
    optional: Mapping[str, Any],
    max_delay: int,
) -> Any:
    """Calls `update` with the optional keywords, without those that it refuses.

    A chain takes every keyword and hands it on to members that may not, so signatures do not tell.

    Args:
      update: of an optax optimizer.
      arguments: positional ones.
      given: keywords of the caller's.
      optional: keywords that may be left out.
      max_delay: for `MAX_DELAY_AROUND`.

    >>> hand_down(lambda x, *, a: x + a, (1,), {}, {"a": 2, "b": 3}, 0)
    3
    """
    token = MAX_DELAY_AROUND.set(max_delay)
    left = dict(optional)
    try:
        while True:
            try:
                return update(*arguments, **{**left, **given})
            except TypeError as error:
                said = str(error)
                refused = [name for name in left if f"'{name}'" in said]
                if not refused or "unexpected keyword argument" not in said.lower():
                    raise
                left = {name: value for name, value in left.items() if name not in refused}
    finally:
        MAX_DELAY_AROUND.reset(token)
