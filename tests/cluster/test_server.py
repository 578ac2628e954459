"""The server as a plain class: what it does with gradients, good and bad. No cluster."""

import asyncio

import jax
import numpy as np
import pytest

from asgd_jax.cluster.programs import Pushed, pull_state
from asgd_jax.cluster.real_run import open_real_run, real_config
from asgd_jax.cluster.server import Server
from asgd_jax.training.chunk import NOT_DIVERGED


@pytest.fixture
def serve(small_config):
    """`serve(**changes)`: a server, and a gradient of ones that it takes."""

    def make(saved=None, **changes):
        small_config.update(changes)
        config = real_config(small_config)
        run = open_real_run(config)
        params = jax.device_get(run.programs.init().params)
        ones = Pushed(jax.tree.map(np.ones_like, params), {}, 2.0, 0.5, 3.0)
        return Server(config, run.feed.samples, saved), ones

    return make


def ask(coroutine):
    return asyncio.run(coroutine)


def test_a_gradient_becomes_an_update_and_the_next_task(serve):
    server, ones = serve(momentum=0.0, learning_rate=0.25)

    async def work():
        first = await server.pull(0, 0)
        other = await server.pull(1, 0)
        assert (first.version, first.number, other.version, other.number) == (0, 0, 0, 1)
        second = await server.push(0, 0, 0, ones, 0.1)
        third = await server.push(1, 0, 1, ones, 0.1)
        return first, second, third, await server.report(0.0)

    first, second, third, report = ask(work())
    assert (second.version, second.number, third.version, third.number) == (1, 2, 2, 3)
    for before, after in zip(
        jax.tree.leaves(first.params), jax.tree.leaves(third.params), strict=True
    ):
        np.testing.assert_allclose(after, before - 2 * 0.25, rtol=1e-6)
    found = [
        (row.update, row.worker, row.version, row.staleness, row.batch) for row in report.updates
    ]
    assert found == [(0, 0, 0, 0, 0), (1, 1, 0, 1, 1)]
    assert not report.finished
    assert not report.complaints


