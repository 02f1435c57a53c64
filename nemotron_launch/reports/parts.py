"""Reads a very long metrics.jsonl on this machine in several processes, each a part of it; otherwise it takes seconds.

python -m nemotron_launch.reports.parts FILE START END    writes what MetricsFile.packed gives
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nemotron_launch.reports.metrics_file import MetricsFile

LONG = 32 << 20  # bytes behind which another process pays
_MOST = 4  # processes
_PIECE = 16 << 20
_ROOT = Path(__file__).resolve().parents[2]


def read_long(metrics: MetricsFile, path: Path) -> None:
    """Bring metrics to the end of a file, if there is so much left that several processes are worth it."""
    try:
        size = path.stat().st_size
        count = min(_MOST, len(os.sched_getaffinity(0)), (size - metrics.offset) // LONG + 1)
        if count < 2:
            return
        cuts = _cuts(path, metrics.offset, size, count)
    except (OSError, AttributeError):  # AttributeError: a system that does not tell its processors
        return
    parts = [(start, end, _begin(path, start, end)) for start, end in zip(cuts[1:], cuts[2:], strict=False)]
    try:
        _feed(metrics, path, cuts[1])
        for start, end, process in parts:
            packed = process.communicate()[0]
            if metrics.offset != start or process.returncode or not metrics.join(packed):
                _feed(metrics, path, end)
    finally:
        for _, _, process in parts:
            process.kill()
            process.wait()


def _cuts(path: Path, start: int, size: int, count: int) -> list[int]:
    """Where the parts begin, and the last one ends: behind the ends of lines."""
    cuts = [start]
    with path.open("rb") as file:
        for i in range(1, count):
            file.seek(start + (size - start) * i // count)
            file.readline()
            cuts.append(min(size, file.tell()))
    return [*cuts, size]


def _begin(path: Path, start: int, end: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", __name__, str(path), str(start), str(end)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)


def _feed(metrics: MetricsFile, path: Path, end: int) -> None:
    with path.open("rb") as file:
        file.seek(metrics.offset)
        while metrics.offset < end and (piece := file.read(min(_PIECE, end - metrics.offset))):
            metrics.feed(piece)


if __name__ == "__main__":
    begin = int(sys.argv[2])
    made = MetricsFile()
    made.offset = begin
    _feed(made, Path(sys.argv[1]), int(sys.argv[3]))
    sys.stdout.buffer.write(made.packed(since=begin))
