"""Runs a job of this machine in the background: outlives its client, keeps logs, resumes, and ends when asked to.

Started by local_client as `python -m nemotron_launch.backends.local_supervisor FOLDER`; what to do is in the folder's
supervise.json. TERM (the machine goes down) and the file `cancel` make the trainer save and stop; `now` in that file,
or patience running out, kills it. When this process dies, the job dies with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch.backends import local_folder
from nemotron_launch.backends.live import Seen
from nemotron_launch.frozen import frozen, replace

TASK = "supervise.json"
_LOOK = 1.0  # seconds between two looks at what no signal tells
_PR_SET_PDEATHSIG = 1
_FULL, _AGAIN = 3600.0, 5.0  # seconds for which a full disk is waited for, and between two tries
_CANNOT = 1  # exit code of a run that could not be started
_DEPENDENCY = 1  # exit code of a run whose predecessor did not end well
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}


@frozen
class Point:
    """A command to run, and the folder that tells of it. after: folder and name of runs that must end well before."""

    folder: str
    command: tuple[str, ...]
    after: tuple[tuple[str, str], ...] = ()


class _Attempt:
    """One point while it is worked on."""

    def __init__(self, point: Point, task: dict[str, Any]) -> None:
        self.point, self.task = point, task
        self.folder = Path(point.folder)
        self.seen = Seen("pending", nodes=(os.uname().nodename,))
        self.child: subprocess.Popen[bytes] | None = None
        self.logs = self.folder
        self.restarts = 0
        self.asked_at: float | None = None

    def start(self) -> bool:
        """Begin an attempt; where that cannot be done the point is over, and the answer no."""
        try:
            self._start()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            self.end("failed", _CANNOT, f"could not be started: {(error.strerror or str(error)).lower()}{where}")
            return False
        return True

    def _start(self) -> None:
        """An attempt has a log folder, behind those of earlier ones."""
        number, logs = self.seen.attempt, self.folder / local_folder.LOGS
        while True:
            self.logs = logs / f"attempt-{number}"
            try:
                self.logs.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        env = {**os.environ, "NEMOTRON_LOG_DIR": str(self.logs)}
        with (self.logs / "node-0.log").open("ab") as log:
            self.child = subprocess.Popen(
                self.point.command,
                cwd=self.task["workdir"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_in_child(os.getpid()),
            )
        _say(f"{self.folder.name}: attempt {number}, process {self.child.pid}, logs in {self.logs}")
        started = self.seen.started or time.time()
        self.note(replace(self.seen, state="running", reason="", attempt=number, started=started))

    def note(self, seen: Seen) -> None:
        """Write down where the point is; a disk that is full is waited for, an hour at most."""
        self.seen = seen
        _patiently(lambda: local_folder.note(self.folder, seen))

    def end(self, state: Any, code: int, reason: str = "") -> None:
        _say(f"{self.folder.name}: over, exit code {code}" + (f": {reason}" if reason else ""))
        self.note(replace(self.seen, state=state, exit_code=code, reason=reason, ended=time.time()))

    def step(self, ending: bool) -> bool:
        """Look after the process; whether the point is over. ending: the supervisor was told to stop."""
        assert self.child is not None
        code = self.child.poll()
        wish = local_folder.wish(self.folder)
        if code is None:
            self._stop(wish, ending)
            return False
        code = code if code >= 0 else 128 - code
        for name in ("node-0.exit_code", local_folder.EXIT_CODE):
            with suppress(OSError):
                local_folder.put(self.logs / name, f"{code}\n")
        resume = code == self.task["resume_code"]
        if resume and not wish and not ending and self.restarts < self.task["max_restarts"]:
            self.restarts += 1
            _say(f"{self.folder.name}: exit code {code}, restart {self.restarts} of {self.task['max_restarts']}")
            self.seen = replace(self.seen, attempt=self.seen.attempt + 1)
            return not self.start()
        why = "asked to stop" if ending else f"no restart is left of {self.task['max_restarts']}"
        self.end(code=code, **local_folder.verdict(self.folder, code, f"saved; {why}; resubmit goes on"))
        return True

    def _stop(self, wish: str, ending: bool) -> None:
        assert self.child is not None
        if not wish and not ending:
            return
        now = time.monotonic()
        if self.asked_at is None:
            _say(f"{self.folder.name}: the trainer is asked to save and stop")
            self.asked_at = now
            self.child.send_signal(signal.SIGTERM)
        if wish == "now" or now - self.asked_at > self.task["patience"]:
            _say(f"{self.folder.name}: killed")
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)


def main(argv: list[str]) -> int:
    home = Path(argv[0])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # fetched with sigtimedwait: none is lost
    task = json.loads((home / TASK).read_text())
    waiting = [_Attempt(Point(**point), task) for point in task["points"]]
    for each in waiting:
        each.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        each.note(each.seen)
    working: list[_Attempt] = []
    ending = False
    while waiting or working:
        working = [each for each in working if not each.step(ending)]
        for each in list(waiting):
            reason = _blocked(each.point.after)
            if (wish := local_folder.wish(each.folder)) or ending or reason is None:
                why = "" if wish else "asked to stop before it began" if ending else _failed(each.point.after)
                each.end("cancelled", 130 if wish or ending else _DEPENDENCY, why)
            elif not reason and len(working) < task["max_parallel"]:
                if each.start():
                    working.append(each)
            else:
                reason = reason or f"waits for one of {task['max_parallel']} places"
                if reason != each.seen.reason:
                    each.note(replace(each.seen, reason=reason))
                continue
            waiting.remove(each)
        if working or waiting:
            got = signal.sigtimedwait(SIGNALS, _LOOK)
            if got and got.si_signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                _say(f"got {signal.Signals(got.si_signo).name}")
                ending = True
    return 0


def _blocked(after: Iterable[tuple[str, str]]) -> str | None:
    """What a run waits for; empty when for nothing, None when in vain."""
    waits = ""
    for name, seen in _predecessors(after):
        if seen is None or seen.state in ("pending", "running", "submitting"):
            waits = waits or f"waits for {name}"
        elif seen.state != "finished":
            return None
    return waits


def _failed(after: Iterable[tuple[str, str]]) -> str:
    for name, seen in _predecessors(after):
        if seen and seen.state not in ("pending", "running", "submitting", "finished"):
            return f"{name}, for which it waited, is {seen.state}"
    return ""


def _predecessors(after: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Seen | None]]:
    for folder, name in after:
        yield name, local_folder.look(Path(folder))


def _in_child(supervisor: int) -> Callable[[], None]:
    """The job hears signals, and dies with its supervisor, else a second one would find it still writing."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != supervisor:
            os._exit(_CANNOT)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())

    return prepare


def _patiently(write: Callable[[], None]) -> None:
    for _ in range(int(_FULL // _AGAIN)):
        try:
            return write()
        except OSError as error:
            _say(f"error: {error}; trying again")
            time.sleep(_AGAIN)
    return write()


def _say(line: str) -> None:
    with suppress(OSError):
        print(f"{time.strftime('%FT%T')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
