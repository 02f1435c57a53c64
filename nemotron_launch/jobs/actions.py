"""What can be done to runs that are in the ledger: cancel, submit again, fetch, forget."""

from __future__ import annotations

import os
import posixpath
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nemotron_launch.backends.live import POINTS
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.hosts import Host
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.process import identity
from nemotron_launch.jobs.run import LIVE, OVER, Run, State
from nemotron_launch.jobs.run_folder import progress
from nemotron_launch.jobs.settle import Backends, Warn
from nemotron_launch.jobs.status import refresh
from nemotron_launch.jobs.submission import check_after, forget, kept, place, secret_files, whole

RESUMABLE: frozenset[State] = OVER - {"finished"}
PURGE_PATIENCE = 120.0  # seconds for the trainers of runs to save, before their jobs stay after all
METRICS = ("metrics.jsonl", "train.log", "config.yaml", "exit_code")


def cancel(backends: Backends, runs: Sequence[Run]) -> list[Run]:
    """End those of the runs that are not over, those of an executor in one call; which they are."""
    live = [run for run in runs if run.state in LIVE]
    for group in backends.groups(live):
        backends.of(group[0]).cancel(group)
    return live


def check_purge(runs: Sequence[Run]) -> None:
    """UserError: the executor of one of these keeps nothing of a job that could be deleted."""
    if other := next((run for run in runs if run.executor != "lepton"), None):
        raise UserError(f"{other.run_id} is a run of {other.executor}", where="--purge", hint="--purge is Lepton's")


def purge(ledger: Ledger, backends: Backends, runs: Sequence[Run], warn: Warn) -> set[str]:
    """Delete the jobs of runs, as soon as these are over: their trainers may save; which runs' jobs were deleted."""
    end, done = time.monotonic() + PURGE_PATIENCE, set()
    while left := [run for run in runs if run.run_id not in done]:
        for one in refresh(ledger, backends, left, warn):
            if one.run.state in OVER:
                backends.of(one.run).purge(one.run)  # type: ignore[attr-defined]  # as check_purge saw to
                done.add(one.run.run_id)
        runs = [ledger.get(run.run_id) or run for run in left]
        if time.monotonic() > end:
            break
        if len(done) < len(left):
            time.sleep(1.0)
    return done


def resubmit(
    ledger: Ledger, backends: Backends, runs: Sequence[Run], env: Mapping[str, str] | None = None
) -> list[Run]:
    """Submit runs again that ended before they had finished, from the files of their first submission; their new rows.

    They go on from their last checkpoints. runs: one run, or a sweep's points, of which those that have finished or
    still live are left alone. env: where the secrets' values are (default: this process's). UserError: nothing to do.
    """
    if len(runs) == 1 and runs[0].state not in RESUMABLE:
        raise _not_over(runs[0])
    wanted = [run for run in runs if run.state in RESUMABLE]
    if not wanted:
        finished = all(run.state == "finished" for run in runs)
        raise UserError(f"{runs[0].sweep}: no point has ended unfinished" + (", all have finished" if finished else ""))
    # Points are one submission again, so that no more of them run at a time than were allowed to. Here, their common
    # supervisor may still be at work on others: then each gets its own.
    if len(wanted) > 1 and (wanted[0].executor == "slurm" or all(run.state in OVER for run in runs)):
        sweep = whole(wanted[0])
        chosen = {**sweep.options, POINTS: [run.point for run in wanted]}
        return _again(ledger, backends, wanted, replace(sweep, options=chosen), env)
    return [row for run in wanted for row in _again(ledger, backends, [run], run, env)]


def _again(
    ledger: Ledger, backends: Backends, rows: Sequence[Run], run: Run, env: Mapping[str, str] | None
) -> list[Run]:
    secret = secret_files(run, os.environ if env is None else env)
    before = [other for name in run.after if (other := ledger.get(name))]
    waits = check_after(run, before)
    files = kept(ledger.folder, run.sweep or run.run_id)
    backend = backends.of(run)
    backend.check(run, files)
    fresh = {
        "state": "submitting", "submitter": identity(), "job_id": "", "cluster": "", "attempt": 0, "reason": "",
        "exit_code": None, "started": None, "ended": None,
    }  # fmt: skip
    claimed = ledger.change_all([(row, fresh) for row in rows])
    mine = [row for row in claimed if row]
    if len(mine) < len(rows):
        raise UserError(f"{run.run_id} was submitted by somebody else just now")
    for each in {one.state_dir: one for one in (run, *rows)}.values():
        backend.clear(each)
    return place(ledger, mine, replace(run, **fresh), [*files, *secret], backend, after=waits)


