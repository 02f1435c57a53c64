"""The options of sbatch and srun that a job and its profile ask for, quoted as the script has them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.job import Job
from nemotron_launch.quoting import sbatch, sh

_SIGNALS = ("USR1", "TERM")
# What the script itself relies on, or what has a key of its own in a profile.
_OWN_OPTIONS = {
    "job-name": "run_id", "J": "run_id", "output": "", "o": "", "error": "", "e": "", "open-mode": "", "wrap": "",
    "parsable": "", "array": "", "a": "", "export": "env", "ntasks": "", "n": "", "ntasks-per-node": "",
    "nodes": "nodes", "N": "nodes", "chdir": "remote_job_dir", "D": "remote_job_dir", "account": "account",
    "A": "account", "partition": "partition", "p": "partition", "qos": "qos", "q": "qos", "time": "time", "t": "time",
    "signal": "signal", "requeue": "requeue", "no-requeue": "requeue", "comment": "comment", "mail-user": "mail",
    "mail-type": "mail", "mem": "mem", "cpus-per-task": "cpus_per_task", "c": "cpus_per_task", "wait": "", "W": "",
}  # fmt: skip


def sbatch_options(job: Job) -> tuple[str, ...]:
    """The options of sbatch without their `#SBATCH`, always in the same order, as sbatch's own parser reads them."""
    options = job.options
    found: list[str] = []

    def give(option: str, value: Any, key: str = "") -> None:
        if value is not None and value != "" and value != () and value != []:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found.append(f"--{option}={sbatch(text, key or option.replace('-', '_'))}")

    give("job-name", job.run_id)
    if job.points:
        found.append(f"--array=0-{len(job.points) - 1}" + (f"%{job.max_parallel}" if job.max_parallel else ""))
    for option in ("account", "partition", "qos", "reservation", "constraint", "nodelist", "exclude"):
        give(option, options.get(option))
    give("nodes", job.nodes + sum(service.nodes for service in job.services))
    give("ntasks-per-node", 1)
    gpus, directive = _gpus_per_node(job), options.get("gpu_directive", "gpus-per-node")
    if gpus and directive != "none":
        give(directive, f"gpu:{gpus}" if directive == "gres" else gpus)
    give("cpus-per-task", options.get("cpus_per_task"))
    give("mem", options.get("mem"))
    if options.get("exclusive"):
        found.append("--exclusive")
    give("time", options.get("time"))
    give("signal", _signal(options.get("signal", "USR1@300")), "signal")
    # Slurm's own requeue, after a node's failure or a preemption, is a restart like ours. Where it may not, another job
    # goes on instead.
    found.append("--requeue" if job.restart.max_restarts and options.get("requeue", True) else "--no-requeue")
    give("network", options.get("network"))
    give("segment", options.get("segment"))
    mail = options.get("mail") or {}
    give("mail-user", mail.get("user"), "mail.user")
    give("mail-type", mail.get("type"), "mail.type")
    give("comment", " ".join(filter(None, [str(options.get("comment") or ""), f"nemotron:{job.run_id}"])))
    give("chdir", job.workdir, "remote_job_dir")
    give("open-mode", "append")
    # %A_%a: of an array, its number and the point's.
    own = "slurm-%A_%a.out" if job.points else "slurm-%j.out"
    give("output", posixpath.join(job.run_dir, own), "remote_job_dir")
    return (*found, *_more("sbatch_args", options.get("sbatch_args") or (), sbatch))


def _signal(value: str | None) -> str | None:
    """To the batch script, which passes it on: B:USR1@300."""
    if not value:
        return None
    found = re.fullmatch(r"(?:SIG)?([A-Z0-9]+)@(\d+)", value)
    if not found or found.group(1) not in _SIGNALS:
        hint = "USR1@300: USR1 or TERM, and how many seconds before the time limit"
        raise UserError(f"the trainer does not listen to {value!r}", where="signal", hint=hint)
    return f"B:{found.group(1)}@{found.group(2)}"


def _more(key: str, arguments: Iterable[str], quote: Any) -> list[str]:
    """A profile's further options, one an entry: `--licenses=x`, or `-L x` (the value quoted where it needs it)."""
    quoted = []
    for n, argument in enumerate(arguments):
        where = f"{key}[{n}]"
        found = re.fullmatch(r"--([a-z0-9-]+)(?:(=)(.*))?|-([A-Za-z])(?:()\s*(.+))?", argument, re.DOTALL)
        if not found:
            raise UserError(f"{argument!r} is no option", where=where, hint="one an entry, with = before its value")
        option, sign, value = found.group(1) or found.group(4), found.group(2) or "", found.group(3) or found.group(6)
        if key == "sbatch_args" and option in _OWN_OPTIONS:
            own = _OWN_OPTIONS[option]
            hint = f"use the profile's key {own}" if own else "the script relies on its own"
            raise UserError(f"{'--' if found.group(1) else '-'}{option} cannot be set here", where=where, hint=hint)
        start = f"--{option}{sign}" if found.group(1) else f"-{option}"
        quoted.append(start + (quote(value, where) if value is not None else ""))
    return quoted


def srun_args(job: Job) -> list[str]:
    """A profile's further options of srun."""
    return _more("srun_args", job.options.get("srun_args") or (), word)


def _gpus_per_node(job: Job) -> int:
    """Every node of an allocation is alike: as many GPUs as the one that needs most, the trainer's or a service's."""
    return max([job.gpus_per_node, *(service.gpus for service in job.services if service.nodes)])


def word(value: object, key: str = "") -> str:
    """A word of a script that sbatch is given: it takes none with the line ends of DOS."""
    return check_line_ends(sh(value, key), key)


def check_line_ends(text: str, where: str) -> str:
    if "\r\n" in text:
        raise UserError("sbatch takes no script with a carriage return before a line's end", where=where)
    return text
