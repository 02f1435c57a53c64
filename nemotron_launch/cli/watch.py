"""`nemotron jobs watch`: runs live in the terminal, to their end."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from nemotron_launch.backends.live import Backend, LogSource
from nemotron_launch.cli.job_tables import state_line
from nemotron_launch.cli.jobs import RUNS, opened
from nemotron_launch.cli.watch_view import Facts, curves_of, number, table_view, view
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.follow import Answer, Detached, Pace, any_ended, follow
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.log_stream import LogStream, Piece
from nemotron_launch.jobs.log_text import clean, ends
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.status import Known, exit_code, refresh
from nemotron_launch.reports.collect import run_warnings
from nemotron_launch.reports.run_data import total_steps
from nemotron_launch.reports.sources import config_of, missing, open_runs, update

_LOG = 64 << 10  # bytes of a log's end that are read at first
_NUMBERS = 4  # metrics of a line where there is no terminal
_TOTAL = re.compile(r"\bstep \d+/(\d+)\b")  # the trainer knows how many steps its rows are enough for
_REDRAW = 1.0  # seconds: times go on without any news


@click.command()
@RUNS
@click.pass_context
def watch(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Watch a run live: progress, time left, curves, warnings and its log. Ends with the run's exit code.

    Of several runs, or of a sweep, a row each. Ctrl-C ends watching and leaves the runs alone. Where stdout is no
    terminal it prints a line for each change.
    """
    with opened() as (ledger, backends):
        found = list({run.run_id: run for name in names for run in ledger.find(name)}.values())
        try:
            runs = _watch_one(ledger, backends, found[0]) if len(found) == 1 else _watch_all(ledger, backends, found)
        except (Detached, KeyboardInterrupt) as error:
            if isinstance(error, Detached) and error.exit_code != 130:
                raise
            hint = f"to watch again:  nemotron jobs watch {' '.join(names)}"
            goes_on = "the run goes on" if len(found) == 1 else "the runs go on"
            raise Detached(f"no longer watching; {goes_on}", hint=hint, exit_code=130) from None
        ctx.exit(exit_code(runs))


class Files:
    """The numbers of runs, read on at a pace: every 1 to 5 s here, every 3 to 15 s over a connection."""

    def __init__(self, ledger: Ledger, backends: Backends, runs: Sequence[Run]) -> None:
        self.problem = ""
        self.files = {one.name: one for one in open_runs(backends, runs, ledger.folder)}
        remote = any(one.host is not None and one.host.name for one in self.files.values())
        self.pace = Pace(3.0, 15.0) if remote else Pace(1.0, 5.0)
        self._configs: dict[str, Mapping[str, Any]] = {}
        self._warned: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    def read(self, runs: Sequence[Run]) -> bool:
        """Read what is new of these; whether there was anything."""
        problems: list[str] = []
        before = {name: one.metrics().offset for name, one in self.files.items()}
        for run in runs:
            self.files[run.run_id].run = run
        update([self.files[run.run_id] for run in runs], problems.append)
        self.problem = problems[0] if problems else ""
        news = any(one.metrics().offset != before[name] for name, one in self.files.items())
        self.pace.done(news)
        return news

    def facts(self, run: Run, **more: Any) -> Facts:
        one = self.files[run.run_id]
        if one.config_text and run.run_id not in self._configs:
            self._configs[run.run_id] = config_of(one)
        metrics = one.metrics()
        total = total_steps(metrics, self._configs.get(run.run_id, {}))
        return Facts(run, metrics, total, problems=metrics.problems, **more)

    def warnings(self, run: Run) -> list[dict[str, Any]]:
        one = self.files[run.run_id]
        offset = one.metrics().offset
        if self._warned.get(run.run_id, (-1, []))[0] != offset:
            self._warned[run.run_id] = (offset, run_warnings(one))
        return self._warned[run.run_id][1]

    def why_none(self, run: Run) -> str:
        """Why there are no numbers of a run that should have some."""
        error = missing(self.files[run.run_id])
        return error.message if error and run.state not in LIVE else ""


class Interrupt:
    """Notes Ctrl-C while it is open; the second time is for whoever wants out at once."""

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 1:
            raise KeyboardInterrupt