def _not_over(run: Run) -> UserError:
    if run.state == "finished":
        return UserError(f"{run.run_id} has finished: there is nothing to go on with")
    return UserError(f"{run.run_id} is {run.state}", hint=f"end it first:  nemotron jobs cancel {run.run_id}")


def fetch(host: Host | None, run: Run, to: Path, *, what: str = "metrics") -> list[Path]:
    """Copy what a run made into a folder here; what was copied.

    what: "metrics" (its numbers and logs), "checkpoints" (the newest complete one), or "all" of its output and logs.
    """
    if host is None:
        raise UserError(f"the folder of {run.run_id} cannot be read from here")
    found: list[Path] = []
    if what == "checkpoints":
        step = progress(host, [run])[run.run_id].checkpoint
        if step is None:
            raise UserError(f"{run.run_id} has no complete checkpoint", where=run.checkpoints or None)
        wanted = [(posixpath.join(run.checkpoints, f"step_{step}"), f"checkpoints/step_{step}")]
    else:
        there = host.entries(run.output_dir) or []
        names = [entry.name for entry in there if what == "all" or entry.name in METRICS]
        wanted = [(posixpath.join(run.output_dir, name), f"output/{name}") for name in names]
        if any(entry.name == "logs" for entry in host.entries(run.state_dir) or []):
            wanted.append((posixpath.join(run.state_dir, "logs"), "logs"))
    for path, name in wanted:
        host.fetch(path, to / name)
        found.append(to / name)
    if not found:
        raise UserError(f"{run.run_id} has left nothing yet", where=run.output_dir)
    return found


@frozen
class Prunable:
    """Runs that can be forgotten together: one, or the points of a sweep. folder: removed too, empty where it stays."""

    name: str
    runs: tuple[Run, ...]
    folder: str


def prunable(ledger: Ledger, *, older_than: float, states: Iterable[str] = ()) -> list[Prunable]:
    """Runs that are over, and ended `older_than` seconds ago; never one that a live run waits for. Outputs stay.

    states: only runs in one of these.
    """
    everything = ledger.runs()
    needed = {name for run in everything if run.state in LIVE for name in run.after}
    by_name: dict[str, list[Run]] = {}
    for run in everything:
        by_name.setdefault(run.sweep or run.run_id, []).append(run)
    chosen, before = set(states) or set(OVER), time.time() - older_than
    found = []
    for name, runs in by_name.items():
        over = all(run.state in OVER and run.state in chosen and (run.ended or run.created) <= before for run in runs)
        if over and not any(run.run_id in needed for run in runs):
            first = runs[0]
            holds_output = any(_below(run.output_dir, first.run_dir) for run in runs)
            ours = posixpath.basename(first.run_dir) == name and not holds_output
            found.append(Prunable(name, tuple(runs), first.run_dir if ours else ""))
    return found


def prune(ledger: Ledger, backends: Backends, chosen: Sequence[Prunable]) -> None:
    """Forget runs: their folders, kept files and rows, in this order, so that a failure leaves what can be repeated."""
    from nemotron_launch.reports.sources import forget_copies

    first = {one.name: one.runs[0] for one in chosen}
    by_name = {one.name: one for one in chosen}
    for group in backends.groups(first.values()):
        names = [run.sweep or run.run_id for run in group]
        folders = [folder for name in names if (folder := by_name[name].folder)]
        host = backends.of(group[0]).host
        if folders and host:
            done = host.run(f"rm -rf -- {shlex.join(folders)}", timeout=600)
            if done.code:
                said = done.stderr.strip().splitlines()[-1:] or ["rm ended without a word"]
                raise UserError(f"not all folders could be removed: {said[0]}", where=host.name or None, exit_code=1)
        for name in names:
            forget(ledger.folder, name)
            forget_copies(ledger.folder, (run.run_id for run in by_name[name].runs))
        ledger.remove(run.run_id for name in names for run in by_name[name].runs)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
