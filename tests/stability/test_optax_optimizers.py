"""Every optimizer of optax: a threshold that the real one obeys, or one true line that refuses it.

The thresholds are compared with runs of the optimizer itself on the quadratic, with a gradient one
update old; where a refusal names a remedy, the test follows it.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import asgd_jax.stability as stability

pytestmark = pytest.mark.slow

max_rate = stability.optimizer_max_learning_rate
ZERO = jnp.zeros(())


def chained(*transforms):
    return lambda rate: optax.chain(*transforms, optax.sgd(rate))


def every_optimizer():
    """All whose first argument is a learning rate, under the name of their module and their own."""
    for module in (optax, optax.contrib):
        for name in dir(module):
            function = getattr(module, name)
            is_function = inspect.isfunction(function) or type(function) is functools.partial
            if not is_function or name.startswith(("scale_by", "_")):
                continue
            if next(iter(inspect.signature(function).parameters), "").endswith("learning_rate"):
                yield name, function


OPTIMIZERS = dict(every_optimizer()) | {
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "lbfgs": functools.partial(optax.lbfgs, linesearch=None),
    "dpsgd": lambda rate: optax.contrib.dpsgd(rate, 1.0, 0.1, 0),
    "line search": optax.lbfgs,
    "adaptive_grad_clip": chained(optax.adaptive_grad_clip(0.1)),
    "normalize": chained(optax.contrib.normalize()),
    "mechanize": lambda rate: optax.contrib.mechanize(optax.sgd(rate)),
    "reduce_on_plateau": lambda rate: optax.chain(
        optax.sgd(rate), optax.contrib.reduce_on_plateau(min_scale=0.25)
    ),
    "lookahead": lambda rate: optax.lookahead(optax.sgd(rate, 0.5), 3, 0.5),
    "MultiSteps": lambda rate: optax.MultiSteps(optax.sgd(rate), 3).gradient_transformation(),
    "apply_every": chained(optax.apply_every(3)),
    "apply_if_finite": lambda rate: optax.apply_if_finite(optax.sgd(rate), 2),
    "split_real_and_imaginary": lambda rate: optax.contrib.split_real_and_imaginary(
        optax.sgd(rate)
    ),
    "flatten": lambda rate: optax.flatten(optax.sgd(rate, 0.9)),
}

# Arguments of the calculator, and what the run needs: extra arguments, the number of updates.
THRESHOLDS = {
    "sgd": {},
    "optimistic_gradient_descent": {},
    "adagrad": {"num_updates": 300},  # before its accumulator fills up
    "polyak_sgd": {"extra_args": {"value": 1.0}},
    "momo": {"extra_args": {"value": 1.0}, "num_updates": 4000},
    "reduce_on_plateau": {"extra_args": {"value": 1.0}},
    "sophia": {"extra_args": {"obj_fn": lambda x: jnp.sum(x**2)}, "num_updates": 40_000},
    "schedule_free_sgd": {"at_update": 10_000, "num_updates": 20_000},
    "lookahead": {},
    "MultiSteps": {},
    "apply_every": {},
    "apply_if_finite": {},
    "split_real_and_imaginary": {},
    "flatten": {},
}

# What is to be held, and what to be set to zero with it.
HELD = {
    "adabelief": "[0].nu; [0].mu",
    "adadelta": "[1].e_g, [1].e_x",
    "adafactor": "[0].v",
    **dict.fromkeys(
        [
            *("adam", "adamax", "adamaxw", "adamw", "nadam", "nadamw"),
            *("adopt", "novograd", "radam", "yogi"),
        ],
        "[0].nu; [0].mu",
    ),
    "adan": "[0].n; [0].m, [0].v, [0].g",
    "acprop": "[0].nu",
    "amsgrad": "[0].nu, [0].nu_max; [0].mu",
    "optimistic_adam": "[0].nu; [0].mu, [1].previous_gradient",
    "optimistic_adam_v2": "[0].nu; [0].mu, [1].previous_gradient",
    "rmsprop": "[0].nu",
    "sm3": "[0].mu[0]; [0].nu",
    "ademamix": "[0].nu; [0].m1, [0].m2",
    "simplified_ademamix": "[0].n; [0].m",
    "cocob": "[2].scale, [2].subgradients; [2].cumulative_gradients",
    "dadapt_adamw": ".exp_avg_sq, .estim_lr; .exp_avg",
    "dog": "[1].sum_sq_norm_grads",
    "dowg": "[1].weighted_sq_norm_grads",
    "galore": "[0].base_optimizer_state.nu; [0].base_optimizer_state.mu",
    "madgrad": "[1].grad_sum_sq; [1].s",
    "muon": ".inner_states['adam'].inner_state[0].nu; .inner_states['adam'].inner_state[0].mu",
    "prodigy": ".exp_avg_sq, .estim_lr; .exp_avg, .numerator_weighted",
    "schedule_free_adamw": ".base_optimizer_state[0].nu; .z",
}

NOTHING_LINEAR = (
    *("sign_sgd", "signum", "lion", "rprop", "lars", "lamb", "fromage"),
    *("lbfgs", "normalize", "mechanize", "momo_adam"),
)
VALUE = {"extra_args": {"value": 1.0}}

REFUSED = {
    **dict.fromkeys(NOTHING_LINEAR, "nor is it while its state is held .*leave that part out"),
    **{
        name: "to hold "
        + re.escape(names).replace(";\\ ", " fixed, with ")
        + (" set to zero$" if ";" in names else " fixed$")
        for name, names in HELD.items()
    },
    "adaptive_grad_clip": r"by \d+%\): smaller ones do not; leave out the clipping",
    "noisy_sgd": "moves the parameter without any gradient: leave out what adds noise",
    "dpsgd": "moves the parameter without any gradient: leave out what adds noise",
    "line search": "needs 'value', 'grad', and 'value_fn' for a line search, which is not linear",
}


def runs(make, rates, num_updates, extra_args, sharpness=2.0, start=1e-5):
    """The real optimizer on sharpness x^2 / 2: |x| after each update, gradients one update old.

    Compiled once for all the rates.
    """

    def run(rate):
        def step(carry, _):
            params, before, state = carry
            x = jax.tree.leaves(params)[0]
            updates, state = update(sharpness * before, state, params, **extra_args)
            return (optax.apply_updates(params, updates), x, state), abs(x)

        optimizer = make(rate)
        update = optax.with_extra_args_support(optimizer).update
        params = jnp.asarray(start)
        if isinstance(optimizer.init(ZERO), optax.LookaheadState):
            params = optax.LookaheadParams.init_synced(params)
        carry = params, jnp.asarray(start), optimizer.init(params)
        return jax.lax.scan(step, carry, length=num_updates)[1]

    return map(np.asarray, map(jax.jit(run), rates))


def test_every_optimizer_is_judged():
    assert OPTIMIZERS.keys() == THRESHOLDS.keys() | REFUSED.keys()


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_is_where_the_optimizer_itself_diverges(name):
    arguments = dict(THRESHOLDS[name])
    num_updates = arguments.pop("num_updates", 1000)
    extra_args = arguments.get("extra_args", {})
    rate = max_rate(OPTIMIZERS[name], 1, sharpness=2.0, **arguments)
    with jax.enable_x64(True):
        below, above = (
            distances[-50:].max()
            for distances in runs(
                OPTIMIZERS[name], (0.97 * rate, 1.03 * rate), num_updates, extra_args
            )
        )
    assert below < 1e-5 / 2
    assert not above < 1e-5 * 2


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_what_helps(name):
    arguments = VALUE if name == "momo_adam" else {}
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        max_rate(OPTIMIZERS[name], 1, **arguments)
    assert "\n" not in str(error.value)
    assert ("pass optimizer_state=" in str(error.value)) == (name in HELD)


def set_leaves(state, names, value):
    def replace(path, leaf):
        return value(leaf) if jax.tree_util.keystr(path) in names else leaf

    return jax.tree_util.tree_map_with_path(replace, state)


def warmed_up(optimizer, zero=ZERO):
    """A state after gradients of order 1 at a parameter that stays at zero."""
    state = optimizer.init(zero)
    update = jax.jit(optimizer.update)
    for k in range(12):
        _, state = update(jnp.full_like(zero, 0.3 + 0.1 * k), state, zero)
    return state


def runs_held(make, rates, state, held, num_updates):
    """As `runs`, but the values named in `held` start every update such that they end in it as they
    are in `state`: where an update multiplies a value, it starts higher.
    """

    def run(rate):
        optimizer, zero = make(rate), jnp.zeros(())
        _, after = optimizer.update(zero, state, zero)
        ratio = jax.tree.map(
            lambda a, b: a / jnp.where(b == 0, 1, b) if b.size else a, state, after
        )
        kept = {
            jax.tree_util.keystr(path): leaf * part
            for (path, leaf), part in zip(
                jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(ratio), strict=True
            )
        }

        def step(carry, _):
            x, before, state = carry
            state = jax.tree_util.tree_map_with_path(
                lambda path, leaf: (
                    kept[name] if (name := jax.tree_util.keystr(path)) in held else leaf
                ),
                state,
            )
            updates, state = optimizer.update(before, state, x)
            return (x + updates, x, state), abs(x)

        start = jnp.full_like(zero, 1e-9)
        return jax.lax.scan(step, (start, start, state), length=num_updates)[1]

    return map(np.asarray, map(jax.jit(run), rates))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["adan", "ademamix", "adopt", "dadapt_adamw", "prodigy"])
def test_the_remedy_works_and_its_threshold_is_true(name):
    held, _, momenta = HELD[name].partition("; ")
    optimizer = OPTIMIZERS[name]
    with jax.enable_x64(True):
        state = warmed_up(optimizer(0.1), jnp.zeros(()))
        with pytest.raises(ValueError, match=r"without any gradient.*momenta") as error:
            max_rate(optimizer, 1, optimizer_state=state)
        moving = str(error.value).partition("here ")[2]
        assert set(moving.split(", ")) <= set(momenta.split(", "))
        state = set_leaves(state, momenta.split(", "), jnp.zeros_like)
        rate = max_rate(optimizer, 1, optimizer_state=state)
        below, above = (
            distances[-50:].max()
            for distances in runs_held(
                optimizer, (0.97 * rate, 1.03 * rate), state, held.split(", "), 40_000
            )
        )
    assert below < 1e-9 / 2
    assert not above < 1e-9 * 2
