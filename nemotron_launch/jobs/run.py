"""A run as the ledger knows it, and the states that it can be in, the same for every executor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nemotron_launch.frozen import field, frozen
from nemotron_launch.job import Executor

# submitting: in the ledger, the answer of the executor not yet known. refused: the executor would not take it, or it
# was never reached. pending: waits in the queue, also between two attempts. stopped: saved and out of restarts, or
# preempted without requeue: resubmit goes on. lost: neither the executor nor the disk knows what became of it.
State = Literal["submitting", "refused", "pending", "running", "finished", "failed", "cancelled", "stopped", "lost"]
LIVE: frozenset[State] = frozenset({"submitting", "pending", "running"})
OVER: frozenset[State] = frozenset({"refused", "finished", "failed", "cancelled", "stopped", "lost"})


@frozen
class Run:
    """A row of the ledger. Times: seconds since 1970; None while they have not come.

    contact: how to reach the executor (a profile's `tunnel`, or Lepton's workspace), never a secret. state_dir: folder
    of claim, logs/attempt-N and exit_code: run_dir, or run_dir/point-N for a point of a sweep. secrets: name → source
    of each, so that a resubmission can write them again. sweep, point: the run that this one is a point of, and its
    number. job_id: Slurm's (with its cluster behind it in `cluster`), Lepton's, or the supervisor's process id here.
    checkpoints: the folder of its step_N folders, if it makes any. pipeline, stage: the file of the pipeline that it is
    a stage of, and the stage's name. artifact: the name that its artifacts get. uses: what it consumes, each as a
    `job.Use`; of plain paths key, type, text and place alone. code: bundle and git revision it was submitted with.
    attempt: restarts seen so far. reason: why it waits, or how it ended, in the executor's words or ours.
    """

    run_id: str
    step: str
    config: str
    config_sha256: str
    profile: str
    executor: Executor
    run_dir: str
    state_dir: str
    workdir: str
    output_dir: str
    nodes: int
    created: float
    contact: Mapping[str, Any] = field(default_factory=dict)
    host: str = ""
    secrets: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    checkpoints: str = ""
    max_restarts: int = 0
    sweep: str = ""
    point: int | None = None
    after: tuple[str, ...] = ()
    pipeline: str = ""
    stage: str = ""
    job_id: str = ""
    cluster: str = ""
    state: State = "submitting"
    reason: str = ""
    exit_code: int | None = None
    attempt: int = 0
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    artifact: str = ""
    uses: tuple[Mapping[str, Any], ...] = ()
    code: Mapping[str, Any] = field(default_factory=dict)
    submitter: str = ""  # host:pid:start of the process that is submitting it, to know whether that one still lives
