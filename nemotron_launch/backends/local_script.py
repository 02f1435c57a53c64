"""Renders a job for this machine as a script that does, by itself, what running it here does."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_launch import quoting
from nemotron_launch.backends import services
from nemotron_launch.errors import UserError
from nemotron_launch.job import File, Job
from nemotron_launch.quoting import sh, sh_words
from nemotron_launch.render import Rendered, fill, fill_own, setup_file

MAIN = "run.sh"
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


def render_job(job: Job) -> Rendered:
    """The script `run.sh`, which writes the job's files itself, and those files. UserError: what it cannot carry."""
    if services.replicas(job) > 1:
        raise UserError("this machine is one node", where="services", hint="nodes: 0 shares it with the trainer")
    files = (*([setup_file(job)] if job.setup else []), *job.files)
    values: dict[str, Any] = {
        "job": job,
        "about": _CONTROL.sub("?", f"{job.step} -c {job.config}, run {job.run_id}"),
        "workdir": sh(job.workdir),
        "run_dir": sh(job.run_dir),
        "files": [_placed(file) for file in files],
        "env": [
            *_env(job.env),
            *((s.name, f'"${{{s.source}-}}"') for s in job.secrets if s.source not in ("", s.name)),
        ],
        "secrets": [quoting.name(secret.source or secret.name, "secrets") for secret in job.secrets],
        "setup": bool(job.setup),
        "services": services.place(job, sh, {}),
        "resume_code": job.restart.resume_code,
        "command": sh_words(job.command, "command"),
    }
    text = fill_own(Path(job.template), values) if job.template else fill("local/run.sh.j2", values)
    return Rendered(MAIN, (File(MAIN, text), *files))


def _env(env: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(quoting.name(name, "env"), sh(value, f"env.{name}")) for name, value in sorted(env.items())]


def _placed(file: File) -> dict[str, str]:
    """The command that writes a file into the run's folder: a here-document where its text can be one."""
    target = f'"$run_dir/"{sh(file.path)}'
    folder = posixpath.dirname(file.path)
    lines = sh(file.text, file.path) and file.text.split("\n")
    if lines[-1] == "" and "\r" not in file.text:
        end = "END"
        while end in lines:
            end += "_"
        command = f"cat > {target} <<'{end}'\n{file.text}{end}"
    else:
        command = f"printf %s {sh(file.text)} > {target}"
    return {"folder": sh(folder) if folder else "", "command": command}
