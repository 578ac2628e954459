"""A model of the time of a round on a pod: nothing is measured, every number is a data sheet's."""

from typing import NamedTuple

from benchmarks.result import TableRow


class Chip(NamedTuple):
    """An accelerator.

    Attributes:
      flops: operations a second at the peak.
      memory: bytes a second to its memory.
      network: bytes a second to the other chips, all links together.
    """

    flops: float
    memory: float
    network: float


TPU_V4 = Chip(flops=275e12, memory=1.2e12, network=300e9)  # bfloat16; Google's data sheet
UTILISATION = 0.4  # of the peak that a ResNet reaches; the same for every way of training
_LATENCY = 20e-6  # of an exchange
_FLOPS_PER_IMAGE = 24.6e9  # ResNet-50 at 224 pixels: three times 4.1 G multiply-adds of two each
_PARAMETERS = 25.6e6
_PASSES = 6  # over parameters in an update: gradient, momentum and parameters, read and written


def model_rows(num_workers: int, batch_size: int, num_chips: int) -> list[TableRow]:
    """Returns the milliseconds of `num_workers` updates of `batch_size` samples, three ways.

    One synchronous update of all samples; the same number of delayed updates one after another,
    each divided over all chips; and a round.

    >>> rows = model_rows(32, 256, 16)
    >>> [round(row["all"]) for row in rows]
    [116, 152, 117]
    """
    chip, size = TPU_V4, 4 * _PARAMETERS
    compute = num_workers * batch_size * _FLOPS_PER_IMAGE / num_chips / (UTILISATION * chip.flops)
    # An all-reduce brings every chip twice the gradient's bytes, as the two exchanges of a round
    # do for each of its workers.
    reduce = 2 * size * (1 - 1 / num_chips) / chip.network
    update = _PASSES * size / chip.memory
    workers = num_workers / num_chips
    ways = {
        "one synchronous update": (reduce + _LATENCY, update),
        "one by one": (num_workers * (reduce + _LATENCY), num_workers * update),
        "a round": (workers * reduce + 2 * _LATENCY, num_workers * update / num_chips),
    }
    return [
        {
            "way": name,
            "chips": num_chips,
            "compute": 1e3 * compute,
            "exchange": 1e3 * exchange,
            "updates": 1e3 * updates,
            "all": 1e3 * (compute + exchange + updates),
        }
        for name, (exchange, updates) in ways.items()
    ]
