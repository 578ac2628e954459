"""A small run that the tests of this folder share."""

import pytest

from asgd_jax.training import default_config


@pytest.fixture
def small_config():
    """A narrow MLP on 256 digits: 16 updates an epoch of 16 samples each."""
    config = default_config()
    config.update(
        model="mlp",
        num_train=256,
        num_validation=100,
        num_workers=3,
        worker_batch_size=16,
        learning_rate=0.2,
        epochs=4,
        eval_batch_size=64,
    )
    config.model_options.hidden = (8,)
    return config
