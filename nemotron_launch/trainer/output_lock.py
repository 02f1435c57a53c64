"""Keeps two runs from writing into one output folder; imports no torch.

The lock is the kernel's (flock on `.lock`), so it ends with the processes that hold it, however they end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nemotron_launch.errors import UserError

FILE_NAME = ".lock"
# A killed run's processes may need a moment to end; a file server takes longer to notice that a machine is gone.
PATIENCE_HERE_S, PATIENCE_ELSEWHERE_S = 10.0, 120.0


@contextlib.contextmanager
def hold(folder: Path, *, patience: tuple[float, float] = (PATIENCE_HERE_S, PATIENCE_ELSEWHERE_S)) -> Iterator[int]:
    """Hold `folder` for this run; yields the lock's file descriptor, which the run's processes inherit.

    While any of them lives, none of another run can start to write. patience: seconds to wait for a holder on this
    machine, and on another. Raises UserError that names the holder. A file system without locks is used without.
    """
    descriptor = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, folder, patience)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{_machine()} {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, patience: tuple[float, float]) -> None:
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        machine, _, rest = os.pread(descriptor, 200, 0).decode(errors="replace").strip().partition(" ")
        process, _, since = rest.partition(" ")
        holder = f"process {process or '?'} on {machine or '?'}" + (f" since {since}" if since else "")
        if time.monotonic() - began >= patience[machine != _machine()]:
            raise UserError(
                "another run is writing here",
                where=str(folder),
                hint=f"it is {holder}\nwait for its end, or give another output_dir",
            )
        if not told:
            print(f"waiting for {folder}: {holder} still writes there", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)


def _machine() -> str:
    return socket.gethostname()
