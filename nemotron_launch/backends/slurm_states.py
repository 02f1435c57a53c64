"""What Slurm's own commands print, read; and what it means for a run, together with what the run's folder holds.

Pure functions of text, so that outputs recorded from many versions of Slurm can be held against them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping

from nemotron_launch.backends.live import Seen
from nemotron_launch.frozen import field, frozen
from nemotron_launch.jobs.run import State
from nemotron_launch.trainer.exit_codes import CLAIMED, RESUME_ME

FALLEN = "the run before it did not finish"
SILENT = 900.0  # seconds without a word in its folder after which a run that Slurm has forgotten counts as lost

UNSEEN = (
    "its node could not open the job's log: remote_job_dir is not seen from there, and must be on a file system that "
    "all nodes share"
)

# squeue --Format: fields with their widths; the comment last, which may hold anything.
SQUEUE = (
    ("JobArrayID", 24), ("State", 14), ("RestartCnt", 6), ("exit_code", 8), ("StartTime", 20), ("EndTime", 20),
    ("SubmitTime", 20), ("Name", 128), ("Reason", 48), ("NodeList", 240), ("Comment", 400),
)  # fmt: skip
SQUEUE_FORMAT = ",".join(f"{name}:{width}" for name, width in SQUEUE)
SACCT_FORMAT = "JobID,State,ExitCode,Start,End,Submit,NodeList,Reason,JobName,Comment"  # Restarts came with 23.11

_WAITS = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
    "POWER_UP_NODE",
}  # fmt: skip
_ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
# Ends that are not the run's doing: with restarts left, another job goes on with it.
_FATE = {"PREEMPTED": "preempted", "NODE_FAIL": "a node failed", "BOOT_FAIL": "a node did not boot"}
_SHORT = {
    "BF": "BOOT_FAIL", "CA": "CANCELLED", "CD": "COMPLETED", "CF": "CONFIGURING", "CG": "COMPLETING", "DL": "DEADLINE",
    "F": "FAILED", "LF": "LAUNCH_FAILED", "NF": "NODE_FAIL", "OOM": "OUT_OF_MEMORY", "PD": "PENDING", "PR": "PREEMPTED",
    "R": "RUNNING", "RD": "RESV_DEL_HOLD", "RF": "REQUEUE_FED", "RH": "REQUEUE_HOLD", "RQ": "REQUEUED",
    "RS": "RESIZING", "RV": "REVOKED", "SI": "SIGNALING", "SE": "SPECIAL_EXIT", "SO": "STAGE_OUT", "ST": "STOPPED",
    "S": "SUSPENDED", "TO": "TIMEOUT",
}  # fmt: skip
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
_RESTART = re.compile(r"(?:^|\s)restart:(\d+)\s+nemotron:")


@frozen
class Record:
    """A job as Slurm tells it. job_id: "123" or "123_4". state: in full, without additions; by: who cancelled it.

    Times: seconds since 1970. code, signal: of a job that ended. started of a job that waits: when Slurm expects it to.
    restarts: None where the command does not tell.
    """

    job_id: str
    state: str
    by: str = ""
    restarts: int | None = None
    code: int = 0
    signal: int = 0
    started: float | None = None
    ended: float | None = None
    submitted: float | None = None
    name: str = ""
    reason: str = ""
    nodes: tuple[str, ...] = ()
    comment: str = ""

    @property
    def waits(self) -> bool:
        return self.state in _WAITS

    @property
    def over(self) -> bool:
        return self.state in _ENDED

    @property
    def turned_away(self) -> bool:
        """Whether sbatch was refused, which may leave a failed job that never had a node."""
        return self.state == "FAILED" and not self.nodes and self.reason not in ("", "None", "NonZeroExitCode")


@frozen
class Folder:
    """What a run's folder says. claims: "" or the job succeeded → the job that took its place. exit_code: of the run.

    successor: (job that wants one, its successor's id or empty, restarts, why). past: jobs of earlier submissions.
    cancelled: whether a client cancelled the run. reason: why the script ended it. quiet: seconds since its last word.
    submitted: sbatch's answer, "123" or "123;cluster". busy: whether an sbatch for it is still under way.
    """

    exists: bool = False
    claims: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    cancelled: bool = False
    reason: str = ""
    successor: tuple[str, str, int, str] | None = None
    past: tuple[str, ...] = ()
    attempts: int = 0
    quiet: float | None = None
    submitted: str = ""
    busy: bool = False

    @property
    def holder(self) -> str:
        """The job that works on the run, or did last: each successor has taken the place of the one before."""
        holder, seen = self.claims.get("", ""), set[str]()
        while holder in self.claims and holder not in seen:
            seen.add(holder)
            holder = self.claims[holder]
        return holder

    @property
    def heir(self) -> str:
        """The job that was submitted to go on after the last one, and has not begun; empty where there is none."""
        return self.successor[1] if self.successor and self.successor[0] == self.holder else ""

    @property
    def wants_heir(self) -> bool:
        return bool(self.successor) and self.successor[0] == self.holder and not self.heir  # type: ignore[index]


def squeue(text: str) -> list[Record]:
    """The lines of `squeue --noheader --array --Format=<SQUEUE_FORMAT>` with SLURM_TIME_FORMAT=%s."""
    records = []
    for line in text.splitlines():
        # Slurm counts bytes; what is beyond ASCII is in the last field only.
        raw, values = line.encode("utf-8", "surrogateescape"), {}
        for name, width in SQUEUE:
            values[name], raw = raw[:width].decode("utf-8", "replace").strip(), raw[width:]
        if not re.fullmatch(r"\d+(_(\d+|\[.*\]))?(\+\d+)?", values["JobArrayID"]) or not values["State"]:
            continue  # a banner, or the "CLUSTER: name" of a federation
        code, signal = _exit_code(values["exit_code"])
        state, by = _state(values["State"])
        records += [
            Record(
                job_id,
                state,
                by,
                _count(values["RestartCnt"]),
                code,
                signal,
                _time(values["StartTime"]),
                _time(values["EndTime"]),
                _time(values["SubmitTime"]),
                values["Name"],
                _none(values["Reason"]),
                tuple(nodes(values["NodeList"])),
                _none(values["Comment"]),
            )
            for job_id in job_ids(values["JobArrayID"])
        ]
    return records


def scontrol(text: str) -> list[Record]:
    """The lines of `scontrol show job --oneliner`."""
    records = []
    for line in text.splitlines():
        if not line.lstrip().startswith("JobId="):
            continue
        pairs = re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", line.strip())
        values = {key: value.strip() for key, value in reversed(pairs)}  # what a comment holds comes too late
        comment = re.search(r" Comment=(.*?) +(?:StdErr|StdIn|StdOut|Power)=", line)
        job_id = values["JobId"].partition(" ")[0]
        if "ArrayJobId" in values and "ArrayTaskId" in values:
            job_id = f"{values['ArrayJobId']}_{values['ArrayTaskId']}"
        code, signal = _exit_code(values.get("ExitCode", ""))
        state, by = _state(values.get("JobState", ""))
        records += [
            Record(
                each,
                state,
                by,
                _count(values.get("Restarts", "")),
                code,
                signal,
                _time(values.get("StartTime", "")),
                _time(values.get("EndTime", "")),
                _time(values.get("SubmitTime", "")),
                values.get("JobName", ""),
                _none(values.get("Reason", "").partition(" ")[0]),
                tuple(nodes(values.get("NodeList", ""))),
                _none(comment.group(1).strip() if comment else values.get("Comment", "")),
            )
            for each in job_ids(job_id if "[" in job_id or "_" not in job_id else _bracketed(job_id))
        ]
    return records


def sacct(text: str) -> list[Record]:
    """The lines of `sacct --allocations --parsable2` with its header, which names the columns that this one has."""
    rows = [line.split("|") for line in text.splitlines() if "|" in line]
    heads = next((n for n, row in enumerate(rows) if row[0] == "JobID"), None)
    if heads is None:
        return []
    names, records = rows[heads], []
    for row in rows[heads + 1 :]:
        values = dict(zip(names, row, strict=False))
        # Steps (123.batch) belong to their job; of a job that was requeued the last row counts.
        if not re.fullmatch(r"\d+(_(\d+|\[.*\]))?(\+\d+)?", row[0]) or not values.get("State"):
            continue
        code, signal = _exit_code(values.get("ExitCode", ""))
        state, by = _state(values["State"])
        records += [
            Record(
                job_id,
                state,
                by,
                _count(values.get("Restarts", "")),
                code,
                signal,
                _time(values.get("Start", "")),
                _time(values.get("End", "")),
                _time(values.get("Submit", "")),
                values.get("JobName", ""),
                _none(values.get("Reason", "")),
                tuple(nodes(values.get("NodeList", ""))),
                "|".join([values.get("Comment", ""), *row[len(names) :]]).rstrip("|"),
            )
            for job_id in job_ids(row[0])
        ]
    return records


def folders(text: str) -> dict[str, Folder]:
    """What FOLDERS in slurm_scripts prints: for each folder `@@<path>`, then a line for each thing in it."""
    found: dict[str, Folder] = {}
    for part in re.split(r"^@@", text, flags=re.MULTILINE)[1:]:
        path, *lines = part.splitlines()
        claims: dict[str, str] = {}
        values: dict[str, str] = {}
        past: list[str] = []
        for line in lines:
            key, _, value = line.partition(" ")
            if key.startswith("claim:"):
                claims[key.removeprefix("claim:")] = value.partition(" ")[0]
            elif key == "past":
                past += value.split()
            else:
                values[key] = value
        wish = values.get("successor", "").split(maxsplit=3)
        code = values.get("exit_code", "").strip()
        quiet = values.get("quiet", "")
        found[path] = Folder(
            "there" in values,
            claims,
            int(code) if code.isdigit() else None,
            "cancelled" in values,
            values.get("reason", ""),
            (wish[0], wish[1].strip("-"), int(wish[2]), (wish[3:] or [""])[0]) if len(wish) >= 3 else None,
            tuple(past),
            int(values.get("attempts") or 0),
            float(quiet) if re.fullmatch(r"-?\d+", quiet) else None,
            values.get("submitted", "").strip(),
            "busy" in values,
        )
    return found


def restarts_before(comment: str) -> int:
    """How often the run had been restarted before this job, a successor, was submitted; it carries this with it."""
    found = _RESTART.search(comment)
    return int(found.group(1)) if found else 0


def waiting_reason(reason: str) -> str:
    """Slurm's reason for a wait in plain words, its own behind them."""
    word = reason.strip("()").partition(",")[0]
    plain = _PLAIN.get(word)
    return f"{plain} ({reason})" if plain else reason


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


def job_ids(text: str) -> Iterator[str]:
    """123 → 123; 123_4 → 123_4; 123_[0-2,7%4] → 123_0, 123_1, 123_2, 123_7. A list that Slurm cut short ends there."""
    job, sign, tasks = text.partition("_")
    if not sign:
        yield job.partition("+")[0]
    elif not tasks.startswith("["):
        yield text
    else:
        for part in tasks.strip("[]").partition("%")[0].split(","):
            found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
            if found:
                first, last, step = found.groups()
                yield from (f"{job}_{n}" for n in range(int(first), int(last or first) + 1, int(step or 1)))


def nodes(text: str) -> Iterator[str]:
    """node[1-3,07],gpu-a → node1, node2, node3, node07, gpu-a; as `scontrol show hostnames` has it."""
    if text in ("", "(null)", "None assigned", "None", "N/A"):
        return
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text):
        yield from _spread(name)


