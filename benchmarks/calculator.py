"""The calculator: thresholds a second; the price of a Hessian-vector product and of sharpness."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from asgd_jax import data, models, stability
from asgd_jax.curvature import hessian_vector_product, make_sharpness
from asgd_jax.training.step import cross_entropy
from benchmarks.harness import interleave, ratio, spread
from benchmarks.result import BenchOptions, Goal, Result, Table, TableRow, goal
from experiments.claims import at_most

TITLE = "stability thresholds a second, and Hessian-vector products in gradients"

_THRESHOLDS: dict[str, Callable[[int], float]] = {
    "no momentum": stability.max_learning_rate,
    "heavy ball .9": lambda delay: stability.max_learning_rate(delay, momentum=0.9),
    "shifted .9": lambda delay: stability.max_learning_rate(delay, momentum=0.9, kind="shifted"),
}
_ALLOWED_GRADIENTS = 4.0


def run(options: BenchOptions) -> Result:
    """Measures both; see the module."""
    digits = data.load("digits", num_train=64 if options.quick else None)
    arrays = (data.normalizer(digits)(digits.train_images), jnp.asarray(digits.train_labels))
    cases: dict[str, tuple[str, dict[str, Any], Any]] = {
        "MLP 64-64-10, all digits": ("mlp", {}, arrays)
    }
    if not options.quick:
        key = jax.random.key(0)
        images = jax.random.normal(key, (512, 28, 28, 1))
        labels = jax.random.randint(key, (512,), 0, 10)
        wide = {"hidden": (1024, 1024)}
        cases["MLP 784-1024-1024-10, 512 images"] = ("mlp", wide, (images, labels))
        cases["LeNet, 512 images"] = ("mnist_cnn", {}, (images, labels))
    rows, goals = list[TableRow](), list[Goal]()
    for name, (model, model_options, batch) in cases.items():
        row, one = measure_curvature(name, model, model_options, batch, quick=options.quick)
        rows.append(row)
        goals.append(one)
    notes = [
        "A product and a sharpness are those of asgd_jax.curvature as a user calls them, with the "
        "checksum of the batch and, in a sharpness, ARPACK's own work on the host. The gradient is "
        "`jax.jit(jax.grad(loss))` on the same batch.",
    ]
    tables = [
        Table("thresholds of delays 1, 2, ..., one call each", measure_thresholds(options)),
        Table("curvature, medians of interleaved repetitions", rows),
    ]
    return Result(tables, goals, notes)


def measure_thresholds(options: BenchOptions) -> list[TableRow]:
    """Returns the thresholds a second of each kind of momentum."""
    count, rounds = (10, 1) if options.quick else (1000, 7)

    def all_of(threshold: Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            for delay in range(1, count + 1):
                threshold(delay)

        return call

    variants = {name: all_of(threshold) for name, threshold in _THRESHOLDS.items()}
    times = interleave(variants, rounds)
    return [
        {
            "momentum": name,
            "thresholds": count,
            "thresholds/s": count / spread(each).median,
            "us a threshold": 1e6 * spread(each).median / count,
        }
        for name, each in times.items()
    ]


def measure_curvature(
    name: str, model_name: str, model_options: dict[str, Any], batch: Any, *, quick: bool
) -> tuple[TableRow, Goal]:
    """Times a gradient, a Hessian-vector product and a sharpness in turns."""
    model = models.create(model_name, num_classes=10, **model_options)
    params = model.init(jax.random.key(0), batch[0][:1], train=False)["params"]
    vector = jax.tree.map(jnp.ones_like, params)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch[0], train=True)
        return cross_entropy(logits, batch[1]).mean()

    gradient = jax.jit(jax.grad(loss))
    product = hessian_vector_product(loss)
    measure = make_sharpness(loss)
    num_products = 0

    def sharpness() -> Any:
        nonlocal num_products
        result = measure(params, [batch])
        num_products = result.num_matvecs
        return result.vector

    variants = {
        "gradient": lambda: gradient(params, batch),
        "product": lambda: product(params, vector, [batch]),
        "sharpness": sharpness,
    }
    times = interleave(variants, 1 if quick else 9, budget=8.0)
    price, total = ratio(times, "product", "gradient"), ratio(times, "sharpness", "gradient")
    row: TableRow = {
        "case": name,
        "products/s": 1 / spread(times["product"]).median,
        "product (gradients)": price.median,
        "low quartile": price.low,
        "high quartile": price.high,
        "sharpness (gradients)": total.median,
        "sharpness (products)": num_products,
        "gradient (ms)": 1e3 * spread(times["gradient"]).median,
    }
    claim = at_most(
        f"{name}: Hessian-vector product, in gradients", price.median, _ALLOWED_GRADIENTS
    )
    reason = f"quartiles {price.low:.2f} to {price.high:.2f}; a gradient takes "
    return row, goal(claim, f"{reason}{row['gradient (ms)']:.2f} ms")
