"""What tests watch from outside: processes of this machine, and the record of a run."""

import time
from pathlib import Path

from asgd_jax.cluster.log import UPDATES_FILE


def processes():
    """(pid, parent, command line) of all processes."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield int(entry.name), parent, (entry / "cmdline").read_text().replace("\0", " ")
        except (ValueError, OSError):
            continue


def descendants(ancestor, text):
    """The processes below `ancestor` whose command line holds a text."""
    table = list(processes())
    below, found = {ancestor}, set()
    while below - found:
        found |= below
        below |= {pid for pid, parent, _ in table if parent in below}
    return sorted(pid for pid, _, line in table if pid in below - {ancestor} and text in line)


def wait_until(condition, seconds=240.0):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def num_updates(workdir):
    file = workdir / UPDATES_FILE
    return file.read_bytes().count(b"\n") - 1 if file.exists() else 0
