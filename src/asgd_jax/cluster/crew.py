"""The processes of a run: the server and its workers, hired, replaced when they die, dismissed."""

import sys
from collections.abc import Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from asgd_jax.cluster.exchange import ServerActor
from asgd_jax.cluster.server import Saved
from asgd_jax.cluster.session import worker_environment
from asgd_jax.cluster.worker import RealWorker

_MOST_EARLY_DEATHS = 3  # of one worker, before it has made an update


class ServerLost(Exception):
    """The server's process has ended; the run goes on from its last checkpoint."""


class Hired(NamedTuple):
    """A worker: its actor, which life of it this is, and how many lives made no update."""

    actor: Any
    life: int
    early_deaths: int


class Crew:
    """Workers by number, and what each is running; state of the driver, not of the run.

    Args:
      ray: the module.
      config: of the run.
      dataset: a reference to its data in the object store.
      gpus: that each worker has to itself, as Ray counts them.
      constant: see `RealWorker`.
    """

    def __init__(
        self, ray: Any, config: ConfigDict, dataset: Any, gpus: float = 0.0, constant: bool = False
    ):
        self._ray, self._config, self._dataset = ray, config, dataset
        self._gpus, self._constant = gpus, constant
        self._workers = {each: self._hire(each, 0, 0) for each in range(config.num_workers)}
        self._running: dict[Any, int] = {}
        self.deaths = 0

    def _hire(self, worker: int, life: int, early_deaths: int) -> Hired:
        environment = worker_environment(accelerator=self._gpus > 0)
        # A second thread: the server's node asks for a channel while the worker runs.
        kind = self._ray.remote(RealWorker).options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_concurrency=2,
            runtime_env={"env_vars": environment},
        )
        actor = kind.remote(worker, life, self._config, self._dataset, self._constant)
        return Hired(actor, life, early_deaths)

    def hire_server(self, saved: Saved | None) -> Any:
        """Returns a new server, once it and the workers have compiled their programs.

        Raises:
          ValueError: where the cluster has no room for all of them.
          ServerLost: where the server died at once.
        """
        kind = self._ray.remote(ServerActor).options(
            num_cpus=1, runtime_env={"env_vars": worker_environment()}
        )
        server = kind.remote(self._config, self._dataset, saved)
        ready = [server.ready.remote()]
        ready += [hired.actor.ready.remote() for hired in self._workers.values()]
        seconds = self._config.coordinator_timeout
        _, missing = self._ray.wait(ready, num_returns=len(ready), timeout=seconds)
        if missing:
            cpus = self._ray.cluster_resources().get("CPU", 0)
            raise ValueError(
                f"{len(missing)} of {len(ready)} processes were not ready after {seconds} s: the "
                f"cluster has {cpus:g} CPUs, and num_workers={self._config.num_workers} needs "
                f"{len(ready)}"
            )
        try:
            self._ray.get(ready[0])
        except self._ray.exceptions.RayActorError as error:
            raise ServerLost(str(error)) from error
        return server

    def start(self, server: Any) -> None:
        """Sets all workers to work for a server."""
        self._running = {
            hired.actor.run.remote(server): worker for worker, hired in self._workers.items()
        }

    def references(self) -> list[Any]:
        """What `ray.wait` is to wait for."""
        return list(self._running)

    def settle(self, reference: Any, server: Any, productive: Collection[int]) -> None:
        """Sees why a worker stopped; one that died is replaced.

        Args:
          reference: of `references`, done.
          server: that the worker worked for.
          productive: workers that have made an update since they were hired.

        Raises:
          ServerLost: when the worker found no server.
          OSError: when a worker dies again and again.
        """
        worker = self._running.pop(reference)
        try:
            if self._ray.get(reference) == "server lost":
                raise ServerLost
        except self._ray.exceptions.RayActorError as error:
            self._replace(worker, server, worker in productive, error)

    def _replace(self, worker: int, server: Any, productive: bool, error: Exception) -> None:
        hired = self._workers[worker]
        early = 0 if productive else hired.early_deaths + 1
        reason = next((line for line in str(error).splitlines() if line.strip()), "it ended")
        if early >= _MOST_EARLY_DEATHS:
            raise OSError(
                f"worker {worker} died {early} times before its first update: {reason}"
            ) from error
        self._count_death(worker)
        server.lost.remote(worker)
        replaced = self._hire(worker, hired.life + 1, early)
        self._workers[worker] = replaced
        self._running[replaced.actor.run.remote(server)] = worker

    def _count_death(self, worker: int) -> None:
        self.deaths += 1
        print(f"worker {worker} died and is restarted", file=sys.stderr)

    def gather(self) -> None:
        """Waits until no worker works for a server that is gone; replaces those that died too."""
        seconds = self._config.coordinator_timeout
        done, stuck = (
            self._ray.wait(self.references(), num_returns=len(self._running), timeout=seconds)
            if self._running
            else ([], [])
        )
        for reference in done:
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayActorError:
                stuck.append(reference)
        for reference in stuck:
            worker = self._running[reference]
            hired = self._workers[worker]
            self._ray.kill(hired.actor)
            self._count_death(worker)
            self._workers[worker] = self._hire(worker, hired.life + 1, hired.early_deaths)
        self._running = {}

    def dismiss(self, server: Any = None) -> None:
        """Ends all processes."""
        actors = [hired.actor for hired in self._workers.values()]
        for actor in [*actors, *([] if server is None else [server])]:
            self._ray.kill(actor)
