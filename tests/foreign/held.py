"""What a loop held: the list of its parameters that every foreign program is checked against."""

import jax
import numpy as np
from parameter_server import simulate


class Held:
    """Keeps the parameters of every update of a loop.

    `delay` is an integer, or a function from the number of an update to its gradient's staleness.
    """

    def __init__(self, delay):
        self.age = delay if callable(delay) else lambda update: min(delay, update)
        self.params = []

    def check(self, stale, params, update=None):
        """`stale` is bitwise what the loop held its staleness ago.

        `params` are those that `update` (by default: one more than the last time) is made of.
        """
        update = len(self.params) if update is None else update
        self.params[update:] = [jax.tree.map(np.array, params)]
        then = self.params[update - self.age(update)]
        assert jax.tree.structure(stale) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, stale, then)

    def check_run(self, stale, params):
        """As `check`, of a whole run with the steps on the leading axis of every leaf."""
        for step in range(len(jax.tree.leaves(params)[0])):
            self.check(*jax.tree.map(lambda leaf: leaf[step], (stale, params)))

    def check_trajectory(self, inner, gradient, rtol=1e-5):
        """The loop went where a list of all parameters in plain Python goes."""
        ages = [self.age(step) for step in range(len(self.params) - 1)]
        start = jax.tree.map(jax.numpy.asarray, self.params[0])
        expected = simulate(inner, ages, start, gradient)
        for mine, simulated in zip(self.params, expected, strict=True):
            jax.tree.map(
                lambda leaf, like: np.testing.assert_allclose(leaf, like, rtol=rtol, atol=1e-6),
                mine,
                simulated,
            )
