"""TensorBoard event files, written in the calling thread: what was written is in the file.

tensorboardX's SummaryWriter hands events to a thread. When the disk is full that thread dies, and
the run waits for it forever.
"""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

WriteEvent = Callable[[int, Mapping[str, float], np.ndarray], None]


def open_events(workdir: Path, step: int) -> tuple[WriteEvent, Callable[[], None]]:
    """Opens an event file of a run that has made `step` updates.

    TensorBoard shows nothing of earlier files of the folder beyond that step.

    Returns:
      `write(step, scalars, staleness_histogram)` and `close()`.
    """
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import histogram_raw, scalar

    # The step keeps two files apart that are opened within a second.
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
    records = RecordWriter(str(workdir / name))

    def put(**fields: object) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    put(file_version="brain.Event:2")
    put(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(step: int, scalars: Mapping[str, float], histogram: np.ndarray) -> None:
        counts = np.asarray(histogram)
        ages = np.arange(counts.size)
        staleness = histogram_raw(
            "staleness",
            min=0.0,
            max=float(counts.size - 1),
            num=int(counts.sum()),
            sum=float(counts @ ages),
            sum_squares=float(counts @ ages**2),
            bucket_limits=[age + 0.5 for age in ages.tolist()],
            bucket_counts=counts.tolist(),
        )
        parts = [*(scalar(name, value) for name, value in scalars.items()), staleness]
        put(step=step, summary=Summary(value=[part.value[0] for part in parts]))
        records.flush()

    return write, records.close
