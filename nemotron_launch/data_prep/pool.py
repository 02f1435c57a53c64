"""Processes that do units and shards. They begin small, share their libraries' memory, and die with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from nemotron_launch.data_prep import shards, sources
from nemotron_launch.data_prep.shards import Shard, Written
from nemotron_launch.data_prep.sources import Unit
from nemotron_launch.data_prep.units import Done, Task, Worker
from nemotron_launch.errors import UserError

T = TypeVar("T")
_M_MMAP_THRESHOLD = -3
_PRELOADED = ("nemotron_launch.data_prep.pool",)
_worker: Worker | None = None


class Pool:
    """Does units and shards in `workers` processes; with one, here. Use it as a context manager."""

    def __init__(self, workers: int, task: Task, datasets: Mapping[str, Sequence[str]]) -> None:
        self._executor: ProcessPoolExecutor | None = None
        if workers == 1:
            _begin(task, datasets, own=False)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self._executor = ProcessPoolExecutor(workers, context, _begin, (task, datasets))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        global _worker
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        _worker = None

    def units(self, units: Sequence[Unit]) -> Iterator[Done]:
        """Do units, in any order."""
        for _, done in self._each(_do, [(unit,) for unit in units]):
            yield done

    def hashes(self, paths: Sequence[str]) -> Iterator[tuple[int, str]]:
        """sha256 of files, each with its place in the list."""
        return self._each(sources.sha256_of, [(path,) for path in paths])

    def shards(self, planned: Sequence[Shard], parts: Sequence[str], folder: Path) -> Iterator[tuple[int, Written]]:
        """Write shards, each with its place in the list."""
        return self._each(shards.write, [(shard, parts, folder) for shard in planned])

    def _each(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
        if self._executor is None:
            for i, arguments in enumerate(calls):
                yield i, function(*arguments)
            return
        open_calls: dict[Future[T], int] = {}
        try:
            for i, arguments in enumerate(calls):
                open_calls[self._executor.submit(function, *arguments)] = i
            while open_calls:
                for future in wait(open_calls, return_when=FIRST_COMPLETED).done:
                    yield open_calls.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed; too little memory is the usual reason",
                where="num_workers",
                hint="set num_workers lower and start again: finished parts are kept",
                exit_code=1,
            ) from error
        finally:
            for future in open_calls:
                future.cancel()


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """The call in a process of its own, whose memory is free again afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _die_with_parent) as executor:
        return executor.submit(function, *arguments).result()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _begin(task: Task, datasets: Mapping[str, Sequence[str]], own: bool = True) -> None:
    global _worker
    if own:
        _die_with_parent()
    give_memory_back()
    _worker = Worker(task, datasets)


def _die_with_parent() -> None:
    # A terminal's Ctrl-C is the parent's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A worker's own parent is a server that outlives the process that it works for; only a pipe tells of that."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def give_memory_back() -> None:
    """Have large blocks returned to the system when they are freed: glibc otherwise comes to keep them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def _do(unit: Unit) -> Done:
    assert _worker is not None
    return _worker.do(unit)
