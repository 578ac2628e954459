r"""At which learning rate does delayed gradient descent leave a minimum? Measured, and predicted.

The measurement behind fig. 2: find a minimum, start a little beside it, and let delayed descent run
at one learning rate after another. The largest at which it stays should be $h^* / a$, with $a$ the
sharpness of the minimum and $h^*$ of `stability.max_learning_rate`.

`python -m experiments.minima` does it for a small network on scikit-learn's digits.
"""

import sys
from collections.abc import Sequence

import optax

from asgd_jax.command_line import OneLineParser
from experiments.edges.fullbatch import measure_max_learning_rate
from experiments.edges.minimum import digits_problem, find_minimum


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints measured and predicted learning rates on digits; returns the exit code."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    delays = parser.parse_args(arguments).delays
    problem = digits_problem()
    minimum = find_minimum(*problem, optax.sgd(0.05, momentum=0.98))
    print(
        f"minimum: loss {minimum.loss:.4g}, gradient norm {minimum.gradient_norm:.2g}, "
        f"sharpness {minimum.sharpness:.4g}\n\n delay   measured  predicted  difference"
    )
    try:
        for delay in delays:
            found = measure_max_learning_rate(minimum, delay, problem.loss_fn, problem.batches)
            difference = found.value / found.predicted - 1.0
            print(
                f"{delay:6}{found.value:11.5g}{found.predicted:11.5g}{difference:12.2%}", flush=True
            )
    except ValueError as error:
        print(f"minima: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
