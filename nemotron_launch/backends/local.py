"""Runs a job on this machine, in the foreground: signals go through to it, its exit code comes back."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nemotron_launch.backends import local_folder
from nemotron_launch.backends.live import Seen
from nemotron_launch.catalog import Step
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.inputs import check_inputs, stages
from nemotron_launch.job import File, Job
from nemotron_launch.plan import compose_for
from nemotron_launch.resources import display

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile
    from nemotron_launch.render import Rendered

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_TRAINER = {"torch": "torch", "megatron": "megatron-core"}


def run_stages(
    step: Step,
    config: Path,
    overrides: Sequence[str],
    passthrough: Sequence[str],
    profile: Profile | None = None,
    *,
    run_id: str | None = None,
) -> int:
    """Run a step here, first the steps that make what it lacks; the exit code of the last one that ran."""
    from nemotron_launch.jobs.attached import recorded

    composed = compose_for(step, config, overrides, profile)
    planned = stages(step, composed, profile, passthrough, run_id=run_id)
    for stage in planned:
        check_machine(stage.job)
    for stage in planned:
        if stage.why:
            _say(stage.why)
        elif len(planned) > 1:
            check_inputs(step, composed)
            _say(f"now {stage.job.step} -c {stage.job.config}")
        with recorded(stage.job, () if stage.why else overrides) as ended:
            code = run_job(stage.job, ended)
        if code and stage is not planned[-1]:
            _say(f"{stage.job.step} -c {stage.job.config} ended with exit code {code}: {step.id} was not started")
        if code:
            return code
    return 0


def _say(line: str) -> None:
    print(f"nemotron: {line}", file=sys.stderr, flush=True)


def render_job(job: Job) -> Rendered:
    """The files of a job on this machine: the script that does what run_job does."""
    from nemotron_launch.backends import local_script

    return local_script.render_job(job)


def run_job(job: Job, ended: Callable[[Seen], None] = lambda seen: None) -> int:
    """Place the job's files, run its command to the end, return its exit code (128 + n for signal n).

    ended: told how it was. The run's folder says so too, as that of a run in the background does.
    """
    check_machine(job)
    _check_secrets(job)
    command: Sequence[str] = job.command
    if job.setup or job.services or job.template or job.secrets:
        rendered = render_job(job)  # more than a command: the script that a dry run shows
        place_files(job, rendered.files)
        command = ("bash", os.path.join(job.run_dir, rendered.main))
    else:
        place_files(job, job.files)
    folder = Path(job.run_dir)
    seen = Seen("running", nodes=(os.uname().nodename,), started=time.time())
    with suppress(OSError):  # for `nemotron jobs`, not for the run
        local_folder.claim(folder)
        local_folder.note(folder, seen)
    with _signals_held() as held:
        child = subprocess.Popen(
            command,
            env={**os.environ, **job.env},
            stdin=subprocess.DEVNULL,
            # Its own group: a Ctrl-C reaches only us, and we pass it on once, instead of twice by two ways.
            process_group=0,
            preexec_fn=_die_with_parent(os.getpid()),
        )
        held.forward_to(child)
        code = child.wait()
    code = code if code >= 0 else 128 - code
    seen = replace(
        seen,
        **local_folder.verdict(folder, code, "saved; the same command resumes it"),
        exit_code=code,
        ended=time.time(),
    )
    with suppress(OSError):
        local_folder.note(folder, seen)
    ended(seen)
    return code


def check_machine(job: Job) -> None:
    """Raise where this machine cannot run the job: several nodes, or no trainer installed."""
    if job.nodes > 1:
        raise UserError(
            f"cluster.num_nodes={job.nodes}, but this machine is one node",
            hint="set cluster.num_nodes=1; processes of one node are cluster.procs_per_node or cluster.gpus_per_node",
        )
    absent = [package for module, package in _TRAINER.items() if find_spec(module) is None]
    if absent and "nemotron_launch.trainer.spawn" in job.command and job.container.python == sys.executable:
        raise UserError(
            f"{job.step} trains in this Python, which lacks {' and '.join(absent)}",
            hint="install the trainer:  pip install 'nemotron-launch[train]'   (with uv:  uv sync --extra train)",
            exit_code=1,
        )


def _check_secrets(job: Job) -> None:
    for secret in job.secrets:
        source = secret.source or secret.name
        if not secret.optional and source not in os.environ:
            hint = f"export {source}=…"
            raise UserError(f"the secret {secret.name} is not set: there is no {source} in the environment", hint=hint)


def place_files(job: Job, files: Sequence[File]) -> None:
    """Write files into the job's folder, readable by nobody else: a config may name what is private."""
    run_dir = Path(job.run_dir)
    try:
        run_dir.mkdir(parents=True, mode=0o700)
        keep_from_git(run_dir)
        for file in files:
            path = run_dir / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(file.text, encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot be written: {reason}", where=display(Path(error.filename or run_dir))) from None


def keep_from_git(run_dir: Path) -> None:
    """Runs in a checkout's own folder for them are no part of it."""
    for home in run_dir.parents[:3]:  # of a run, or of a point of a sweep
        if home.name == ".nemotron" and not (home / ".gitignore").exists():
            home.mkdir(parents=True, exist_ok=True)
            (home / ".gitignore").write_text("*\n")


class _Held:
    """Signals that arrive before there is a child are kept and sent to it then."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.waiting: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.child is None:
            self.waiting.append(number)
        else:
            with suppress(ProcessLookupError):
                self.child.send_signal(number)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        for number in self.waiting:
            self(number, None)


@contextmanager
def _signals_held() -> Iterator[_Held]:
    held = _Held()
    before = {number: signal.getsignal(number) for number in _FORWARDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, held)
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent(parent: int) -> Callable[[], None]:
    """A killed launcher takes its run with it: else a second start would find the first still writing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def in_child() -> None:
        if prctl:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    return in_child
