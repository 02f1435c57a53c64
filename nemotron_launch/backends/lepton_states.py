"""What Lepton's states, replicas and last lines mean for a run. Pure functions of what the API answers."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemotron_launch.backends import lepton, lepton_api
from nemotron_launch.backends.live import LogSource
from nemotron_launch.jobs.run import Run, State
from nemotron_launch.trainer.exit_codes import RESUME_ME

# Lepton's states while a run lives, and ours. All others that are not in OVER are unknown: they end nothing.
WAITING = ("Queueing", "Awaiting", "Starting", "Restarting", "PendingRetry")
ENDING = ("Stopping", "Terminating", "Deleting")
OVER = ("Completed", "Failed", "Stopped", "Deleted", "Archived")


def nonce_of(job: Mapping[str, Any]) -> str | None:
    """What marks the last line of a job's replicas: it stands in their command."""
    spec = job.get("spec")
    container = spec.get("container") if isinstance(spec, dict) else None
    words = container.get("command") if isinstance(container, dict) else None
    found = re.search(r"nemotron-exit ([0-9a-f]{16}) attempt=", "\n".join(map(str, words or ())))
    return found[1] if found else None


def sources_of(run: Run, replicas: Sequence[Mapping[str, Any]]) -> list[LogSource]:
    """Whose logs there are. A replica's id ends in its number, and a few letters; it says nothing of attempts.

    Of the replicas with one number the last one is the newest attempt's, the one before it the one before's.
    """
    by_number: dict[int, list[str]] = {}
    for place, replica in enumerate(sorted(replicas, key=lepton_api.created)):
        name = lepton_api.job_id(replica) or str(replica.get("id") or "")
        found = re.search(r"-(\d+)(?:-[a-z0-9]{4,10})?$", name)
        by_number.setdefault(int(found[1]) if found else place, []).append(name)
    sources = []
    for number, names in by_number.items():
        newest = max(run.attempt, len(names) - 1)
        for back, name in enumerate(reversed(names)):
            sources.append(LogSource(newest - back, f"node-{number}", posixpath.join(run.job_id, name)))
    return sources


def log_key(source: LogSource) -> tuple[str, str]:
    """(job, replica)."""
    job, _, replica = source.key.partition("/")
    return job, replica


def in_order(sources: Iterable[LogSource]) -> list[LogSource]:
    """By attempt, then by node."""
    return sorted(sources, key=lambda source: (source.attempt, int(source.name.rpartition("-")[2])))


def exit_line(lines: Sequence[str], nonce: str) -> tuple[int, int, int] | None:
    """(attempt, node, exit code) of the last line that says them."""
    return next((found for line in reversed(lines) if (found := lepton.read_exit(line, nonce))), None)


def worst(codes: Mapping[tuple[int, int], int]) -> int | None:
    """What a job's exit codes, by attempt and node, say together: of its last attempt the cause, before its effects."""
    if not codes:
        return None
    last = max(attempt for attempt, _ in codes)
    ends = sorted(codes[key] for key in codes if key[0] == last)
    causes = [code for code in ends if code and code != RESUME_ME and code < 128]
    if causes:
        return causes[0]
    return RESUME_ME if RESUME_ME in ends else ends[-1]


def after_exit(code: int | None, otherwise: State) -> State:
    """What a run is whose job is gone, by its exit code, if it left one."""
    if code is None:
        return otherwise
    return "finished" if code == 0 else "stopped" if code == RESUME_ME else "failed"


def ending(state: str, stopped: bool, code: int | None, status: Mapping[str, Any]) -> tuple[State, str]:
    """What became of a run whose job is over, and why. stopped: whether somebody stopped it."""
    if state == "Completed":
        return "finished", ""
    if state == "Deleted":
        return "cancelled", "its job was deleted"
    if stopped:
        return "cancelled", ""
    if state == "Failed":
        return ("stopped", "saved, and out of restarts") if code == RESUME_ME else ("failed", "")
    if state == "Stopped":
        return "stopped", "Lepton stopped it"
    done, wanted = status.get("succeeded") or 0, status.get("failed") or 0
    if code is None and done and not wanted:
        return "finished", ""
    return after_exit(code, "failed" if wanted else "lost"), "archived by Lepton"
