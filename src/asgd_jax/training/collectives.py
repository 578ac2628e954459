"""What the devices of a compiled program send one another."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
_INSTRUCTION = re.compile(rf"= (.*?) ({_KINDS})\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One exchange between all devices.

    Attributes:
      kind: "all-to-all", "all-gather", "all-reduce", "reduce-scatter" or "collective-permute".
      received: bytes that come in on each device, its own share counted too: the size of the
        result, and for an all-reduce, which is a reduce-scatter and an all-gather, twice that.
      op_name: where in the program it comes from.
    """

    kind: str
    received: int
    op_name: str


def collectives_of(text: str) -> list[Collective]:
    """Returns the exchanges of a program compiled for CPU devices; one in a loop is there once.

    Other backends write an exchange as a pair, `-start` and `-done`, which this does not read.

    Args:
      text: of `compiled.as_text()`.

    >>> line = '%x = (f32[4,8]{1,0}, bf16[2]{0}) all-reduce(%a, %b), metadata={op_name="jit(f)/g"}'
    >>> collectives_of(line)
    [Collective(kind='all-reduce', received=264, op_name='jit(f)/g')]
    """
    return list(_collectives(text))


def _collectives(text: str) -> Iterator[Collective]:
    for line in text.splitlines():
        match = _INSTRUCTION.search(line)
        if match:
            size = sum(_num_bytes(*shape) for shape in _ARRAY.findall(match[1]))
            name = _OP_NAME.search(line)
            twice = 2 if match[2] == "all-reduce" else 1
            yield Collective(match[2], twice * size, name[1] if name else "")


def _num_bytes(kind: str, bits: str, shape: str) -> int:
    width = 8 if kind == "pred" else int(bits)
    return math.prod(int(size) for size in shape.split(",") if size) * width // 8
