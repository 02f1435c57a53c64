"""How runs are now: asked of their executors, one call for all that share one, and written into the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from nemotron_launch.backends.live import Backend, Refused, Seen
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.hosts import Unreachable
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import LIVE, OVER, Run, State
from nemotron_launch.jobs.run_folder import Progress, progress
from nemotron_launch.jobs.settle import Backends, Warn, only_one
from nemotron_launch.trainer.exit_codes import RESUME_ME

CANCELLED = 130  # exit code of a command that waited for a run that was cancelled
_VANISHED = 900.0  # seconds after which a run that nobody knows of is lost
_MOVING: frozenset[State] = LIVE - {"submitting"}
_KEPT = ("state", "reason", "exit_code", "attempt", "started", "ended")


@frozen
class Known:
    """A run and what was just seen of it; None of one that is over, or whose executor is out of reach."""

    run: Run
    seen: Seen | None = None


def listed(
    ledger: Ledger,
    backends: Backends,
    warn: Warn,
    *,
    states: Sequence[str] = (),
    step: str | None = None,
    profile: str | None = None,
    limit: int | None = None,
) -> list[Known]:
    """Runs as `jobs list` shows them, asked after; filters hold for what they are now. UserError: no such state."""
    unknown = next((state for state in states if state not in LIVE | OVER), None)
    if unknown is not None:
        raise UserError(f"{unknown!r} is no state", where="--state", hint=", ".join(sorted(LIVE | OVER)))

    def wanted(run: Run) -> bool:
        same_step = step is None or run.step == step or run.step.endswith(f"/{step}")
        return same_step and (profile is None or run.profile == profile)

    refresh(ledger, backends, ledger.runs(states=_MOVING, where=wanted), warn)
    chosen: Any = set(states)
    return [Known(run) for run in ledger.runs(states=chosen, limit=limit, where=wanted)]


def exit_code(runs: Sequence[Run]) -> int:
    """Of a command that waited for runs: 0 when all finished, else that of the first that did not.

    It is the run's own where there is one: 85 saved and stopped, 128 + n ended by signal n; 130 cancelled; 1 otherwise.
    """
    for run in runs:
        if run.state == "cancelled":
            return CANCELLED
        if run.state == "stopped":
            return run.exit_code or RESUME_ME
        if run.state != "finished":
            return run.exit_code or 1
    return 0


def refresh(ledger: Ledger, backends: Backends, runs: Sequence[Run], warn: Warn) -> list[Known]:
    """Ask after those of the runs that are not over, or lost, write what has changed; all of them, in their order."""
    known = {run.run_id: Known(run) for run in runs}
    # One that was lost may be found again: a file system was away, or a controller.
    for group in backends.groups(run for run in runs if run.state in _MOVING or run.state == "lost"):
        try:
            backend = backends.of(group[0])
            for one in look(ledger, backend, group):
                known[one.run.run_id] = one
        except Unreachable as error:
            warn(f"{error.message}: what is shown of {_these(group)} may have changed")
        except UserError as error:
            warn(str(error).removeprefix("error: "))
    return list(known.values())


def progress_of(backends: Backends, runs: Sequence[Run], warn: Warn) -> dict[str, Progress]:
    """How far runs have come, by run id, those of a host in one call; without those that cannot be reached."""
    found: dict[str, Progress] = {}
    for group in backends.groups(run for run in runs if run.state != "submitting"):
        try:
            found |= progress(backends.of(group[0]).host, group)
        except UserError as error:
            warn(f"{error.message}: how far {_these(group)} came is not known")
    return found


def look(ledger: Ledger, backend: Backend, runs: Sequence[Run]) -> list[Known]:
    """Poll runs of one backend, let those go on that want a successor, and write down what has changed."""
    # What another process is submitting changes under our hands.
    runs = [ledger.get(run.run_id) or run if run.state == "submitting" else run for run in runs]
    seen = backend.poll([run for run in runs if run.state != "submitting"])
    for run in runs:
        one = seen.get(run.run_id)
        if one and one.wants_successor:
            seen[run.run_id] = _succeeded(ledger, backend, run, one)
    changes = [(run, _changes(run, seen.get(run.run_id))) for run in runs]
    written = ledger.change_all([(run, values) for run, values in changes if values])
    new = {run.run_id: run for run in written if run}
    found = []
    for run, values in changes:
        now = new.get(run.run_id) or (run if not values else ledger.get(run.run_id) or run)
        found.append(Known(now, seen.get(run.run_id)))
    if done := [run for run in new.values() if run.state == "finished"]:
        from nemotron_launch.artifacts.registry import register

        with suppress(UserError):  # the next command that wants to know what they made tries again
            register(ledger, backend.host, done)
    return found


def _succeeded(ledger: Ledger, backend: Backend, run: Run, seen: Seen) -> Seen:
    """Submit the successor that a run wants, once, however many processes see it; what is to be noted of the run."""
    with only_one(ledger, f"successor {run.run_id}") as ours:
        now = ledger.get(run.run_id)
        if not ours or now is None or (now.job_id, now.state) != (run.job_id, run.state):
            return seen  # somebody else does it, or has done it
        try:
            made = backend.submit_successor(replace(run, job_id=seen.job_id or run.job_id))
        except Refused as error:
            return replace(seen, state="stopped", reason=error.message)
        # Others may note meanwhile that it waits.
        while now and now.job_id == run.job_id and not ledger.change(now, job_id=made.job_id, cluster=made.cluster):
            now = ledger.get(run.run_id)
        return replace(seen, job_id=made.job_id)


def _changes(run: Run, seen: Seen | None) -> dict[str, Any]:
    if seen is None:
        return _vanished(run)
    values = {name: getattr(seen, name) for name in _KEPT}
    if seen.job_id:
        values["job_id"] = seen.job_id
    for name in ("started", "ended", "exit_code"):  # an executor that has forgotten them does not unsay them
        if values[name] is None:
            del values[name]
    return {name: value for name, value in values.items() if getattr(run, name) != value}


def _vanished(run: Run) -> dict[str, Any]:
    """What to note of a run that its executor was asked about and knows nothing of; another machine's is its own."""
    elsewhere = run.executor == "local" and run.host != os.uname().nodename
    known_since = max(run.submitted or run.created, run.started or 0.0)
    if run.state == "submitting" or elsewhere or time.time() - known_since < _VANISHED:
        return {}
    reason = "neither its executor nor its folder knows of it"
    return {"state": "lost", "reason": reason, "ended": time.time()} if run.state in LIVE else {}


def _these(runs: Sequence[Run]) -> str:
    return runs[0].run_id if len(runs) == 1 else f"{len(runs)} runs"
