"""How following looks: log lines on stdout, with their node in front where there are several; the rest on stderr."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

import click

from nemotron_launch.backends.live import LogSource
from nemotron_launch.cli.job_tables import plain, state_line
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.follow import MOST_LOGS, Answer, Detached, follow
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.log_stream import LogStream, Piece, tail_starts
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.status import Known, exit_code

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


class Terminal:
    """Prints what following tells, and asks what a Ctrl-C means. A context manager: it takes SIGINT meanwhile.

    several: whether each line says which log it is from. on_interrupt: the answer to a Ctrl-C; None asks.
    """

    def __init__(self, runs: Sequence[Run], *, on_interrupt: str | None = None, quiet: bool = False) -> None:
        self.several_runs = len(runs) > 1
        self.several_logs = any(run.nodes > 1 for run in runs)
        self.on_interrupt = on_interrupt
        self.quiet = quiet
        self.asked = 0
        self.cancelling = False
        self._before: Any = None

    def __enter__(self) -> Terminal:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 2:  # nothing answers: whoever presses on wants out
            raise KeyboardInterrupt

    # What following tells.

    def lines(self, piece: Piece) -> None:
        prefix = self._prefix(piece)
        data = piece.data
        if prefix:
            data = prefix + data[:-1].replace(b"\n", b"\n" + prefix) + b"\n"
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def _prefix(self, piece: Piece) -> bytes:
        """Which log a line is from, where there are several: point, node or service."""
        parts = [f"{piece.run.point}" if piece.run.point is not None else piece.run.run_id] * self.several_runs
        name = piece.source.name
        if name == "job" or self.several_logs or not name.startswith("node-"):
            parts.append(name)
        if not parts:
            return b""
        text = f"[{' '.join(parts)}] "
        if sys.stdout.isatty():
            text = click.style(text, fg=_COLOURS[hash_of(name) % len(_COLOURS)], dim=name == "job")
        return text.encode()

    def state(self, known: Known) -> None:
        if self.quiet:
            return
        run, seen = known.run, known.seen
        text = f"{run.run_id}: {state_line(run)}" + (f": {plain(run.reason)}" if run.reason else "")
        if seen and seen.expected_start and run.state == "pending":
            text += f"; expected to start {time.strftime('%F %T', time.localtime(seen.expected_start))}"
        if run.state == "running" and seen and seen.nodes:
            text += f" on {' '.join(seen.nodes)}"
        self.notice(text)

    def notice(self, text: str) -> None:
        sys.stdout.flush()
        click.echo(f"nemotron: {text}", err=True)

    # Ctrl-C.

    def interrupted(self) -> Answer | None:
        if not self.asked:
            return None
        if self.on_interrupt == "cancel" or self.cancelling:
            self.asked = 0
            self.cancelling = True
            return "cancel"
        if self.on_interrupt == "detach" or not sys.stdin.isatty():
            return "detach"
        answer = self._ask()
        self.asked = 0
        self.cancelling = answer == "cancel"
        if answer == "continue":
            self.notice("following on")
        return answer

    def _ask(self) -> Answer:
        click.echo("\nThe run goes on. [d]etach, [c]ancel it, or [Enter] to continue? ", nl=False, err=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            said = sys.stdin.readline()
        except KeyboardInterrupt:
            click.echo(err=True)
            return "detach"
        finally:
            signal.signal(signal.SIGINT, self._note)
        word = said.strip().lower()
        if not said or word in ("d", "detach"):
            return "detach"
        return "cancel" if word in ("c", "cancel") else "continue"

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def follow_to_end(
    ledger: Ledger, backends: Backends, rows: Sequence[Run], *, on_interrupt: str | None = None, **more: Any
) -> int:
    """Follow runs of one submission to their end; the exit code: the run's own, see status.exit_code."""
    with Terminal(rows, on_interrupt=on_interrupt) as terminal:
        try:
            ended = follow(ledger, backends.of(rows[0]), rows, terminal, **more)
        except KeyboardInterrupt:
            name = rows[0].sweep or rows[0].run_id
            hint = f"to follow it again:  nemotron jobs attach {name}"
            raise Detached("no longer following; the run goes on", hint=hint, exit_code=130) from None
    return exit_code(ended)


def wait_for(ledger: Ledger, backends: Backends, runs: Sequence[Run], *, quiet: bool = False) -> int:
    """Wait until all runs are over; the exit code, as of follow_to_end."""
    ended: dict[str, Run] = {}
    with Terminal(runs, on_interrupt="detach", quiet=quiet) as terminal:
        for group in backends.groups(runs):
            done = follow(ledger, backends.of(group[0]), group, terminal, logs=False)
            ended |= {run.run_id: run for run in done}
    return exit_code([ended[run.run_id] for run in runs])


def print_logs(
    ledger: Ledger,
    backends: Backends,
    runs: Sequence[Run],
    *,
    follows: bool,
    node: str | None,
    attempt: int | None,
    tail: int | None,
) -> None:
    """Print the logs that there are; `follows`: and what is written until the runs are over."""
    if len(runs) > MOST_LOGS:
        hint = f"a point of it is, for example, {runs[0].run_id}"
        raise UserError(f"{runs[0].sweep} has {len(runs)} points: too many logs", hint=hint)
    backend, name = backends.of(runs[0]), f"node-{node}" if node and node.isdigit() else node
    with Terminal(runs, on_interrupt="detach", quiet=True) as terminal:
        streams, known = [], 0
        for run in runs:
            sources = [one for one in backend.log_sources(run) if name in (None, one.name)]
            newest = max((one.attempt for one in sources), default=0) if attempt is None else attempt
            shown = partial(_shown, name=name, attempt=attempt, first=newest)
            sources = [one for one in sources if shown(one)]
            known += len(sources)
            start = tail_starts(backend, sources, tail) if tail is not None else {}
            streams.append(LogStream(run, shown, start))
            streams[-1].look(backend)
        if not known and not follows:
            raise UserError(f"{runs[0].sweep or runs[0].run_id} has no such log yet", hint=_why(runs[0]), exit_code=1)
        if follows:
            follow(ledger, backend, runs, terminal, streams=streams)
            return
        for stream in streams:
            while pieces := list(stream.read(backend)):
                for piece in pieces:
                    terminal.lines(piece)
            for piece in stream.last_words():
                terminal.lines(piece)


def _shown(source: LogSource, *, name: str | None, attempt: int | None, first: int) -> bool:
    """Whether a log was asked for. The script's own belongs to all attempts."""
    if name is not None:
        return source.name == name and (source.attempt == attempt if attempt is not None else source.attempt >= first)
    return source.name == "job" or (source.attempt == attempt if attempt is not None else source.attempt >= first)


def _why(run: Run) -> str:
    return f"the run is {run.state}" + (f": {run.reason}" if run.reason else "")


def hash_of(name: str) -> int:
    """A number that the same name always has: of node-3 it is 3."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else sum(name.encode())
