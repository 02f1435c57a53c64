"""What a job of Slurm and its folder mean for a run: one of a run's states, and why, in plain words."""

from __future__ import annotations

from nemotron_launch.backends.live import Seen
from nemotron_launch.backends.slurm_output import Folder, Record, restarts_before
from nemotron_launch.jobs.run import State
from nemotron_launch.trainer.exit_codes import CLAIMED, RESUME_ME

FALLEN = "the run before it did not finish"
SILENT = 900.0  # seconds without a word in its folder after which a run that Slurm has forgotten counts as lost

UNSEEN = (
    "its node could not open the job's log: remote_job_dir is not seen from there, and must be on a file system that "
    "all nodes share"
)

# Ends that are not the run's doing: with restarts left, another job goes on with it.
_FATE = {"PREEMPTED": "preempted", "NODE_FAIL": "a node failed", "BOOT_FAIL": "a node did not boot"}

_PLAIN = {
    "Priority": "jobs of higher priority are first",
    "Resources": "no free nodes",
    "Dependency": "another run, or the import of its image, comes first",
    "DependencyNeverSatisfied": FALLEN,
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "its time has not come",
    "ReqNodeNotAvail": "nodes that it asks for are down or reserved",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "PartitionNodeLimit": "asks for more nodes than the partition gives",
    "Reservation": "the reservation has not begun",
    "JobArrayTaskLimit": "as many points as allowed are at work",
    "AssocGrpGRES": "the account's GPUs are all in use",
    "QOSMaxJobsPerUserLimit": "you have as many jobs as the QOS allows",
    "QOSMaxGRESPerUser": "you have as many GPUs as the QOS allows",
    "QOSGrpGRES": "the QOS's GPUs are all in use",
    "Licenses": "no licence is free",
    "NodeDown": "a node is down",
    "BadConstraints": "no node is as it asks",
    "launch failed requeued held": "could not be started and is held; scontrol release tries again",
    "job requeued in held state": "requeued and held; scontrol release lets it go",
}


def judge(record: Record | None, folder: Folder, *, restarts_left: bool = False) -> Seen | None:
    """How a run is, from its job and its folder; None where neither knows of it.

    A job that has ended but not for good (preempted, its node gone) leaves its run waiting for a successor.
    """
    if record and record.waits:
        return _seen("pending", record, folder, waiting_reason(record.reason), expected_start=record.started)
    if record and not record.over:
        reason = "" if record.state == "RUNNING" else f"Slurm says {record.state}"
        return _seen("running", record, folder, reason)
    if record and record.state == "REVOKED" and folder.exit_code is None:
        return _seen("running", record, folder, "runs on another cluster of the federation")
    own_end = folder.exit_code == 0 or (
        record and record.state in ("COMPLETED", "FAILED") and record.code not in (RESUME_ME, CLAIMED)
    )
    if (folder.cancelled and not own_end) or (record and record.state == "CANCELLED" and folder.exit_code != 0):
        return _seen("cancelled", record, folder, _cancelled(record), exit_code=folder.exit_code)
    if (folder.wants_heir or (record and record.state in _FATE and folder.exit_code is None)) and restarts_left:
        why = folder.successor[3] if folder.wants_heir and folder.successor else ""
        why = why or _FATE.get(record.state if record else "", "")
        return _seen("pending", record, folder, f"{why}; to be submitted again", wants_successor=True)
    if record and record.over:
        return _ended(record, folder)
    if folder.exit_code is not None:
        state, reason = _verdict(folder.exit_code, folder.reason)
        return _seen(state, None, folder, reason, exit_code=folder.exit_code)
    if folder.holder and folder.quiet is not None and folder.quiet < SILENT:
        return _seen("running", None, folder, "Slurm has forgotten its job, its folder shows it at work")
    if folder.holder:
        return _seen("lost", None, folder, "Slurm has forgotten its job, and its folder holds no end")
    return None


def _ended(record: Record, folder: Folder) -> Seen:
    """Of a job that is over for good. Its own exit code file is nearer to the truth than Slurm's state."""
    code = folder.exit_code
    if record.state == "FAILED" and record.reason in ("JobLaunchFailure", "RaisedSignal:53") and not folder.attempts:
        return _seen("failed", record, folder, UNSEEN)
    if code is None and record.state in ("COMPLETED", "FAILED"):
        code = 128 + record.signal if record.signal else record.code
    if record.state == "COMPLETED" or code == 0 or (code is not None and record.state == "FAILED"):
        state, reason = _verdict(code or 0, folder.reason)
    elif code == RESUME_ME:
        state, reason = _verdict(code, folder.reason)
    elif record.state == "PREEMPTED":
        state, reason = "stopped", "preempted; resubmit goes on from the last checkpoint"
    else:
        said = record.state.lower().replace("_", " ")
        words = {
            "TIMEOUT": "out of time",
            "OUT_OF_MEMORY": "out of memory",
            "NODE_FAIL": "a node failed",
            "DEADLINE": "could not end before its deadline",
        }
        state, reason = "failed", folder.reason or words.get(record.state, f"Slurm says {said}")
        if record.reason and record.state not in words:
            reason += f" ({record.reason})"
    return _seen(state, record, folder, reason, exit_code=code)


def _verdict(code: int, reason: str) -> tuple[State, str]:
    if code == 0:
        return "finished", reason
    if code == RESUME_ME:
        return "stopped", reason or "saved, and no restart is left; resubmit goes on"
    return "failed", reason or f"exit code {code}" + (f", signal {code - 128}" if code > 128 else "")


def _cancelled(record: Record | None) -> str:
    if record and record.reason == "DependencyNeverSatisfied":
        return FALLEN
    return f"by user {record.by}" if record and record.by else ""


def _seen(
    state: State,
    record: Record | None,
    folder: Folder,
    reason: str,
    *,
    exit_code: int | None = None,
    expected_start: float | None = None,
    wants_successor: bool = False,
) -> Seen:
    tried = max(0, folder.attempts - 1)
    if record is None:
        return Seen(state, reason, exit_code, tried, wants_successor=wants_successor)
    waits = state == "pending"
    return Seen(
        state,
        reason,
        exit_code,
        restarts_before(record.comment) + record.restarts if record.restarts is not None else tried,
        () if waits else record.nodes,
        None if waits else record.started,
        record.ended if record.over and not waits else None,
        expected_start,
        record.job_id,
        wants_successor,
    )


def waiting_reason(reason: str) -> str:
    """Slurm's reason for a wait in plain words, its own behind them."""
    word = reason.strip("()").partition(",")[0]
    plain = _PLAIN.get(word)
    return f"{plain} ({reason})" if plain else reason
