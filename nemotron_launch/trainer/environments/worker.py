"""A process that verifies: calls functions by name, one at a time, for the WorkerPool that started it."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


def main(fd: int, parent: int, memory_mib: int) -> None:
    """Answer calls until the connection ends. parent: the process to end with; 0 for none."""
    # The trainer finishes its step when it is asked to stop, and needs the scores for that.
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signo, signal.SIG_IGN)
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    connection = Connection(fd)
    functions: dict[str, Any] = {}
    while True:
        try:
            name, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if name not in functions:
                functions[name] = load_function(name)
                connection.send(("loaded", None))
        except BaseException as error:  # what a module does when it is imported is the user's
            connection.send(("missing", said(error)))
            continue
        try:
            reply: tuple[str, Any] = ("value", functions[name](*args))
        except BaseException as error:  # math-verify's time-outs and a user's sys.exit are no Exceptions
            reply = ("error", said(error))
        try:
            connection.send(reply)
        except OSError:
            return
        except Exception as error:  # the value cannot be pickled
            connection.send(("error", said(error)))


def load_function(name: str) -> Callable[..., Any]:
    """The function `module:function`. Raises ImportError, AttributeError, TypeError, or what its module raises."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{module}.{function} is no function")
    return found


def said(error: BaseException) -> str:
    """An exception in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
