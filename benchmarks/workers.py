"""Workers: processes that are asked to time something, one line of JSON each way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Freed memory stays with the process. With glibc's defaults, large arrays go back to the kernel at
# once, and the page faults of the next ones can cost more than the arithmetic on them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class Worker(NamedTuple):
    """A running process; `ask` sends it a request and returns its reply."""

    name: str
    process: subprocess.Popen[str]

    def send(self, **request: Any) -> None:
        """Sends a request and does not wait; `read` returns the reply."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it wrote says why

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the reply to a request.

        Raises:
          ValueError: when the process ends instead; it has the last line that this one wrote.
        """
        self.send(**request)
        return self.read()

    def read(self) -> dict[str, Any]:
        """Returns the next reply; the first one, unasked, says that the worker is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            said = self.process.stderr.read().strip().splitlines()
            reason = said[-1] if said else f"exit code {self.process.wait()}"
            raise ValueError(f"the worker {self.name} failed: {reason}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def start(
    module: str,
    *arguments: str,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Worker]:
    """Starts a worker and waits until it is ready; ends it on leaving.

    Args:
      module: of this package, which calls `serve` when it is run as a program.
      *arguments: for it.
      python: the interpreter.
      environment: variables beside this process's own.

    Raises:
      ValueError: when it ends before it is ready.
    """
    try:
        process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            cwd=checkout(),  # where `python -m benchmarks...` finds them
        )
    except OSError as error:
        raise ValueError(f"{python}: {error.strerror}") from error
    try:
        worker = Worker(module, process)
        worker.read()
        yield worker
    finally:
        # Closed first: a worker that waits for a request ends by itself.
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def serve(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Says that this worker is ready, then answers requests until standard input is closed."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def use_cores(count: int, first: int = 0) -> int:
    """Keeps this process to so many of its cores, where the system can; returns their number.

    To be called before a library has counted them for its threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        return count
    cores = sorted(os.sched_getaffinity(0))[first : first + count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def serve_epochs(run: Callable[[int], float]) -> None:
    """Serves `{"epochs": n}` with `{"seconds": s, "loss": l}`, after one epoch that isn't timed.

    Args:
      run: makes so many epochs and returns the last one's loss.
    """
    run(1)

    def answer(request: dict[str, Any]) -> dict[str, float]:
        before = time.perf_counter()
        loss = run(request["epochs"])
        return {"seconds": time.perf_counter() - before, "loss": loss}

    serve(answer)


def checkout() -> Path:
    """Returns the folder of the source checkout, which holds scripts/ and configs/.

    Raises:
      ValueError: for a package that was installed without it.
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "scripts" / "train.py").is_file():
        raise ValueError(f"no scripts/train.py in {folder}: run the benchmark in a checkout")
    return folder
