"""Programs that nobody trusts, run with limits, without network, in a file system of their own; see jail.py.

Where the kernel allows no namespaces, nothing is run unless the config says that it may (env.code.allow_unisolated).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.trainer.environments import jail

_JAIL = Path(jail.__file__)
#: Seconds for the namespaces to be made, on a machine that is busy.
_START_TIMEOUT = 60.0
#: Seconds between two looks at what the programs use.
_WATCH = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What all programs of one call may use: wall-clock seconds, memory, processes, and output and files.

    isolated: in namespaces of their own. own_user: root runs them as a user that nobody is.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    processes: int = 16
    output_kib: int = 1024
    isolated: bool = True
    own_user: bool = True


@dataclass(frozen=True)
class Program:
    """A command and what it reads."""

    argv: Sequence[str]
    stdin: str = ""


@dataclass(frozen=True)
class Finished:
    """How a program ended. code: negative for a signal, None where it was ended because of `problem`.

    problem: time, memory, processes or output, whose limit was passed; empty otherwise.
    """

    code: int | None
    stdout: str = ""
    stderr: str = ""
    problem: str = ""
    seconds: float = 0.0


class NoIsolation(Exception):
    """Why programs cannot be isolated on this machine."""


def python(*arguments: str) -> list[str]:
    """A command of this Python, with its packages, that takes nothing from the environment."""
    return [sys.executable, "-I", "-B", *arguments]


def run_programs(
    files: Mapping[str, str], programs: Sequence[Program], limits: Limits, *, stop: threading.Event | None = None
) -> list[Finished]:
    """Run programs one after another in one scratch folder, their working directory, that holds `files`.

    A limit that is passed ends all of them: the result is then shorter than `programs`, and its last says why.
    stop: ends them too (problem: stopped) when it is set, from another thread. Raises NoIsolation.
    """
    spec = {
        "parent": os.getpid(),
        "isolated": limits.isolated,
        "own_user": limits.own_user,
        "files": dict(files),
        "files_kib": sum(len(text) for text in files.values()) * 4 // 1024,
        "runs": [{"argv": list(program.argv), "stdin": program.stdin} for program in programs],
        "shown": _shown(),
        "seconds": limits.seconds,
        "memory_mib": limits.memory_mib,
        "processes": limits.processes,
        "output_kib": limits.output_kib,
        "count_processes": os.geteuid() == 0 or (limits.isolated and _kernel() >= (5, 14)),
    }
    folder = None
    if not limits.isolated:
        folder = tempfile.mkdtemp(prefix="nemotron-code-")
        Path(folder).chmod(0o777)
        spec["folder"] = folder
    home = folder or jail.SCRATCH
    spec["environ"] = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        return _run(spec, limits, stop or threading.Event())
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _run(spec: Mapping[str, Any], limits: Limits, stop: threading.Event) -> list[Finished]:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as stderr:
        given.write(json.dumps(spec).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_JAIL)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            finished = _follow(process, limits, len(spec["runs"]), stop)
        except BaseException:
            _end(process, limits)
            raise
        _end(process, limits)
        if finished is None:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip().splitlines()
            raise NoIsolation(said[-1] if said else f"exit code {process.returncode}")
        return finished


def _follow(
    process: subprocess.Popen[bytes], limits: Limits, runs: int, stop: threading.Event
) -> list[Finished] | None:
    """What the jail reports, until it is over or a limit is passed; None if it never got ready. Raises NoIsolation."""
    assert process.stdout is not None
    said, finished = b"", list[Finished]()
    begin = time.monotonic()
    deadline, ready = begin + _START_TIMEOUT, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(finished) < runs:
            now = time.monotonic()
            if stop.is_set():
                return [*finished, Finished(None, problem="stopped", seconds=now - begin)]
            problem = "time" if now >= deadline else _excess(process.pid, limits) if ready else ""
            if problem:
                return [*finished, Finished(None, problem=problem, seconds=now - begin)] if ready else None
            if not selector.select(min(_WATCH, deadline - now)):
                continue
            chunk = os.read(process.stdout.fileno(), 1 << 20)
            if not chunk:  # the jail is gone: the machine's memory may have ended
                return [*finished, Finished(None, problem="memory", seconds=now - begin)] if ready else None
            *lines, said = (said + chunk).split(b"\n")
            for line in map(json.loads, lines):
                if "impossible" in line:
                    raise NoIsolation(line["impossible"])
                if "ready" in line:
                    ready, begin = True, time.monotonic()
                    deadline = begin + limits.seconds
                    continue
                finished.append(Finished(**line))
                if line["problem"]:
                    return finished
    return finished


def _excess(pid: int, limits: Limits) -> str:
    """What the programs use too much of, all of them together. Each by itself is limited by the kernel."""
    below = jail.descendants(pid)
    if len(below) > limits.processes + 8:  # beside them those of the jail; the kernel's limit is the exact one
        return "processes"
    pages = 0
    for one in below:
        try:
            with open(f"/proc/{one}/statm") as file:
                pages += int(file.read().split()[1])
        except (OSError, IndexError):
            continue
    return "memory" if pages * _PAGE > (limits.memory_mib + 64) * 2**20 else ""


def _end(process: subprocess.Popen[bytes], limits: Limits) -> None:
    """End the jail, and all that runs in there."""
    if process.stdout is not None:
        process.stdout.close()
    below = jail.descendants(process.pid) if process.poll() is None else []
    if limits.isolated and below:
        # The namespace ends with its first process, for which the jail waits: nothing is left for anybody to wait for.
        _kill(below[0])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    process.kill()
    process.wait()
    if not limits.isolated:
        for pid in below:  # nobody else ends them
            _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _shown() -> list[str]:
    """The folders of this Python, beside the system's."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    folders = sorted({str(Path(prefix).resolve()) for prefix in prefixes} | prefixes)
    return [folder for folder in folders if folder != "/" and not folder.startswith(("/usr/", "/nix/store/"))]


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2] if part.isdigit())
