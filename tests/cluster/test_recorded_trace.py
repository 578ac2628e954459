"""updates.csv as a trace: read, refused, replayed by `train`."""

import json

import jax
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.cluster.log import UPDATES_FILE, open_updates
from asgd_jax.data.numbered import make_batch_of, shard_batches
from asgd_jax.training import set_up, train
from asgd_jax.training.recorded import read_updates
from asgd_jax.training.sweep import sweep

HEADER = "update,worker,version,staleness,batch,seconds,compute_seconds\n"


def write(folder, rows):
    log = open_updates(folder, 0)
    log.write(rows)
    log.close()
    return folder / UPDATES_FILE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read|holds no update"),
        ("update,worker\n0,0\n", "no column"),
        (HEADER, "holds no update"),
        (HEADER + "0,0,0,0,0,x,0\n", "cannot be read"),
        (HEADER + "0,0,0,0,0,0,0\n2,0,1,1,1,0,0\n", "row 1 is update 2"),
        (HEADER + "0,0,0,0,0,0,0\n1,0,0,0,1,0,0\n", "row 1 is update 1 of version 0, staleness 0"),
        (HEADER + "0,0,1,-1,0,0,0\n", "row 0 is update 0 of version 1"),
    ],
)
def test_what_is_no_record_is_refused(content, message, tmp_path):
    file = tmp_path / "updates.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_updates(file)
    assert str(file) in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_updates(tmp_path / "none.csv")


def test_a_log_is_cut_to_the_checkpoint_and_a_torn_row_is_no_row(tmp_path):
    rows = [(k, 0, k, 0, k, 0.5, 0.25) for k in range(5)]
    file = write(tmp_path, rows)
    with file.open("a") as lines:
        lines.write("5,0,5")  # killed while writing
    open_updates(tmp_path, 3).close()
    assert read_updates(file).update.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="has 3 updates and its checkpoint was written after 4"):
        open_updates(tmp_path, 4)
    open_updates(tmp_path, 0).close()
    assert file.read_text() == HEADER


def test_numbered_batches_of_the_whole_set_are_those_of_the_epochs():
    plan = data.plan_batches(50, num_workers=3, worker_batch_size=4, delay=2)
    batch_of = make_batch_of(5, plan)
    for number in (0, 11, 12, 40):
        epoch, row = divmod(number, plan.steps_per_epoch)
        np.testing.assert_array_equal(batch_of(number), data.epoch_batches(5, epoch, plan)[row])


def test_shards_are_apart_and_their_epochs_whole():
    plan = data.plan_batches(53, num_workers=4, worker_batch_size=3, delay=3)
    seen = [set(np.asarray(shard_batches(1, shard, 2, plan, 4)).ravel().tolist())
            for shard in range(4)]  # fmt: skip
    assert [len(each) for each in seen] == [12] * 4  # of 13 samples 4 batches of 3
    assert len(set.union(*seen)) == 48
    first, second = (np.asarray(shard_batches(1, 2, epoch, plan, 4)) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="each of 20 shards has 2 samples and a batch takes 3"):
        make_batch_of(1, plan, 20)


@pytest.mark.parametrize("parallelism", ["jit", "workers"])
def test_train_takes_the_batches_of_a_record(parallelism, small_config, tmp_path):
    """Fresh gradients on batches in another order, against plain steps on those batches."""
    numbers = np.random.default_rng(3).permutation(64)
    trace = write(tmp_path, [(k, 0, k, 0, number, 0.0, 0.0) for k, number in enumerate(numbers)])
    small_config.update(
        delay=2, delay_distribution="trace", delay_trace=str(trace), num_devices=1,
        parallelism=parallelism, learning_rate=0.05,
    )  # fmt: skip
    summary = train(small_config, tmp_path / "run", progress=False)
    assert summary["staleness"]["max"] == 0
    small_config.update(delay_distribution="constant", delay_trace=None, parallelism="jit")
    setup = set_up(small_config)
    samples, plan = setup.feed.samples, setup.feed.facts.plan
    batch_of = make_batch_of(small_config.seed, plan)
    params = setup.state.params

    @jax.jit
    def step(params, images, labels):
        def loss(params):
            inputs = setup.feed.facts.normalize(images)
            logits = setup.run.model.apply({"params": params}, inputs, train=True)
            chosen = jax.nn.log_softmax(logits)[np.arange(16), labels]
            return -chosen.mean()

        return jax.tree.map(lambda x, g: x - 0.05 * g, params, jax.grad(loss)(params))

    for number in numbers:
        rows = batch_of(number).ravel()
        params = step(params, samples.train_images[rows], samples.train_labels[rows])
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(params)))
    assert summary["final"]["parameter_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_sweep_and_a_stream_refuse_batches_that_are_not_theirs(small_config, tmp_path):
    trace = write(tmp_path, [(0, 0, 0, 0, 0, 0.0, 0.0)])
    small_config.update(delay_distribution="trace", delay_trace=str(trace), delay=2)
    with pytest.raises(ValueError, match="has batches of its own, which a sweep does not replay"):
        sweep(small_config, [{"seed": 0}], progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_staleness": 3}, "max_staleness=3 is for real workers"),
        ({"worker_times": "constant 1"}, "worker_times='constant 1' is for real workers"),
        ({"worker_data": "shard"}, "worker_data='shard' is for real workers"),
        ({"delay_distribution": "measured"}, "delay_distribution='measured' is that of real"),
    ],
)
def test_the_simulator_refuses_what_only_real_workers_do(changes, message, small_config, tmp_path):
    small_config.update(changes)
    with pytest.raises(ValueError, match=message):
        train(small_config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=message):
        sweep(small_config, [{"seed": 0}], progress=False)
    assert not (tmp_path / "run").exists()


def test_a_configuration_of_real_workers_is_json(small_config):
    from asgd_jax.cluster.real_run import real_config

    config = real_config(small_config, 5)
    assert (config.num_workers, config.delay, config.delay_distribution) == (5, 4, "measured")
    assert json.loads(json.dumps(config.to_dict()))["delay"] == 4
    for changes, message in (
        ({"parallelism": "workers"}, "parallelism='workers' is for simulated workers"),
        ({"history_dtype": "bfloat16"}, "history_dtype='bfloat16' is for simulated workers"),
        ({"dataset": "imagenet2012", "num_train": None, "num_validation": None}, "is streamed"),
        ({"worker_times": "never"}, "worker_times='never': use"),
    ):
        changed = small_config.copy_and_resolve_references()
        changed.update(changes)
        with pytest.raises(ValueError, match=message):
            real_config(changed)
