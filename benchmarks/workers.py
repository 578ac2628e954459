"""Workers: processes that are asked to time something, one line of JSON each way."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Freed memory stays with the process. With glibc's defaults, large arrays go back to the kernel at
# once, and the page faults of the next ones can cost more than the arithmetic on them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class WorkerFailed(Exception):
    """A worker could not start, or died; the message is the last line that it wrote."""


class Worker(NamedTuple):
    """A running process; `ask` sends it a request and returns its reply."""

    process: subprocess.Popen[str]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the reply to a request.

        Raises:
          WorkerFailed: when the process ends instead.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it wrote says why
        return self.read()

    def read(self) -> dict[str, Any]:
        """Returns the next reply; the first one, unasked, says that the worker is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            said = self.process.stderr.read().strip().splitlines()
            raise WorkerFailed(said[-1] if said else f"exit code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Starts a worker and waits until it is ready; ends it on leaving.

    Args:
      command: program and arguments.
      environment: variables beside this process's own.

    Raises:
      WorkerFailed: when it ends before it is ready.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            cwd=checkout(),  # where `python -m benchmarks...` finds them
        )
    except OSError as error:
        raise WorkerFailed(f"{command[0]}: {error.strerror}") from error
    try:
        worker = Worker(process)
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


def checkout() -> Path:
    """Returns the folder of the source checkout, which holds scripts/ and configs/.

    Raises:
      ValueError: for a package that was installed without it.
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "scripts" / "train.py").is_file():
        raise ValueError(f"no scripts/train.py in {folder}: run the benchmark in a checkout")
    return folder
