"""Runs on this machine in the background, each under a supervisor of its own, behind the interface of an executor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch.backends import local_folder
from nemotron_launch.backends.live import POINTS, LogSource, Refused, Seen, Submission
from nemotron_launch.backends.local import keep_from_git
from nemotron_launch.backends.local_supervisor import SIGNALS, TASK
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Upload, open_host
from nemotron_launch.jobs.process import alive
from nemotron_launch.jobs.run import Run
from nemotron_launch.trainer.exit_codes import RESUME_ME

OUT = "supervisor.out"
MAIN = "run.sh"  # local_script's, which would import Jinja
PATIENCE = 660.0  # seconds for a save; the trainer itself gives up after 600
_POINT = re.compile(rf"point-(\d+)/{re.escape(MAIN)}")
_AT_ONCE = 1 << 20  # bytes of a log that are read in one go


class LocalClient:
    """This machine as an executor. A run has a folder as on Slurm, and its supervisor's process id as its job."""

    def __init__(self) -> None:
        self.host: Host | None = open_host({})

    def check(self, run: Run, files: Sequence[Upload]) -> tuple[str, ...]:
        return ()

    def submit(self, run: Run, files: Sequence[Upload], *, after: Sequence[Run] = ()) -> Submission:
        """Start the run's supervisor. Files named point-<n>/run.sh make it a sweep: options' max_parallel at a time."""
        if found := self.find(run):
            return found
        folder = Path(run.state_dir)
        assert self.host is not None
        try:
            keep_from_git(Path(run.run_dir))
            self.host.put(run.run_dir, files)
        except UserError as error:
            raise Refused(error.message, where=error.where, hint=error.hint, exit_code=error.exit_code) from None
        points = sorted(int(point[1]) for file in files if (point := _POINT.fullmatch(file.path)))
        points = [point for point in points if point in run.options.get(POINTS, points)]
        homes = [folder / f"point-{point}" for point in points if run.point is None] or [folder]
        task = {
            "workdir": run.workdir,
            "max_restarts": run.max_restarts,
            "resume_code": RESUME_ME,
            "patience": PATIENCE,
            "max_parallel": int(run.options.get("max_parallel") or len(homes)),
            "points": [
                {
                    "folder": str(home),
                    "command": ["bash", str(home / MAIN)],
                    "after": [(one.state_dir, one.run_id) for one in after],
                }
                for home in homes
            ],
        }
        local_folder.put(folder / TASK, json.dumps(task))
        return _start(folder)

    def find(self, run: Run) -> Submission | None:
        who = local_folder.holder(Path(run.state_dir))
        return Submission(_pid(who)) if who else None

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        seen = ((run.run_id, local_folder.look(Path(run.state_dir))) for run in runs)
        return {run_id: one for run_id, one in seen if one is not None}

    def submit_successor(self, run: Run) -> Submission:
        raise UserError(f"{run.run_id} restarts by itself")

    def cancel(self, runs: Sequence[Run]) -> None:
        """Ask the trainers to save and stop; of a run that was asked already, kill them."""
        for run in runs:
            folder = Path(run.state_dir)
            seen = local_folder.look(folder)
            if seen is None or seen.ended is not None:
                continue
            home = folder if local_folder.holder(folder) else folder.parent
            again = (folder / local_folder.CANCEL).exists()
            local_folder.put(folder / local_folder.CANCEL, "now\n" if again else "save\n")
            # Attached, it is the terminal's command that runs it, and passes signals on.
            number = signal.SIGUSR1 if (home / TASK).exists() else signal.SIGTERM
            who = local_folder.holder(home)
            if alive(who):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(_pid(who)), number)

    def clear(self, run: Run) -> None:
        local_folder.clear(Path(run.state_dir))

    def log_sources(self, run: Run) -> list[LogSource]:
        folder = Path(run.state_dir)
        found = []
        for logs in sorted((folder / local_folder.LOGS).glob("attempt-*"), key=_number):
            found += [LogSource(_number(logs), path.stem, str(path)) for path in sorted(logs.glob("*.log"))]
        if (folder / OUT).exists():  # a sweep's tells of all its points
            found.append(LogSource(0, "job", str(folder / OUT)))
        elif not found and (log := Path(run.output_dir, "train.log")).exists():
            found.append(LogSource(0, "train", str(log)))  # attached: all else went to its terminal
        return found

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        news = {}
        for source, offset in wanted.items():
            with suppress(FileNotFoundError), Path(source.key).open("rb") as file:
                file.seek(offset)
                if data := file.read(_AT_ONCE):
                    news[source] = data
        return news

    def shell(self, run: Run) -> int:
        shell = os.environ.get("SHELL") or "/bin/sh"
        return subprocess.run([shell], cwd=run.workdir, env={**os.environ, "NEMOTRON_RUN_DIR": run.run_dir}).returncode

    def close(self) -> None:
        if self.host:
            self.host.close()


def open_client(contact: Mapping[str, Any]) -> LocalClient:
    return LocalClient()


def _start(folder: Path) -> Submission:
    """Start the supervisor in a session of its own, as nobody's child; it holds the claim before it is a program."""
    command = [sys.executable, "-m", "nemotron_launch.backends.local_supervisor", str(folder)]

    def leave() -> None:
        if os.fork():
            os._exit(0)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes before it listens is kept for it
        if not local_folder.claim(folder):
            os._exit(1)

    with (folder / OUT).open("ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=leave,
        )
    child.wait()
    who = local_folder.holder(folder)
    if not who:
        raise Refused("the supervisor could not be started", where=str(folder), exit_code=1)
    return Submission(_pid(who))


def _pid(who: str) -> str:
    return who.rsplit(":", 2)[1] if who.count(":") >= 2 else ""


def _number(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0
