"""What Slurm's own commands print, read, and what a run's folder says.

Pure functions of text, so that outputs recorded from many versions of Slurm can be held against them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nemotron_launch.frozen import field, frozen

# squeue --Format: fields with their widths; the comment last, which may hold anything.
SQUEUE = (
    ("JobArrayID", 24), ("State", 14), ("RestartCnt", 6), ("exit_code", 8), ("StartTime", 20), ("EndTime", 20),
    ("SubmitTime", 20), ("Name", 128), ("Reason", 48), ("NodeList", 240), ("Comment", 400),
)  # fmt: skip

SQUEUE_FORMAT = ",".join(f"{name}:{width}" for name, width in SQUEUE)

SACCT_FORMAT = "JobID,State,ExitCode,Start,End,Submit,NodeList,Reason,JobName,Comment"  # Restarts came with 23.11

# What they call a job's state, restarts, exit code, start, end, submission, name, reason, nodes and comment.
_SQUEUE_CALLS = (
    "State", "RestartCnt", "exit_code", "StartTime", "EndTime", "SubmitTime", "Name", "Reason", "NodeList", "Comment",
)  # fmt: skip
_SCONTROL_CALLS = (
    "JobState", "Restarts", "ExitCode", "StartTime", "EndTime", "SubmitTime", "JobName", "Reason", "NodeList",
    "Comment",
)  # fmt: skip
_SACCT_CALLS = (
    "State", "Restarts", "ExitCode", "Start", "End", "Submit", "JobName", "Reason", "NodeList", "Comment",
)  # fmt: skip

_WAITS = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
    "POWER_UP_NODE",
}  # fmt: skip

_ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip

_SHORT = {
    "BF": "BOOT_FAIL", "CA": "CANCELLED", "CD": "COMPLETED", "CF": "CONFIGURING", "CG": "COMPLETING", "DL": "DEADLINE",
    "F": "FAILED", "LF": "LAUNCH_FAILED", "NF": "NODE_FAIL", "OOM": "OUT_OF_MEMORY", "PD": "PENDING", "PR": "PREEMPTED",
    "R": "RUNNING", "RD": "RESV_DEL_HOLD", "RF": "REQUEUE_FED", "RH": "REQUEUE_HOLD", "RQ": "REQUEUED",
    "RS": "RESIZING", "RV": "REVOKED", "SI": "SIGNALING", "SE": "SPECIAL_EXIT", "SO": "STAGE_OUT", "ST": "STOPPED",
    "S": "SUSPENDED", "TO": "TIMEOUT",
}  # fmt: skip

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
        # A job whose nodes never came up has made no claim; its successor has made the first.
        first = next((job for job in self.claims if job not in self.claims.values()), "")
        holder, seen = self.claims.get("") or first or (self.successor[0] if self.successor else ""), set[str]()
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
    for line in text.split("\n"):
        # Slurm counts bytes; what is beyond ASCII is in the last field only.
        raw, values = line.encode("utf-8", "surrogateescape"), {}
        for name, width in SQUEUE:
            values[name], raw = raw[:width].decode("utf-8", "replace").strip(), raw[width:]
        if not re.fullmatch(r"\d+(_(\d+|\[.*\]))?(\+\d+)?", values["JobArrayID"]) or not values["State"]:
            continue  # a banner, or the "CLUSTER: name" of a federation
        records += _records(job_ids(values["JobArrayID"]), values, _SQUEUE_CALLS)
    return records


def scontrol(text: str) -> list[Record]:
    """The lines of `scontrol show job --oneliner`."""
    records = []
    for line in text.split("\n"):
        if not line.lstrip().startswith("JobId="):
            continue
        pairs = re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", line.strip())
        values = {key: value.strip() for key, value in reversed(pairs)}  # what a comment holds comes too late
        comment = re.search(r" Comment=(.*?) +(?:StdErr|StdIn|StdOut|Power)=", line)
        job_id = values["JobId"].partition(" ")[0]
        if "ArrayJobId" in values and "ArrayTaskId" in values:
            job_id = f"{values['ArrayJobId']}_{values['ArrayTaskId']}"
        values["Reason"] = values.get("Reason", "").partition(" ")[0]
        if comment:
            values["Comment"] = comment.group(1).strip()
        several = job_id if "[" in job_id or "_" not in job_id else _bracketed(job_id)
        records += _records(job_ids(several), values, _SCONTROL_CALLS)
    return records


def sacct(text: str) -> list[Record]:
    """The lines of `sacct --allocations --parsable2` with its header, which names the columns that this one has."""
    rows = [line.split("|") for line in text.split("\n") if "|" in line]
    heads = next((n for n, row in enumerate(rows) if row[0] == "JobID"), None)
    if heads is None:
        return []
    names, records = rows[heads], []
    for row in rows[heads + 1 :]:
        values = dict(zip(names, row, strict=False))
        # Steps (123.batch) belong to their job; of a job that was requeued the last row counts.
        if not re.fullmatch(r"\d+(_(\d+|\[.*\]))?(\+\d+)?", row[0]) or not values.get("State"):
            continue
        values["Comment"] = "|".join([values.get("Comment", ""), *row[len(names) :]]).rstrip("|")
        records += _records(job_ids(row[0]), values, _SACCT_CALLS)
    return records


def _records(ids: Iterable[str], values: Mapping[str, str], calls: Sequence[str]) -> list[Record]:
    """A record for each of the jobs that a line tells of. calls: what the command calls its parts."""
    state, restarts, exit_code, started, ended, submitted, name, reason, where, comment = (
        values.get(each, "") for each in calls
    )
    code, signal = _exit_code(exit_code)
    full, by = _state(state)
    return [
        Record(
            job_id,
            full,
            by,
            _count(restarts),
            code,
            signal,
            _time(started),
            _time(ended),
            _time(submitted),
            name,
            _none(reason),
            tuple(nodes(where)),
            _none(comment),
        )
        for job_id in ids
    ]


def folders(text: str) -> dict[str, Folder]:
    """What FOLDERS in slurm_scripts prints: for each folder `@@<path>`, then a line for each thing in it."""
    found: dict[str, Folder] = {}
    for part in re.split(r"^@@", text, flags=re.MULTILINE)[1:]:
        path, *lines = part.split("\n")
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
        count = _count(wish[2]) if len(wish) >= 3 else None
        quiet = values.get("quiet", "")
        found[path] = Folder(
            "there" in values,
            claims,
            _count(values.get("exit_code", "").strip()),
            "cancelled" in values,
            values.get("reason", ""),
            (wish[0], wish[1].strip("-"), count, (wish[3:] or [""])[0]) if count is not None else None,
            tuple(past),
            _count(values.get("attempts", "")) or 0,
            float(quiet) if re.fullmatch(r"-?[0-9]{1,15}", quiet) else None,
            values.get("submitted", "").strip(),
            "busy" in values,
        )
    return found


def restarts_before(comment: str) -> int:
    """How often the run had been restarted before this job, a successor, was submitted; it carries this with it."""
    found = _RESTART.search(comment)
    return int(found.group(1)) if found else 0


def newest(records: Iterable[Record]) -> Record | None:
    """Of several jobs with one name the one that is not over, else the last one."""
    return max(records, key=lambda record: (not record.over, record.submitted or 0.0), default=None)


def job_ids(text: str) -> Iterator[str]:
    """123 → 123; 123_4 → 123_4; 123_[0-2,7%4] → 123_0, 123_1, 123_2, 123_7. A list that Slurm cut short ends there."""
    job, sign, tasks = text.partition("_")
    if not sign:
        yield job.partition("+")[0]
    elif not tasks.startswith("["):
        yield text
    else:
        for part in tasks.strip("[]").partition("%")[0].split(","):
            found = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7})(?::([0-9]{1,7}))?)?", part.strip())
            if found:
                first, last, step = found.groups()
                yield from (f"{job}_{n}" for n in range(int(first), int(last or first) + 1, int(step or 1) or 1))


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
        if _count(first) is None or (dash and _count(last) is None):
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


def _time(text: str) -> float | None:
    """Seconds since 1970 of "1795243852", which SLURM_TIME_FORMAT=%s asks for, or of a date without a zone."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text) or None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # N/A, Unknown, None


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _none(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A") else text