class Screen:
    """A run that is followed (follow.Watcher), drawn in the terminal, or told in lines where there is none."""

    def __init__(
        self, run: Run, files: Files, interrupt: Interrupt, terminal: Terminal, half: Sequence[LogSource]
    ) -> None:
        self.known, self.files, self.interrupt, self._terminal = Known(run), files, interrupt, terminal
        self.lines_of_log: deque[str] = deque(maxlen=200)
        self.text = ""
        self.total: int | None = None
        self._half = set(half)  # logs of which the first line is the end of one
        self._dirty = True
        self._lines = None if sys.stdout.isatty() else Lines()

    # What following tells.

    def lines(self, piece: Piece) -> None:
        lines = piece.data[:-1].split(b"\n")
        if piece.source in self._half:
            self._half.discard(piece.source)
            lines = lines[1:]
        shown = [clean(line) for line in lines[-200:]]
        self.lines_of_log.extend(shown)
        if told := next((found for line in reversed(shown) if (found := _TOTAL.search(line))), None):
            self.total = int(told[1])
        self._dirty = True

    def state(self, known: Known) -> None:
        self.known, self._dirty = known, True
        self.files.pace.now()
        if self._lines:
            if known.run.state not in LIVE:  # its end is the last that is told
                self.look()
            self._lines.state(known.run)

    def notice(self, text: str) -> None:
        self.text = "" if "is back" in text else text
        self._dirty = True
        if self._lines:
            click.echo(f"nemotron: {text}", err=True)

    def interrupted(self) -> Answer | None:
        return "detach" if self.interrupt.asked else None

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            self.look()
            left = end - time.monotonic()
            if self.interrupt.asked or left <= 0:
                return
            time.sleep(min(left, 0.1))

    # How it looks.

    def look(self) -> None:
        """Read the numbers when it is time, and draw what is another."""
        if self.files.pace.due() and self.known.run.state != "submitting":
            self._dirty |= self.files.read([self.known.run])
            if self._lines:
                self._lines.numbers(self.facts())
        self._terminal.draw(self, self._dirty)
        self._dirty = False

    def facts(self) -> Facts:
        run, seen = self.known.run, self.known.seen
        facts = self.files.facts(
            run,
            nodes=seen.nodes if seen else (),
            expected_start=seen.expected_start if seen else None,
            warnings=self.files.warnings(run),
            lines=list(self.lines_of_log),
            notice=self.text or self.files.problem or self.files.why_none(run),
        )
        return replace(facts, total=self.total or facts.total)

    def picture(self, width: int, height: int | None) -> Any:
        return view(self.facts(), width, height)


class Table:
    """Several runs, a row each."""

    def __init__(self, runs: Sequence[Run], files: Files) -> None:
        self.runs, self.files = list(runs), files
        self.notice = ""

    def picture(self, width: int, height: int | None) -> Any:
        first, *rest = self.runs
        return table_view([self.files.facts(first, notice=self.notice), *map(self.files.facts, rest)], width, height)


class Lines:
    """What is told where there is no terminal: a line for each state, for numbers that are new, for each warning."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[object, ...]] = {}
        self._steps: dict[str, int | None] = {}
        self._warned: set[tuple[str, str]] = set()

    def state(self, run: Run) -> None:
        told = (run.state, run.reason, run.attempt)
        if self._told.get(run.run_id) != told:
            self._told[run.run_id] = told
            self._say(run, state_line(run) + (f": {run.reason}" if run.reason else ""))

    def numbers(self, facts: Facts) -> None:
        run, metrics = facts.run, facts.metrics
        if metrics.last_step is None or self._steps.get(run.run_id) == metrics.last_step:
            return
        self._steps[run.run_id] = metrics.last_step
        words = [f"step {metrics.last_step}" + (f"/{facts.total}" if facts.total else "")]
        for curve in curves_of(metrics)[:_NUMBERS]:
            words.append(f"{curve.metric} {number(metrics.values(curve.metric)[-1])}")
        self._say(run, "  ".join(words))
        for warning in facts.warnings:
            if (run.run_id, warning["when"]) not in self._warned:
                self._warned.add((run.run_id, warning["when"]))
                self._say(run, f"warning: {warning['when']} {warning['seen']} {warning['then']}")

    def _say(self, run: Run, text: str) -> None:
        from nemotron_launch.cli.job_tables import plain

        click.echo(f"{run.run_id}: {plain(click.unstyle(text))}")
        sys.stdout.flush()


# The terminal ---------------------------------------------------------------------------------------------------------


class Terminal:
    """The terminal's other screen, so that the first stays as it was. Without a terminal it does nothing.

    A context manager; `draw` while it is open.
    """

    def __init__(self) -> None:
        self._live: Any = None
        self._drawn: tuple[float, object] = (0.0, None)

    def __enter__(self) -> Terminal:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False), screen=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def draw(self, shown: Screen | Table, dirty: bool) -> None:
        """Draw it, if there are news, or the terminal has another size, or a second has gone by."""
        if self._live is None:
            return
        size = self._live.console.size
        if dirty or size != self._drawn[1] or time.monotonic() - self._drawn[0] > _REDRAW:
            self._drawn = (time.monotonic(), size)
            self._live.update(shown.picture(size.width, size.height), refresh=True)


def _leave(shown: Screen | Table) -> None:
    """What stays in the terminal when the watch is over."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        console.print(shown.picture(console.width, None))


