"""From what a user names, a step, config, overrides and profile, to what would be submitted, in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch import bundle, crosschecks
from nemotron_launch.catalog import Step
from nemotron_launch.config.compose import Composed
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Job
from nemotron_launch.plan import HERE, Origin, compose_for, plan_job
from nemotron_launch.render import Rendered, render
from nemotron_launch.resources import display

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile


@frozen
class Compiled:
    """A job with what it was made of and what it becomes. warnings: what will run, but perhaps not as it was meant."""

    step: Step
    composed: Composed
    profile: Profile | None
    job: Job
    rendered: Rendered
    warnings: tuple[str, ...]


def compile_job(
    step: Step,
    config: Path,
    overrides: Sequence[str] = (),
    profile: Profile | None = None,
    passthrough: Sequence[str] = (),
    *,
    run_id: str | None = None,
    attached: bool = True,
    origin: Origin = HERE,
    env: Mapping[str, str] | None = None,
) -> Compiled:
    """Compose, plan, check and render. UserError: everything that can be wrong, none of it submitted."""
    composed = compose_for(step, config, overrides, profile, env=env)
    job = plan_job(step, composed, profile, passthrough, run_id=run_id, attached=attached, origin=origin)
    warnings = crosschecks.warnings(job, composed, profile)
    if origin is HERE and (composed.get("run.make_missing") or Path(job.workdir).is_dir()):
        from nemotron_launch.inputs import notes

        warnings += notes(step, composed, job, profile)
    return Compiled(step, composed, profile, job, render(job), tuple(warnings))


def as_data(compiled: Compiled) -> dict[str, Any]:
    """The job and its files as plain data, for `--output json` and `yaml`."""
    job = json.loads(json.dumps(compiled.job, default=vars))
    job.pop("files")
    files = {file.path: file.text for file in compiled.rendered.files}
    return {"job": job, "main": compiled.rendered.main, "files": files, "warnings": list(compiled.warnings)}


def write_to(compiled: Compiled, folder: Path) -> list[Path]:
    """Write all files of the run's folder, the bundle too; their paths. UserError: the place cannot be written."""
    files = [(file.path, file.text.encode(), file.mode) for file in compiled.rendered.files]
    if compiled.job.bundle is not None:
        files.append((compiled.job.bundle.file, bundle.read(compiled.job.bundle), 0o600))
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data, mode in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=mode)
            path.write_bytes(data)
            written.append(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        where = display(Path(error.filename or folder))
        raise UserError(f"cannot be written: {reason}", where=where, hint="choose another folder: dir=PATH") from None
    return written