def broken(ones, change):
    leaves, structure = jax.tree.flatten(ones.gradients)
    leaves[1] = change(leaves[1])
    return ones._replace(gradients=jax.tree.unflatten(structure, leaves))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda leaf: np.full_like(leaf, np.nan), "is not finite"),
        (lambda leaf: np.full_like(leaf, -np.inf), "is not finite"),
        (lambda leaf: leaf[..., :-1], "has shape"),
    ],
)
def test_a_bad_gradient_is_refused_and_its_worker_named(change, reason, serve):
    server, ones = serve()

    async def work():
        task = await server.pull(2, 0)
        before = task.params
        task = await server.push(2, 0, task.number, broken(ones, change), 0.1)
        return before, task, await server.report(0.0)

    before, task, report = ask(work())
    assert (task.version, task.number) == (0, 0)  # the same batch again, at the same parameters
    assert not report.updates
    (complaint,) = report.complaints
    assert complaint.startswith("refused a gradient of worker 2: ")
    assert reason in complaint
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(task.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_when_nobody_has_a_usable_gradient_the_run_has_diverged(serve):
    server, ones = serve()
    bad = broken(ones, lambda leaf: np.full_like(leaf, np.nan))

    async def work():
        await server.push(0, 0, (await server.pull(0, 0)).number, ones, 0.1)
        tasks = {worker: await server.pull(worker, 0) for worker in range(3)}
        for _ in range(20):
            for worker, task in tasks.items():
                if task is not None:
                    tasks[worker] = await server.push(worker, 0, task.number, bad, 0.1)
        return tasks, await server.report(0.0)

    tasks, report = ask(work())
    assert tasks == {0: None, 1: None, 2: None}
    assert report.finished
    (snapshot,) = report.snapshots
    assert snapshot.totals.diverged_at == snapshot.step == 1
    assert [line for line in report.complaints if "sent home" in line] == [
        f"worker {worker} is sent home: 10 gradients were refused" for worker in range(3)
    ]


def test_one_bad_worker_is_sent_home_and_the_others_go_on(serve):
    server, ones = serve()
    bad = broken(ones, lambda leaf: np.full_like(leaf, np.nan))

    async def work():
        good, task = await server.pull(0, 0), await server.pull(1, 0)
        while task is not None:
            task = await server.push(1, 0, task.number, bad, 0.1)
        for _ in range(3):
            good = await server.push(0, 0, good.number, ones, 0.1)
        return good, await server.report(0.0)

    good, report = ask(work())
    assert good.version == 3
    assert {row.worker for row in report.updates} == {0}
    assert not report.finished


def test_a_loss_too_large_ends_the_run_as_in_the_simulator(serve):
    server, ones = serve(divergence_loss=10.0)

    async def work():
        task = await server.pull(0, 0)
        task = await server.push(0, 0, task.number, ones._replace(loss=11.0), 0.1)
        return task, await server.report(0.0)

    task, report = ask(work())
    assert task is None
    assert report.finished
    assert report.snapshots[0].totals.diverged_at == 0
    assert report.snapshots[0].step == 1


def test_what_is_too_stale_is_dropped_and_counted(serve):
    server, ones = serve(max_staleness=1)

    async def work():
        tasks = {worker: await server.pull(worker, 0) for worker in range(3)}
        for worker in (0, 1, 2):
            tasks[worker] = await server.push(worker, 0, tasks[worker].number, ones, 0.25)
        await server.stop()
        return tasks, await server.report(0.0)

    tasks, report = ask(work())
    assert [row.worker for row in report.updates] == [0, 1]
    assert (tasks[2].version, tasks[2].number) == (2, 2)  # its batch again, at the newest version
    wasted = report.snapshots[-1].saved.wasted
    assert (wasted.dropped, wasted.dropped_seconds) == (1, 0.25)


def test_a_fast_worker_waits_for_the_one_that_would_be_too_late(serve):
    server, ones = serve(max_staleness=2, staleness_policy="wait")

    async def work():
        tasks = {worker: await server.pull(worker, 0) for worker in range(3)}
        for _ in range(2):  # fine: version 2, and the others' gradients are of version 0
            held = asyncio.create_task(server.push(0, 0, tasks[0].number, ones, 0.1))
            await asyncio.sleep(0.01)
            if not held.done():
                break
            tasks[0] = held.result()
        assert not held.done()
        for worker in (1, 2):
            tasks[worker] = await server.push(worker, 0, tasks[worker].number, ones, 0.1)
        tasks[0] = await held
        await server.stop()
        return await server.report(0.0)

    report = ask(work())
    assert [row.worker for row in report.updates][:3] == [0, 1, 2]
    assert max(row.staleness for row in report.updates) <= 2
    assert report.snapshots[-1].saved.wasted.waited_seconds > 0


def test_a_dead_workers_gradient_is_lost_and_its_batch_is_not(serve):
    server, ones = serve()

    async def work():
        first = await server.pull(0, 0)
        await server.lost(0)
        late = await server.push(0, 0, first.number, ones, 0.1)  # sent before it died
        again = await server.pull(0, 1)
        older = await server.push(0, 0, again.number, ones, 0.1)  # of its former life
        await server.push(0, 1, again.number, ones, 0.1)
        await server.stop()
        return first, late, again, older, await server.report(0.0)

    first, late, again, older, report = ask(work())
    assert late is None
    assert older is None
    assert again.number == first.number == 0
    assert [(row.worker, row.batch) for row in report.updates] == [(0, 0)]
    assert report.snapshots[-1].saved.wasted.lost == 1


def test_a_server_goes_on_from_what_another_saved(serve):
    """Bit by bit the same as one that was never stopped, given the same pushes."""
    changes = {"momentum": 0.9, "momentum_kind": "shifted", "learning_rate": 0.05}

    async def push(server, ones, count, tasks):
        rng = np.random.default_rng(count)
        for _ in range(count):
            worker = int(rng.integers(3))
            task = tasks.get(worker) or await server.pull(worker, 0)
            tasks[worker] = await server.push(worker, 0, task.number, ones, 0.1)

    async def stopped():
        server, ones = serve(**changes)
        await push(server, ones, 7, {})
        await server.stop()
        (snapshot,) = (await server.report(0.0)).snapshots
        assert not snapshot.is_row
        second, _ = serve(saved=snapshot.saved)
        await push(second, ones, 5, {})
        await second.stop()
        return (await second.report(0.0)).snapshots[-1]

    async def whole():
        server, ones = serve(**changes)
        await push(server, ones, 7, {})
        for worker in range(3):  # all start anew, as after a restart
            await server.lost(worker)
        await push(server, ones, 5, {})
        await server.stop()
        return (await server.report(0.0)).snapshots[-1]

    left, right = ask(stopped()), ask(whole())
    assert left.step == right.step == 12
    assert left.totals.steps == right.totals.steps == 12
    assert left.totals.diverged_at == NOT_DIVERGED
    np.testing.assert_array_equal(left.totals.staleness, right.totals.staleness)
    for one, other in zip(
        jax.tree.leaves(left.saved.state), jax.tree.leaves(right.saved.state), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert left.saved.numbers == right.saved.numbers


def test_what_is_pulled_is_not_copied(serve):
    server, _ = serve(momentum=0.5, momentum_kind="shifted")
    pulled = pull_state(server._state, 0)
    assert pulled.params is server._state.params
    assert len(pulled.buffers) == 1