def _watch_one(ledger: Ledger, backends: Backends, run: Run) -> list[Run]:
    backend = backends.of(run)
    files = Files(ledger, backends, [run])
    with Interrupt() as interrupt:
        start = _log_starts(backend, run)
        stream = LogStream(run, _shown, start)
        with Terminal() as terminal:
            screen = Screen(run, files, interrupt, terminal, [source for source, at in start.items() if at])
            if sys.stdout.isatty():  # lines wait for what the log says of the steps
                screen.look()
            ended = follow(ledger, backend, [run], screen, streams=[stream])
        screen.known = Known(ended[0])
        files.read(ended)
        if screen._lines:
            screen._lines.state(ended[0])
            screen._lines.numbers(screen.facts())
        _leave(screen)
    return ended


def _shown(source: LogSource) -> bool:
    """Of many nodes the first: the others say the same."""
    return source.name in ("node-0", "train", "job")


def _log_starts(backend: Backend, run: Run) -> dict[LogSource, int]:
    with suppress(Exception):  # the logs are asked for again, by what tells of failures
        return ends(backend, [one for one in backend.log_sources(run) if _shown(one)], _LOG)
    return {}


def _watch_all(ledger: Ledger, backends: Backends, runs: Sequence[Run]) -> list[Run]:
    """Until all are over. Executors are asked as often as by `jobs attach`."""
    files = Files(ledger, backends, runs)
    table, lines = Table(runs, files), None if sys.stdout.isatty() else Lines()
    waits, works, finding = Pace(1.0, 15.0), Pace(5.0, 30.0), Pace(1.0, 5.0)
    unread = {run.run_id for run in runs}
    with Interrupt() as interrupt:
        with Terminal() as terminal:
            while not interrupt.asked:
                pace = works if all(run.state == "running" or run.state not in LIVE for run in table.runs) else waits
                if finding.due():
                    finding.done(False)
                    if _any_ended(backends, table.runs):
                        pace.now()
                dirty = pace.due() and _ask(ledger, backends, table, (waits, works), lines)
                if dirty:
                    finding.done(True)
                if files.pace.due():
                    wanted = [run for run in table.runs if run.state in LIVE or run.run_id in unread]
                    dirty |= files.read([run for run in wanted if run.state != "submitting"])
                    unread -= {run.run_id for run in wanted if run.state not in LIVE}
                    for run in wanted if lines else ():
                        assert lines is not None
                        lines.numbers(files.facts(run))
                terminal.draw(table, dirty)
                if not unread and all(run.state not in LIVE for run in table.runs):
                    break
                time.sleep(0.1)
        _leave(table)
        if interrupt.asked:
            raise KeyboardInterrupt
    return table.runs


def _any_ended(backends: Backends, runs: Sequence[Run]) -> bool:
    """Whether a folder says that its run is over, before the executor was asked."""
    for group in backends.groups(run for run in runs if run.state in LIVE):
        with suppress(UserError):
            if any_ended(backends.of(group[0]).host, group):
                return True
    return False


def _ask(ledger: Ledger, backends: Backends, table: Table, paces: Sequence[Pace], lines: Lines | None) -> bool:
    """Ask the executors; whether anything is another than before."""
    problems: list[str] = []
    found = [known.run for known in refresh(ledger, backends, table.runs, problems.append)]
    news, table.runs = found != table.runs, found
    table.notice = problems[0] if problems else ""
    for pace in paces:
        pace.done(news)
    if news:
        table.files.pace.now()
    for run in found if lines else ():
        assert lines is not None
        lines.state(run)
    return news
