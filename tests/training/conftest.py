"""Small runs that every test of this folder may share."""

import pytest

from asgd_jax.training import default_config


@pytest.fixture
def tiny_config():
    """A run of about a second: a narrow MLP on 256 digits, 4 workers of 16 samples."""
    config = default_config()
    config.update(
        model="mlp",
        num_train=256,
        num_validation=100,
        num_workers=4,
        worker_batch_size=16,
        learning_rate=0.2,
        epochs=2,
        eval_batch_size=64,
        num_devices=1,
    )
    config.model_options.hidden = (8,)
    return config
