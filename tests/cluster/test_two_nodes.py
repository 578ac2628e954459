"""Two nodes, as Ray starts them on one machine: what crosses between them, and one is lost."""

import importlib.util
import os
import threading

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'asgd-jax[ray]'", allow_module_level=True)

from watched import descendants, num_updates, wait_until

from asgd_jax.cluster import session
from asgd_jax.cluster.log import UPDATES_FILE
from asgd_jax.cluster.real_run import load_real_config
from asgd_jax.cluster.replay import replay_config
from asgd_jax.cluster.sweeps import on_cluster
from asgd_jax.cluster.train import train_async
from asgd_jax.training import train
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.sweep import sweep

pytestmark = [pytest.mark.ray, pytest.mark.long]


class Nodes:
    """A head with room for two processes, and others with room for one each."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.others = [cluster.add_node(num_cpus=1)]

    def add(self):
        self.others.append(self.cluster.add_node(num_cpus=1))

    def lose(self):
        """All of its processes are killed at once, as when a machine goes."""
        self.cluster.remove_node(self.others.pop(0), allow_graceful=False)

    def makes_runs(self):
        """Whether a part of a sweep is on the node that is lost next."""
        (raylet,) = self.others[0].all_processes["raylet"]
        return bool(descendants(raylet.process.pid, "ray::run_part"))


@pytest.fixture
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in session._RAY_SETTINGS.items():
            patch.setenv(name, os.environ.get(name, value))
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        found = Nodes(cluster)
        with session.open_ray(cluster.address, num_cpus=0):
            yield found
        cluster.shutdown()


def when(condition, action):
    """A thread that acts once a condition holds."""
    thread = threading.Thread(target=lambda: wait_until(condition) and action(), daemon=True)
    thread.start()
    return thread


def test_a_run_over_two_nodes_bears_the_loss_of_one(nodes, small_config, tmp_path):
    """Gradients and parameters cross between nodes; a third takes the lost worker."""
    small_config.update(
        num_workers=2, epochs=16, learning_rate=0.1, worker_times="constant .05",
        momentum=0.5, momentum_kind="shifted", learning_rate_rule="inverse",
    )  # fmt: skip
    nodes.add()
    losing = when(lambda: num_updates(tmp_path) >= 40, nodes.lose)
    summary = train_async(small_config, tmp_path, progress=False)
    losing.join()
    assert summary["status"] == "completed"
    assert summary["steps"] == num_updates(tmp_path) == 256
    assert min(summary["workers"]["updates"]) >= 20

    config = replay_config(load_real_config(tmp_path), tmp_path / UPDATES_FILE)
    train(config, tmp_path / "replay", progress=False)
    folders = tmp_path, tmp_path / "replay"
    real, again = ([row["train_loss"] for row in read_rows(folder)] for folder in folders)
    assert again == pytest.approx(real, rel=1e-4)


def test_the_runs_of_a_lost_node_are_repeated(nodes, small_config, tmp_path):
    small_config.update(delay=2, epochs=2)
    points = [{"learning_rate": rate} for rate in (0.05, 0.1, 0.15)]
    expected = sweep(small_config, points, progress=False)
    losing = when(nodes.makes_runs, nodes.lose)
    with on_cluster(nodes.cluster.address):
        found = sweep(small_config, points, work=tmp_path, progress=False)
    losing.join()
    assert nodes.others == []
    assert [row["learning_rate"] for row in found] == [row["learning_rate"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
