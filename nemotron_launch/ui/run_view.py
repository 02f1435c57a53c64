"""What a run's page shows: all of it once, then what has come since; and the ends of its logs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.reports.collect import lineage_of, run_warnings
from nemotron_launch.reports.run_data import POINTS, curves, report_data
from nemotron_launch.reports.sources import missing
from nemotron_launch.ui.log_tails import chosen
from nemotron_launch.ui.places import Watched

_PATIENCE = 1.0  # seconds that a request waits for files that are just being read
_LINES = 1000  # of a log in one answer
_SHORT = 2 << 20  # bytes of metrics in which signs are looked for whenever there are more
_SELDOM = 15.0  # seconds between two looks in longer ones
_ROW = ("state", "reason", "exit_code", "attempt", "job_id", "submitted", "started", "ended")
Data = dict[str, Any]


def whole(watched: Sequence[Watched], *, patience: float) -> Data:
    """Runs as a report has them, those that have been read; with what is known of all, and marks to go on from.

    patience: seconds that files which are just being read are waited for.
    """
    lineage = _lineage([one.run for one in watched])
    end = time.monotonic() + patience
    with ExitStack() as held:
        free = [one for one in watched if held.enter_context(one.free(end - time.monotonic()))]
        read = {one.run.run_id: one.files for one in free if one.files}
        data = report_data(
            list(read.values()),
            progress={one.run.run_id: one.progress for one in free if one.progress},
            warnings={one.run.run_id: _warnings(one) for one in free},
            lineage=lineage,
        )
        return {"report": data, "live": {one.run.run_id: _live(one) for one in watched}}


def news(watched: Watched, mark: str, step: int) -> Data | None:
    """What has come since: the run's state, and its curves from `step` on, whose points replace what was known of them.

    {"busy": true}: its files are just being read. None: all must be told again, for the run has gone back, or the mark
    is not of this server.
    """
    with watched.free(_PATIENCE) as free:
        if not free:
            return {"busy": True}
        if watched.files is None or mark != _mark(watched):
            return None
        metrics = watched.files.metrics()
        return {
            "live": _live(watched),
            "metrics": curves(metrics.since(step), POINTS),
            "last_step": metrics.last_step,
            "warnings": _warnings(watched),
            "problems": list(metrics.problems),
            "bad_lines": metrics.bad_lines,
        }


def logs(watched: Watched, wanted: str, number: int | None) -> Data:
    """The lines of a log from this number on, and which logs there are; {"busy": true} while it is just being read."""
    with watched.free(_PATIENCE) as free:
        if not free:
            return {"busy": True}
        source = chosen(watched.sources, wanted)
        tail = watched.tails.get(source) if source else None
        return {
            "sources": [{"attempt": one.attempt, "name": one.name} for one in watched.sources],
            "source": f"{source.attempt}/{source.name}" if source else "",
            "state": watched.run.state,
            "problem": watched.problem,
            **(tail.since(number, _LINES) if tail else {"lines": [], "first": 0, "next": 0, "cut": False}),
        }


def _live(one: Watched) -> Data:
    """What changes while a run goes on, and what keeps it from being shown."""
    problem = missing(one.files) if one.files else None
    return {
        **{name: getattr(one.run, name) for name in _ROW},
        "mark": _mark(one),
        "nodes": list(one.nodes),
        "expected_start": one.expected_start,
        "checkpoint": one.progress.checkpoint if one.progress else None,
        "missing": problem.message if problem else "",
        "problem": one.problem,
    }


def _mark(one: Watched) -> str:
    """Another one when points that were told may no longer hold."""
    metrics = one.files.metrics() if one.files else None
    return f"{id(metrics):x}-{metrics.restarts}-{len(metrics.names)}" if metrics else ""


def _lineage(runs: Sequence[Run]) -> Data | None:
    with suppress(UserError), Ledger() as ledger:  # a ledger that cannot be read is told elsewhere
        return lineage_of(ledger, runs)
    return None


def _warnings(one: Watched) -> list[Data]:
    """What its numbers call for; of a long run looked for now and then only, for all its numbers are read."""
    if one.files is None:
        return []
    offset, moment = one.files.metrics().offset, time.monotonic()
    known, found, when = one.warned
    if offset != known and (offset < _SHORT or moment - when > _SELDOM):
        found = run_warnings(one.files)
        one.warned = (offset, found, moment)
    return found
