"""The implemented optimizers against the theory: the Jacobian of a train step knows no formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

import asgd_jax
import asgd_jax.stability as stability
from asgd_jax import delays

pytestmark = pytest.mark.slow

max_rate = stability.optimizer_max_learning_rate
radius = stability.optimizer_spectral_radius


def damped(learning_rate, momentum=0.9):
    return optax.chain(optax.ema(momentum, debias=False), optax.scale(-learning_rate))


def undamped(learning_rate, momentum=0.9):
    return optax.sgd(learning_rate, momentum)


def nesterov(learning_rate, momentum=0.9):
    return optax.sgd(learning_rate, momentum, nesterov=True)


def shifted(delay, dampening=True, momentum=0.9):
    return lambda rate: asgd_jax.shifted_sgd(rate, momentum, delay, dampening=dampening)


def first_crossing(polynomial, top):
    """Where a root first leaves the unit circle: a fine grid, then a bisection."""

    def excess(rate):
        return abs(np.roots(polynomial(rate))).max() - 1.0

    grid = np.linspace(0.0, top, 2001)[1:]
    k = next(k for k, rate in enumerate(grid) if excess(rate) > 1e-9)
    return brentq(excess, grid[k - 1], grid[k], xtol=1e-13)


def nesterov_polynomial(pmf, rate, m=0.9):
    r"""v' = m v + g, x' = x - rate (g + m v'), g = x_stale:
    (z - 1)(z - m) + rate q(z) ((1 + m) z - m) = 0, times z^max_delay.
    """
    free = np.polymul([1.0, -1.0], [1.0, -m])
    forced = rate * np.polymul(
        pmf, [1.0 + m, -m]
    )  # q z^max_delay: p_0 belongs to the highest power
    return np.polyadd(np.r_[free, np.zeros(len(pmf) - 1)], forced)


CONSTANT = [
    *[(optax.sgd, delay, {}) for delay in (0, 1, 2, 4, 8, 16)],
    *[(undamped, delay, {"momentum": 0.9, "dampening": False}) for delay in (1, 4)],
    *[(damped, delay, {"momentum": 0.9}) for delay in (0, 2, 8)],
    *[(shifted(k), k, {"momentum": 0.9, "kind": "shifted"}) for k in (1, 2, 8)],
    (shifted(4, dampening=False), 4, {"momentum": 0.9, "kind": "shifted", "dampening": False}),
]


@pytest.mark.parametrize(("make_optimizer", "delay", "method"), CONSTANT)
def test_constant_delay(make_optimizer, delay, method):
    found = max_rate(make_optimizer, delay, sharpness=20.0)
    assert found == pytest.approx(stability.max_learning_rate(delay, sharpness=20, **method), 1e-7)


RANDOM = [
    (optax.sgd, delays.uniform(1, 4), {}),
    (optax.sgd, [0.5, 0.0, 0.0, 0.5], {}),
    (undamped, delays.discretized_normal(2), {"momentum": 0.9, "dampening": False}),
    (damped, delays.uniform(0, 3), {"momentum": 0.9}),
    (shifted(delays.uniform(1, 4)), delays.uniform(1, 4), {"momentum": 0.9, "kind": "shifted"}),
    (
        shifted(delays.discretized_normal(2)),
        delays.discretized_normal(2),
        {"momentum": 0.9, "kind": "shifted"},
    ),
]


@pytest.mark.parametrize(("make_optimizer", "delay", "method"), RANDOM)
def test_random_delay_in_the_mean(make_optimizer, delay, method):
    found = max_rate(make_optimizer, delay)
    assert found == pytest.approx(stability.max_learning_rate(delay, **method), 1e-7)


@pytest.mark.parametrize(
    ("make_optimizer", "method"),
    [
        (optax.sgd, {}),
        (damped, {"momentum": 0.9}),
        (shifted(delays.uniform(1, 3)), {"momentum": 0.9, "kind": "shifted"}),
    ],
)
def test_random_delay_in_the_mean_square(make_optimizer, method):
    delay = delays.uniform(1, 3)
    found = max_rate(make_optimizer, delay, sharpness=1e3, criterion="mean_square")
    expected = stability.max_learning_rate(delay, sharpness=1e3, criterion="mean_square", **method)
    assert found == pytest.approx(expected, 1e-7)


@pytest.mark.parametrize("pmf", [[1.0], [0, 0, 0, 1.0], [0.2, 0.5, 0.3]])
def test_nesterov(pmf):
    expected = first_crossing(functools.partial(nesterov_polynomial, pmf), 2.0)
    assert max_rate(nesterov, pmf) == pytest.approx(expected, 1e-7)


@pytest.mark.parametrize("delay", [0, 3])
def test_weight_decay_acts_on_the_live_parameter(delay):
    r"""g = x_{n-delay} + w x_n under heavy ball:
    (z - 1)(z - m) z^delay + rate z (1 + w z^delay) = 0.
    """
    m, w = 0.5, 0.3

    def polynomial(rate):
        free = np.r_[np.polymul([1.0, -1.0], [1.0, -m]), np.zeros(delay)]
        decay = np.r_[rate * w, np.zeros(delay + 1)]
        return functools.reduce(np.polyadd, [free, decay, [rate, 0.0]])

    def make_optimizer(rate):
        return optax.chain(optax.add_decayed_weights(w), optax.sgd(rate, momentum=m))

    expected = first_crossing(polynomial, 4.0)
    assert max_rate(make_optimizer, delay) == pytest.approx(expected, 1e-7)


def test_extra_arguments_reach_the_optimizer():
    """Gradients scaled by 1 / (1 + staleness): z - 1 + rate sum_k p_k / (1 + k) z^-k = 0."""
    pmf = np.array([0.25, 0.25, 0.5])

    def update(updates, state, params=None, *, staleness, **extra_args):
        return updates / (1 + staleness), state

    def make_optimizer(rate):
        scale = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        return optax.chain(scale, optax.sgd(rate))

    def polynomial(rate):
        return np.polyadd([1.0, -1.0, 0.0, 0.0], rate * pmf / (1 + np.arange(3)))

    assert max_rate(make_optimizer, pmf) == pytest.approx(first_crossing(polynomial, 10.0), 1e-7)


def without_effect(rate):
    """SGD, and a state that explodes by itself and that nobody reads."""

    def update(updates, state, params=None):
        return updates, 3.0 * state + updates

    return optax.chain(optax.GradientTransformation(jnp.zeros_like, update), optax.sgd(rate))


CHAINS = {
    "clip": (lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(rate)), 2),
    "inject_hyperparams": (optax.inject_hyperparams(optax.sgd), 2),
    "warm-up": (lambda rate: optax.sgd(optax.linear_schedule(0.0, rate, 300)), 2),
    "float32": (lambda rate: optax.chain(optax.trace(0.0, accumulator_dtype=jnp.float32),
                                         optax.scale(-rate)), 2),
    "delay_gradients": (lambda rate: optax.chain(asgd_jax.delay_gradients(2), optax.sgd(rate)), 0),
    "delayed": (lambda rate: asgd_jax.delayed(optax.sgd(rate), 2), 0),
    "delayed, injected": (
        optax.inject_hyperparams(
            lambda learning_rate: asgd_jax.delayed(optax.sgd(learning_rate), delays.constant(2))
        ),
        0,
    ),
    "state without effect": (without_effect, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_what_leaves_the_threshold_alone(name):
    make_optimizer, delay = CHAINS[name]
    assert max_rate(make_optimizer, delay) == pytest.approx(stability.max_learning_rate(2), 1e-6)


def test_bias_correction_fades():
    found = max_rate(lambda rate: optax.chain(optax.ema(0.99), optax.scale(-rate)), 1)
    assert found == pytest.approx(stability.max_learning_rate(1, momentum=0.99), 1e-6)


def test_schedule_is_read_where_asked():
    def make_optimizer(rate):
        return optax.sgd(optax.cosine_decay_schedule(rate, 40_000))

    found = max_rate(make_optimizer, 2, at_update=20_000)
    assert found == pytest.approx(2 * stability.max_learning_rate(2), 1e-3)
    with pytest.raises(ValueError, match=r"stable at every learning rate up to .*at_update"):
        max_rate(make_optimizer, 2)  # settles at a learning rate of 0
    with pytest.raises(ValueError, match="still changes after 60 updates"):
        max_rate(lambda rate: optax.sgd(optax.exponential_decay(rate, 1, 0.9)), 2, at_update=60)


def test_gradient_accumulation_has_its_own_period():
    """Two gradients, of which each is two calls old, per update; period 2 against a ring of 3."""
    rate, delay = 0.3, 2

    def after_six_calls(history):
        history, total = list(history), 0.0
        for call in range(6):
            total += history[-1 - delay] / 2
            if call % 2:
                history.append(history[-1] - rate * total)
                total = 0.0
            else:
                history.append(history[-1])
        return history[-3:]

    period = np.array([after_six_calls(start) for start in np.eye(3)]).T
    expected = abs(np.linalg.eigvals(period)).max() ** (1 / 6)
    found = radius(
        lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(),
        delay,
        learning_rate=rate,
    )
    assert found == pytest.approx(expected, 1e-7)


@pytest.mark.parametrize(
    ("make_optimizer", "delay", "expected"),
    [
        # Every gradient is taken four calls, which is one update, ago: sharpness x rate < 1.
        (lambda rate: optax.MultiSteps(optax.sgd(rate), 4), 4, 0.5),
        # Four updates ago: 2 sin(pi / 18).
        (
            lambda rate: optax.MultiSteps(asgd_jax.delayed(optax.sgd(rate), 4), 4),
            0,
            np.sin(np.pi / 18),
        ),
    ],
)
def test_delays_inside_and_outside_of_accumulation(make_optimizer, delay, expected):
    assert max_rate(make_optimizer, delay, sharpness=2.0) == pytest.approx(expected, 1e-6)


def test_long_accumulation_is_not_taken_for_rest():
    """One gradient of a hundred is old: z^2 - (1 - .99 h) z + .01 h = 0, z = -1 at the edge."""
    found = max_rate(lambda rate: optax.MultiSteps(optax.sgd(rate), 100), 1)
    assert found == pytest.approx(2 / 0.98, 1e-6)


def test_lookahead_without_delay():
    """Over k updates the slow parameter becomes (1 + (1 - h)^k) / 2 of itself."""
    found = max_rate(lambda rate: optax.lookahead(optax.sgd(rate), 5, 0.5), 0)
    assert found == pytest.approx(1 + 3**0.2, 1e-7)


def test_lookahead_with_delay():
    """Period 4 of the synchronisation against a ring of 3."""
    rate, delay, period, weight = 0.8, 2, 4, 0.3

    def after_a_period(start):
        *history, slow = start
        for call in range(period):
            fast = history[-1] - rate * history[-1 - delay]
            if call == period - 1:
                fast = slow = slow + weight * (fast - slow)
            history = [*history[1:], fast]
        return [*history, slow]

    columns = np.array([after_a_period(start) for start in np.eye(delay + 2)]).T
    expected = abs(np.linalg.eigvals(columns)).max() ** (1 / period)
    found = radius(
        lambda rate: optax.lookahead(optax.sgd(rate), period, weight), delay, learning_rate=rate
    )
    assert found == pytest.approx(expected, 1e-9)


def test_what_sets_the_parameter_anew_is_followed():
    """x = -rate sum of past gradients is SGD, though no update reads x."""

    def update(updates, state, params):
        total = state + updates
        return -total - params, total

    def make_optimizer(rate):
        return optax.chain(optax.scale(rate), optax.GradientTransformation(jnp.zeros_like, update))

    assert max_rate(make_optimizer, 2) == pytest.approx(stability.max_learning_rate(2), 1e-7)


def test_extra_args_are_handed_to_every_update():
    """At a loss that stays above its minimum polyak_sgd is SGD, and a plateau divides by four."""
    polyak = max_rate(optax.polyak_sgd, 2, extra_args={"value": 0.5})
    assert polyak == pytest.approx(stability.max_learning_rate(2), 1e-7)

    def on_plateau(rate):
        plateau = optax.contrib.reduce_on_plateau(min_scale=0.25)
        return optax.chain(optax.sgd(rate), plateau)

    found = radius(on_plateau, 2, learning_rate=1.2, extra_args={"value": 0.5})
    assert found == pytest.approx(stability.spectral_radius(2, step=0.3), 1e-9)


@pytest.mark.parametrize("delay", [0, 3])
def test_adam_with_a_held_preconditioner(delay):
    """Damped heavy ball at the curvature a / (sqrt(nu) + eps)."""
    eps, nu = 1e-3, 0.0625
    adam = functools.partial(optax.adam, eps=eps)
    state = optax.tree.set(adam(1.0).init(jnp.zeros(())), nu=jnp.asarray(nu))
    expected = stability.max_learning_rate(delay, sharpness=5.0 / (np.sqrt(nu) + eps), momentum=0.9)
    found = max_rate(adam, delay, sharpness=5.0, optimizer_state=state)
    assert found == pytest.approx(expected, 1e-6)


def test_held_state_with_its_own_learning_rate():
    rms = optax.inject_hyperparams(functools.partial(optax.rmsprop, decay=0.5, eps=0.0))
    state = optax.tree.set(rms(123.0).init(jnp.zeros(())), nu=jnp.asarray(4.0))
    assert max_rate(rms, 1, optimizer_state=state) == pytest.approx(2.0, 1e-6)
    with pytest.raises(ValueError, match="another structure than the state of make_optimizer"):
        max_rate(optax.sgd, 1, optimizer_state=state)
    with pytest.raises(
        ValueError, match=r"leaf of shape \(2,\), not \(\): .*init\(jnp.zeros\(\(\)\)\)"
    ):
        max_rate(rms, 1, optimizer_state=rms(1.0).init(jnp.zeros(2)))
    moving = optax.tree.set(optax.sgd(1.0, 0.9).init(jnp.zeros(())), trace=jnp.ones(()))
    with pytest.raises(ValueError, match=r"momenta in optimizer_state= to zero, here \[0\].trace$"):
        max_rate(undamped, 1, optimizer_state=moving)


def test_a_preconditioner_of_zero_is_named():
    state = optax.adam(1.0).init(jnp.zeros(()))
    with pytest.raises(ValueError, match=r"\[0\].nu in optimizer_state= must not be zero$"):
        max_rate(optax.adam, 1, optimizer_state=state)


@pytest.mark.standard_promotion
def test_sm3_with_a_held_accumulator():
    """It needs an axis: damped heavy ball of 0.5 at the curvature 1 / sqrt(sum)."""
    sm3 = functools.partial(optax.sm3, momentum=0.5)
    first, *rest = sm3(1.0).init(jnp.zeros(1))
    state = (first._replace(mu=[jnp.array([4.0])]), *rest)
    expected = stability.max_learning_rate(2, sharpness=0.5, momentum=0.5)
    assert max_rate(sm3, 2, optimizer_state=state) == pytest.approx(expected, 1e-6)


def rectified(rate):
    """max(gradient, 0): homogeneous, but not linear."""
    update = optax.stateless(lambda updates, params: jnp.maximum(updates, 0.0))
    return optax.chain(update, optax.sgd(rate))


def test_what_is_homogeneous_is_not_yet_linear():
    """The refusals of optax's own optimizers are in test_optax_optimizers."""
    with pytest.raises(ValueError, match=r"not linear near a minimum.*nor is it while its state"):
        max_rate(rectified, 1)


@pytest.mark.parametrize(
    ("delay", "rate", "criterion"), [(0, 0.3, "mean_square"), (3, 1.5, "mean")]
)
def test_spectral_radius(delay, rate, criterion):
    found = radius(damped, delay, learning_rate=rate, sharpness=0.5, criterion=criterion)
    expected = stability.spectral_radius(delay, step=0.5 * rate, momentum=0.9)
    assert found == pytest.approx(expected, 1e-9)


def test_mean_square_radius_of_random_delays():
    delay = delays.uniform(0, 2)
    found = radius(optax.sgd, delay, learning_rate=0.9, criterion="mean_square")
    expected = stability.spectral_radius(delay, step=0.9, criterion="mean_square")
    assert found == pytest.approx(expected, 1e-9)


def test_learning_rate_that_cannot_be_traced():
    found = radius(lambda rate: optax.sgd(float(rate)), 2, learning_rate=0.7)
    assert found == pytest.approx(stability.spectral_radius(2, step=0.7), 1e-9)


def test_nothing_global_changes():
    before = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion
    radius(optax.sgd, 0, learning_rate=0.5)
    assert (jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion) == before
    assert jnp.zeros(()).dtype == jnp.float32


REFUSED = {
    "must be a function of the learning rate": (optax.sgd(0.1), 1, {}),
    "must return an optax optimizer, got 3": (lambda rate: 3, 1, {}),
    "needs 'value': pass extra_args=, a mapping": (optax.polyak_sgd, 1, {}),
    "needs 'value', which a wrapper around it does not hand on": (
        lambda rate: optax.MultiSteps(optax.polyak_sgd(rate), 2),
        1,
        {"extra_args": {"value": 1.0}},
    ),
    "extra_args must be a mapping of names .* got 3": (optax.sgd, 1, {"extra_args": 3}),
    "extra_args must not hold 'grad'.*line search": (
        optax.lbfgs,
        1,
        {"extra_args": {"grad": 0.0}},
    ),
    r"\(extra_args= hands it more\): obj_fn must be provided": (optax.contrib.sophia, 1, {}),
    r"must not branch on values of its arguments \(TracerBoolConversionError\)": (
        lambda rate: optax.stateless(lambda updates, params: updates if updates > 0 else -updates),
        1,
        {},
    ),
    r"cannot update one scalar parameter .*, it raises AttributeError$": (
        lambda rate: optax.stateless(lambda updates, params: updates.missing),
        1,
        {},
    ),
    r"by 0\.\d+%\): pass optimizer_state=.* to hold \[0\].sum_of_squares fixed$": (
        functools.partial(optax.adagrad, initial_accumulator_value=1e-3),
        1,
        {},
    ),
    r"does not repeat in 8192 updates: accumulate .* more often": (
        lambda rate: optax.MultiSteps(optax.sgd(rate), 5000),
        1,
        {},
    ),
    "already delays its gradients: pass delay=0": (
        lambda rate: asgd_jax.delayed(optax.sgd(rate), 2),
        2,
        {},
    ),
    "draws random delays": (
        lambda rate: asgd_jax.delayed(optax.sgd(rate), delays.uniform(0, 2)),
        0,
        {"at_update": 100},
    ),
    "keeps values in integers": (
        lambda rate: asgd_jax.delayed(optax.sgd(rate), 2, history_dtype=jnp.bfloat16),
        0,
        {},
    ),
    "moves the parameter without any gradient": (
        lambda rate: optax.chain(optax.sgd(rate), optax.add_noise(1.0, 0.5, jax.random.key(0))),
        1,
        {},
    ),
    "unstable at every learning rate": (lambda rate: optax.sgd(-rate), 1, {}),
    "the optimizer is stable at every learning rate": (lambda rate: optax.set_to_zero(), 1, {}),
    "stable at every learning rate .* extra_args": (
        optax.polyak_sgd,
        1,
        {"extra_args": {"value": 0.0}},
    ),
    "lyapunov_exponent": (optax.sgd, delays.from_trace([0, 1, 2]), {}),
    "delay must be an integer >= 0, got -1": (optax.sgd, -1, {}),
    "sharpness must be a finite number > 0, got 0": (optax.sgd, 1, {"sharpness": 0}),
    "at_update must be an integer >= 0, got -3": (optax.sgd, 1, {"at_update": -3}),
    "criterion must be one of mean, mean_square": (optax.sgd, 1, {"criterion": "mode"}),
    "delay is too large": (optax.sgd, 6000, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    make_optimizer, delay, arguments = REFUSED[message]
    with pytest.raises(ValueError, match=message) as error:
        max_rate(make_optimizer, delay, **arguments)
    assert "\n" not in str(error.value)


def test_refused_learning_rate():
    with pytest.raises(ValueError, match="learning_rate must be a finite number > 0, got -1"):
        radius(optax.sgd, 1, learning_rate=-1.0)


@pytest.mark.standard_promotion
def test_adam_s_prediction_at_a_held_state_is_that_of_its_momentum():
    """An optimizer that delays by itself is held like others; structures are compared as text."""

    def adam(rate):
        return asgd_jax.delayed(optax.adam(rate), 7, predict=asgd_jax.predict.adamw(rate))

    def heavy_ball(rate):
        ahead = asgd_jax.predict.momentum(0.1 * rate, decay=0.9)
        return asgd_jax.delayed(optax.sgd(0.1 * rate, momentum=0.9), 7, predict=ahead)

    state = optax.tree.set(adam(1.0).init(jnp.zeros(())), nu=jnp.array(1.0))
    held = stability.optimizer_max_learning_rate(adam, 0, optimizer_state=state)
    expected = stability.optimizer_max_learning_rate(heavy_ball, 0)
    assert held == pytest.approx(expected, rel=1e-4)  # the bias of early updates is not gone
