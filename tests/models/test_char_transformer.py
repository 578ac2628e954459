"""The transformer: it sees no future, and a pipeline cuts it between its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax import models
from asgd_jax.delays import by_stage, pipeline
from asgd_jax.models.stages import layer_stages


@pytest.fixture(scope="module")
def small():
    model = models.create("char_transformer", num_classes=128, width=0.25, num_blocks=2)
    text = jnp.asarray(np.random.default_rng(0).integers(0, 128, (3, 12)), jnp.int32)
    variables = jax.jit(lambda key: model.init(key, text, train=False))(jax.random.key(0))
    return jax.jit(lambda text: model.apply(variables, text, train=True)), text


def test_a_character_changes_no_logits_before_it(small):
    apply, text = small
    logits = apply(text)
    assert logits.shape == (3, 12, 128)
    assert logits.dtype == jnp.float32
    for place in (0, 5, 11):
        changed = apply(text.at[:, place].set((text[:, place] + 1) % 128))
        moved = np.any(np.asarray(changed != logits), axis=(0, 2))
        assert not moved[:place].any()
        assert moved[place:].all()


def test_the_order_of_what_was_read_counts(small):
    """Without positions, attention would see a bag of characters."""
    apply, text = small
    swapped = text.at[:, [0, 1]].set(text[:, [1, 0]])
    assert np.abs(apply(swapped)[:, -1] - apply(text)[:, -1]).max() > 1e-4


def test_images_and_heads_that_do_not_fit_are_refused():
    for shape, options, message in (
        ((1, 8, 8, 1), {}, r"takes characters of shape \(batch, length\), got \(1, 8, 8, 1\)"),
        ((1, 8), {"num_heads": 3}, "num_heads=3 does not divide 64 features"),
    ):
        model = models.create("char_transformer", num_classes=128, **options)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda key: model.init(key, jnp.zeros(shape), train=False),
                           jax.random.key(0))  # fmt: skip


def test_eight_stages_hold_a_block_each():
    stages = layer_stages(models.create("char_transformer", num_classes=128), (64,), 8)
    assert stages == {
        "embed": 0,
        "positions": 0,
        **{f"block_{k}": k for k in range(8)},
        "norm": 7,
        "Dense_0": 7,
    }


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20", "mnist_cnn_bn"])
def test_stages_follow_the_order_of_execution_in_equal_parts(name):
    """Against a count by hand: a stage never decreases, and its share is within one module."""
    shape = {"mlp": (8, 8, 1), "mnist_cnn_bn": (28, 28, 1)}.get(name, (32, 32, 3))
    options = {"hidden": (32,) * 5} if name == "mlp" else {}
    model = models.create(name, num_classes=10, width=0.5, **options)
    stages = layer_stages(model, shape, 3)
    assert list(stages.values()) == sorted(stages.values())
    params = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, *shape)), train=False), jax.random.key(0)
    )["params"]
    assert stages.keys() == params.keys()
    sizes = {k: sum(leaf.size for leaf in jax.tree.leaves(tree)) for k, tree in params.items()}
    shares = [sum(sizes[k] for k in stages if stages[k] == stage) for stage in range(3)]
    assert max(abs(share - sum(shares) / 3) for share in shares) <= max(sizes.values())
    ages = by_stage(params, lambda path: stages[path[0].key], pipeline(3))
    assert set(jax.tree.leaves(ages)) == {0, 1, 2}


def test_more_stages_than_modules_is_one_line():
    model = models.create("mlp", num_classes=10, hidden=(8,))
    with pytest.raises(
        ValueError, match="a pipeline of 4 stages is too long for the 2 modules"
    ) as caught:
        layer_stages(model, (8, 8, 1), 4)
    assert "\n" not in str(caught.value)
