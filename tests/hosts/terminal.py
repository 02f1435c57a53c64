"""A Python program in a terminal of its own, with somebody who types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT = 40.0  # seconds


def in_terminal(
    code: str, dialogue: Sequence[tuple[str, str]], *, env: Mapping[str, str], size: tuple[int, int] = (24, 80)
) -> tuple[int, str]:
    """Run a program; once it has shown the first of a pair, type the second. Its exit code, and all that it showed.

    size: lines and columns of the terminal.
    """
    pid, fd = pty.fork()
    if not pid:  # pragma: no cover
        with contextlib.suppress(BaseException):
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", **env}
            os.execve(sys.executable, [sys.executable, "-c", code], environ)
        os._exit(99)
    shown, seen, left = "", 0, list(dialogue)
    end = time.monotonic() + WAIT
    try:
        while time.monotonic() < end:
            if not select.select([fd], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(fd, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data.decode(errors="replace")
            while left and (place := shown.find(left[0][0], seen)) >= 0:
                seen = place + len(left[0][0])
                os.write(fd, left.pop(0)[1].encode())
        else:
            raise AssertionError(f"it did not end; it has shown: {shown!r}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            if time.monotonic() >= end:
                os.kill(pid, signal.SIGKILL)
        os.close(fd)
        _, status = os.waitpid(pid, 0)
    assert not left, f"it never showed {left[0][0]!r}: {shown!r}"
    return os.waitstatus_to_exitcode(status), shown
