"""What Slurm's commands complain of: a controller that did not answer, or a refusal and what to change about it."""

from __future__ import annotations

import re

from nemotron_launch.backends.live import Refused
from nemotron_launch.hosts import Result, Unreachable
from nemotron_launch.jobs.run import Run

# What sbatch, squeue and scancel say when the controller did not answer: the request may have been taken or not.
_LOST = re.compile(
    r"Socket timed out|Unable to contact|Zero Bytes were transmitted|[Cc]onnection (refused|failure|reset)"
    r"|Communication connection|Transport endpoint|standby mode|Slurmctld.*not responding|Unexpected message received"
    r"|Insane message length|Header lengths are longer|Connection timed out|Protocol authentication error"
    r"|Invalid authentication credential|Unspecified error|Resource temporarily unavailable|Broken pipe"
)
# Slurm's reason to refuse → what to change.
_KEYS = {
    r"[Ii]nvalid partition|partition not available|not permitted to use this partition": "partition",
    r"Invalid account": "account, or the account's rights on the partition",
    r"Invalid qos": "qos",
    r"node configuration is not available|More processors|[Nn]ode count specification": (
        "nodes, gpus_per_node, cpus_per_task, mem or constraint"
    ),
    r"[Tt]ime limit|[Dd]eadline": "time",
    r"accounting/QOS policy|QOS.*[Ll]imit|AssocMax|AssocGrp": "qos, time, nodes, or how many runs wait already",
    r"reservation": "reservation",
    r"[Ff]eature": "constraint",
    r"[Ii]nvalid node name": "nodelist or exclude",
    r"generic resource|gres|GRES|gpu": "gpus_per_node or gpu_directive",
    r"[Mm]emory": "mem",
    r"[Dd]ependency": "--after",
    r"licenses?": "sbatch_args",
    r"[Uu]nrecognized option|[Ii]nvalid option|[Ii]nvalid.*specification": "sbatch_args",
}


def is_lost(done: Result) -> bool:
    """Whether nobody can say if what was asked for has happened."""
    return 128 < done.code < 165 or done.code == 124 or bool(_LOST.search(done.stderr))


def said(done: Result) -> str:
    """What a command of Slurm complained of, without its own name."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in done.stderr.splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("Try ")), f"exit code {done.code}")


def no_answer(command: str, done: Result) -> Unreachable:
    """The error for a controller that did not answer a command."""
    why = said(done) if done.stderr.strip() else f"{command} ended with {done.code}"
    hint = "what was asked for may have happened; the next command finds out"
    return Unreachable(f"Slurm's controller did not answer: {why}", hint=hint, exit_code=1)


def refused(run: Run, done: Result) -> Refused:
    """The error for a submission that Slurm refused, with its reason and the profile's key to change."""
    why = re.sub(r"^Batch job submission failed: ", "", said(done))
    lines = dict.fromkeys(re.sub(r"^sbatch: (error: )?", "", line).strip() for line in done.stderr.splitlines())
    more = [line for line in lines if line and why not in line and not line.startswith("Try ")]
    text = "\n".join([*more, why])
    key = next((key for pattern, key in _KEYS.items() if re.search(pattern, why)), "")
    key = key or next((key for pattern, key in _KEYS.items() if re.search(pattern, text)), "")
    hint = [*more, f"the profile's {key}" if key and not key.startswith("--") else ""]
    hint.append(f"nothing was submitted; the files are in {run.run_dir}")
    return Refused(f"Slurm refuses the job: {why}", where=key or None, hint="\n".join(filter(None, hint)), exit_code=1)
