"""Processes that verify: functions that need a main thread, may hang, eat memory or crash, away from the trainer.

A worker takes one call at a time. One that takes too long is killed and another takes its place; the call fails.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds in which a worker must have started and imported what it calls.
LOAD_TIMEOUT = 120.0


@dataclass(frozen=True)
class Call:
    """A call of `module:function` with arguments that can be pickled."""

    function: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a call returned, or why it returned nothing."""

    value: Any = None
    error: str = ""
    seconds: float = 0.0


class WorkerPool:
    """Up to `size` processes, no more than there are CPUs to run them, started when calls come.

    timeout: seconds for one call. memory_mib: address space of a worker; None sets no limit. Not for several threads
    at once: a call of `run` waits for the one before it.
    """

    def __init__(self, *, size: int, timeout: float, memory_mib: int | None = None) -> None:
        self._size = max(1, min(size, len(os.sched_getaffinity(0))))
        self._timeout = timeout
        self._memory_mib = memory_mib
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        _OPEN.add(self)

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """The calls' answers in their order. Raises nothing of what the calls raise."""
        with self._lock:
            return self._run(calls)

    def close(self) -> None:
        """End the workers, whatever they do."""
        _OPEN.discard(self)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _run(self, calls: Sequence[Call]) -> list[Answer]:
        answers: list[Answer] = [Answer()] * len(calls)
        waiting = deque(enumerate(calls))
        try:
            while len(self._workers) < min(self._size, len(calls)):
                self._workers.append(_Worker(self._memory_mib))
            busy: dict[Connection, _Worker] = {}
            while waiting or busy:
                for place, worker in enumerate(self._workers):
                    if waiting and worker.call is None:
                        index, call = waiting.popleft()
                        if not worker.take(index, call, self._timeout):
                            worker.kill()
                            waiting.appendleft((index, call))
                            worker = self._workers[place] = _Worker(self._memory_mib)
                            worker.take(*waiting.popleft(), self._timeout)
                        busy[worker.connection] = worker
                left = min(worker.deadline for worker in busy.values()) - time.monotonic()
                ready = set(wait(list(busy), timeout=max(left, 0.0)))
                for connection, worker in list(busy.items()):
                    answer = worker.answer(self._timeout) if connection in ready else worker.overdue()
                    if answer is not None:
                        answers[worker.index] = answer
                        worker.call = None
                        del busy[connection]
                        if not worker.alive:
                            self._workers[self._workers.index(worker)] = _Worker(self._memory_mib)
        except BaseException:  # a signal's handler may have raised: what the workers are doing is not wanted any more
            workers, self._workers = self._workers, []
            for worker in workers:
                worker.kill()
            raise
        return answers


@dataclass(eq=False)
class _Worker:
    """One process and the call it is at."""

    memory_mib: int | None
    index: int = -1
    call: Call | None = None
    deadline: float = 0.0
    alive: bool = True
    loaded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        # The kernel ends the worker with the thread that made it, so only the thread that stays may ask for that.
        bound = threading.current_thread() is threading.main_thread()
        command = [sys.executable, "-m", "nemotron_launch.trainer.environments.worker", str(theirs.fileno())]
        command += [str(os.getpid() if bound else 0), str(self.memory_mib or 0)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environ)
        self.connection = Connection(ours.detach())
        self._loading = False

    def take(self, index: int, call: Call, timeout: float) -> bool:
        """Start a call; the first of a function gets time to import it. False if the process is gone."""
        self.index, self.call = index, call
        self._loading = call.function not in self.loaded
        self.started = time.monotonic()
        self.deadline = self.started + (LOAD_TIMEOUT if self._loading else timeout)
        self.loaded.add(call.function)
        try:
            self.connection.send((call.function, call.args))
        except OSError:
            return False
        return True

    def answer(self, timeout: float) -> Answer | None:
        """What has come; None while the call goes on."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            return self._gone()
        now = time.monotonic()
        if kind == "loaded":
            self.started, self.deadline, self._loading = now, now + timeout, False
            return None
        if kind == "missing":
            self.loaded.discard(self.call.function if self.call else "")
        seconds = now - self.started
        return Answer(value, seconds=seconds) if kind == "value" else Answer(error=value, seconds=seconds)

    def overdue(self) -> Answer | None:
        """The error of a call whose time is over; its process is ended."""
        now = time.monotonic()
        if now < self.deadline:
            return None
        self.kill()
        what = "its module was not imported in" if self._loading else "the verifier took longer than"
        return Answer(error=f"{what} {self.deadline - self.started:g} s", seconds=now - self.started)

    def kill(self) -> None:
        """End the process."""
        self.alive = False
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _gone(self) -> Answer:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.poll()
        self.kill()
        end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Answer(error=f"the verifier's process ended ({end})", seconds=time.monotonic() - self.started)


_OPEN: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_OPEN):
        pool.close()