def _spread(name: str) -> Iterator[str]:
    head, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    inside, closed, tail = rest.partition("]")
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            continue  # cut short
        for n in range(int(first), int(last or first) + 1):
            for end in _spread(tail) if closed and tail else ("",):
                yield f"{head}{n:0{len(first)}d}{end}"


def _bracketed(job_id: str) -> str:
    job, _, tasks = job_id.partition("_")
    return job_id if tasks.isdigit() else f"{job}_[{tasks}]"


def _state(text: str) -> tuple[str, str]:
    """("CANCELLED", "1000") of "CANCELLED by 1000"; "CANCELLED+" and short forms are known too."""
    found = re.fullmatch(r"([A-Z_]+)\+?(?: by (.*))?", text.strip())
    if not found:
        return text.strip().upper() or "UNKNOWN", ""
    return _SHORT.get(found.group(1), found.group(1)), (found.group(2) or "").strip()


def _exit_code(text: str) -> tuple[int, int]:
    """(code, signal) of "7:0", or of the number that waitpid gives, as squeue prints it."""
    found = re.match(r"(\d+)(?::(\d+))?", text)
    if not found:
        return 0, 0
    if found.group(2) is not None:
        return int(found.group(1)), int(found.group(2))
    status = int(found.group(1))
    return (status >> 8) & 255, status & 127


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _time(text: str) -> float | None:
    """Seconds since 1970 of "1795243852", which SLURM_TIME_FORMAT=%s asks for, or of a date without a zone."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text) or None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # N/A, Unknown, None


def _none(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A") else text


def newest(records: Iterable[Record]) -> Record | None:
    """Of several jobs with one name the one that is not over, else the last one."""
    return max(records, key=lambda record: (not record.over, record.submitted or 0.0), default=None)
