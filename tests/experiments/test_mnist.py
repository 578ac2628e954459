"""Figure 1's network on the whole of MNIST: the claim that everything else rests on."""

import importlib.util
from pathlib import Path

import pytest

from asgd_jax.training import train

ROOT = Path(__file__).parents[2]


def mnist_config(arm):
    spec = importlib.util.spec_from_file_location("mnist_cnn", ROOT / "configs" / "mnist_cnn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arm)
    config.width = 0.5  # a third of the time; results/fig01 has the whole network
    config.num_devices = 1  # the tests' eight fake devices share two cores
    return config


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.optimised
def test_eq_8_trains_and_a_larger_rate_diverges(tfds_data_dir, tmp_path):
    summary = train(mnist_config("asgd"), tmp_path / "eq8", progress=False)
    assert summary["learning_rate"] == pytest.approx(0.32 / 31)
    assert summary["final"]["validation_error"] <= 0.06
    config = mnist_config("asgd")
    config.update(learning_rate=0.1, learning_rate_rule="none", epochs=1)
    diverged = train(config, tmp_path / "too_large", progress=False)
    assert diverged["status"] == "diverged"
    assert 0 < diverged["diverged_at_step"] < 937
