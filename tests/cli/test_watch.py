"""`nemotron jobs watch`: what a person sees in a terminal of any size, and what a pipe gets."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.live_runs import TOTAL, LiveRun, add_live_step, live_run

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT = 40.0  # seconds
_AGAIN = re.compile(r"\x1b\[(?:H|\d*A)")  # to where a picture begins
_MOVES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\r")

_DOTS = re.compile("[\u2801-\u28ff]")  # of Braille


@pytest.fixture
def live(tree: Path, nemotron: Nemotron) -> Iterator[LiveRun]:
    """A run at work that has made three steps."""
    add_live_step(tree)
    with live_run(nemotron) as run:
        yield run


class Terminal:
    """A terminal with `nemotron jobs watch` in it."""

    def __init__(self, fd: int, pid: int) -> None:
        self.fd, self.pid, self.shown = fd, pid, ""

    def until(self, *texts: str) -> str:
        """Wait until all of these have been shown since the last call; what has."""
        end = time.monotonic() + WAIT
        while not all(text in self.plain for text in texts):
            assert time.monotonic() < end, f"waited in vain for {texts}: {self.plain[-3000:]!r}"
            if not self._read():
                break
        shown, self.shown = self.plain, ""
        assert all(text in shown for text in texts), f"it ended without {texts}: {shown[-3000:]!r}"
        return shown

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def end(self) -> tuple[int, str]:
        """Wait until the command has ended; its exit code, and what it showed since the last call."""
        end = time.monotonic() + WAIT
        while self._read():
            assert time.monotonic() < end, f"it does not end: {self.plain[-3000:]!r}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status), self.plain

    @property
    def plain(self) -> str:
        return _MOVES.sub("", _AGAIN.sub("\n", self.shown))

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextmanager
def watching(*names: str, rows: int = 40, columns: int = 120) -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if not pid:  # pragma: no cover
        with suppress(BaseException):
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color"}
            for name in ("COLUMNS", "LINES"):
                environ.pop(name, None)
            os.execve(sys.executable, [sys.executable, "-m", "nemotron_launch", "jobs", "watch", *names], environ)
        os._exit(99)
    terminal = Terminal(fd, pid)
    try:
        yield terminal
    finally:
        if terminal.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


def test_a_run_is_seen_live_to_its_end_and_gives_its_exit_code(live: LiveRun) -> None:
    with watching(live.run_id) as terminal:
        terminal.until("running", f"step 3/{TOTAL}", "loss", "step 3 loss")
        live.go_on(12)
        terminal.until(f"step 12/{TOTAL}", "a step", "left", "step 12 loss")
        live.end(7)
        code, shown = terminal.end()
    assert code == 7
    # What stays on the first screen: the state, the progress, and the log's end as it was written.
    assert "failed, exit code 7" in shown and f"step 12/{TOTAL}" in shown and "<b>the last words</b>" in shown


def test_it_fits_a_narrow_terminal_and_one_that_changes(live: LiveRun) -> None:
    with watching(live.run_id, rows=24, columns=40) as terminal:
        terminal.until(f"step 3/{TOTAL}", "loss", "grad norm")
        live.go_on(5)
        shown = terminal.until(f"step 5/{TOTAL}", "█", "step 5 loss")
        assert max(map(len, shown.split("\n"))) <= 40
        terminal.resize(30, 100)
        assert _DOTS.search(terminal.until("a step", "grad norm"))
        terminal.resize(6, 20)  # nearly nothing
        terminal.until("running")
        terminal.resize(24, 40)
        live.end(0)
        code, shown = terminal.end()
    assert code == 0
    assert "finished, exit code 0" in shown


def test_ctrl_c_leaves_the_run_alone(live: LiveRun, nemotron: Nemotron) -> None:
    with watching("last") as terminal:
        terminal.until(f"step 3/{TOTAL}")
        terminal.press_ctrl_c()
        code, shown = terminal.end()
    assert code == 130
    assert "no longer watching; the run goes on" in shown and "nemotron jobs watch last" in shown
    live.go_on(4)
    live.end(0)
    assert nemotron("jobs", "wait", live.run_id, "-q").returncode == 0
    assert (live.output / "metrics.jsonl").read_text().count("\n") == 4


def test_several_runs_are_a_row_each(live: LiveRun, nemotron: Nemotron) -> None:
    with live_run(nemotron, output=Path("out/other")) as other, watching(live.run_id, other.run_id) as terminal:
        terminal.until("2 runs", live.run_id, other.run_id, f"3/{TOTAL}")
        live.go_on(9)
        terminal.until(f"9/{TOTAL}")
        live.end(0)
        terminal.until("1 finished, 1 running")
        other.end(3)
        code, shown = terminal.end()
    assert code == 3
    assert "1 finished, 1 failed" in shown


def test_a_pipe_gets_a_line_for_each_change(live: LiveRun, nemotron: Nemotron) -> None:
    live.go_on(6)
    live.end(5)
    done = nemotron("jobs", "watch", live.run_id)
    assert done.returncode == 5
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{live.run_id}: step 6/{TOTAL}  train/loss ") for line in lines)
    assert lines[-1].endswith("failed, exit code 5") or f"{live.run_id}: failed, exit code 5" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_run_without_numbers_says_why(live: LiveRun, nemotron: Nemotron) -> None:
    live.end(0)
    assert nemotron("jobs", "wait", live.run_id, "-q").returncode == 0
    metrics = live.output / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + "{broken\n")
    with watching(live.run_id) as terminal:
        code, shown = terminal.end()
    assert code == 0 and "metrics.jsonl:4: is not a JSON object; the line is left out" in shown
    for path in live.output.iterdir():
        path.unlink()
    live.output.rmdir()
    with watching(live.run_id) as terminal:
        code, shown = terminal.end()
    assert code == 0 and f"the output of {live.run_id} is gone" in shown
    missing = nemotron("jobs", "watch", "no-such-run")
    assert missing.returncode == 2 and missing.stderr.startswith("error: there is no run 'no-such-run'")
