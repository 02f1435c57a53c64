"""From compiled jobs to rows of the ledger and jobs of an executor, so that a crash between leaves what can be settled.

In this order: what can be wrong is checked; the row is written, `submitting`, together with the files that the run
needs, for it to be submitted again; the executor gets it; the row is completed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch.backends.live import Backend, Refused, open_backend
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Host, Unreachable, Upload
from nemotron_launch.job import Job
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.process import identity
from nemotron_launch.jobs.run import Run

if TYPE_CHECKING:
    from nemotron_launch.jobs.settle import Backends, Warn
    from nemotron_launch.render import Rendered

SECRETS = "secrets.env"
_KEPT = "runs"
_LEFT = 86400.0  # seconds after which files that were never given a name are nobody's


def new_run(job: Job, overrides: Sequence[str] = (), *, after: Sequence[Run] = ()) -> Run:
    """The row of a job that is about to be submitted. For points of a sweep see `point_of`."""
    run_dir, workdir = os.path.abspath(job.run_dir), os.path.abspath(job.workdir)
    config = next((file.text for file in job.files if file.path == "config.yaml"), "")
    local = job.executor == "local"
    if not local:
        run_dir, workdir = job.run_dir, job.workdir
    contact = {} if local else dict(job.options.get("tunnel") or {})
    if job.executor == "lepton":
        from nemotron_launch.backends.lepton_access import contact_of

        contact = contact_of(job.options)
    return Run(
        run_id=job.run_id,
        step=job.step,
        config=job.config,
        config_sha256=_hash(config),
        profile=job.profile,
        executor=job.executor,
        run_dir=run_dir,
        state_dir=run_dir,
        workdir=workdir,
        output_dir=os.path.join(workdir, job.output_dir),
        checkpoints=_checkpoints(job, workdir),
        nodes=job.nodes + sum(service.nodes for service in job.services),
        created=time.time(),
        contact=contact,
        host=os.uname().nodename if local else str(contact.get("host") or contact.get("workspace") or ""),
        secrets={
            secret.name: {"source": secret.source or secret.name, "optional": secret.optional}
            for secret in job.secrets
            if not secret.reference
        },
        options=dict(job.options),
        overrides=tuple(overrides),
        max_restarts=job.restart.max_restarts,
        after=tuple(run.run_id for run in after),
        artifact=job.artifact,
        uses=_uses(job, workdir),
        code=_code(job),
        submitter=identity(),
    )


def point_of(sweep: Run, point: int, job: Job, config: str, overrides: Sequence[str]) -> Run:
    """The row of a point of a sweep. sweep: the row of the whole; job: the point's, config: its config.yaml's text."""
    return replace(
        sweep,
        run_id=f"{sweep.run_id}.{point}",
        sweep=sweep.run_id,
        point=point,
        state_dir=f"{sweep.run_dir}/point-{point}",
        output_dir=os.path.join(sweep.workdir, job.output_dir),
        checkpoints=_checkpoints(job, sweep.workdir),
        config_sha256=_hash(config),
        overrides=tuple(overrides),
        artifact=job.artifact,
        uses=_uses(job, sweep.workdir),
    )


def whole(run: Run) -> Run:
    """What is submitted for a run: itself, or the sweep that it is a point of."""
    if not run.sweep:
        return run
    job_id = run.job_id.partition("_")[0]
    return replace(run, run_id=run.sweep, sweep="", point=None, state_dir=run.run_dir, job_id=job_id)


def uploads(job: Job, rendered: Rendered) -> list[Upload]:
    """All files of a run's folder but the secrets."""
    files = [Upload(file.path, file.text.encode("utf-8", "surrogateescape"), file.mode) for file in rendered.files]
    if job.bundle is None:
        return files
    from nemotron_launch import bundle

    return [*files, Upload(job.bundle.file, bundle.read(job.bundle))]


def submit(
    ledger: Ledger,
    run: Run,
    files: Sequence[Upload],
    *,
    points: Sequence[Run] = (),
    after: Sequence[Run] = (),
    backend: Backend | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Run]:
    """Submit a run, or the points of a sweep as one job; their rows. Never twice under one id.

    run: by new_run. files: by uploads. points: by point_of. after: runs that must finish first, of the same executor.
    backend: the run's, if it is open already. env: where the secrets' values are (default: this process's). UserError:
    a secret is not set, the id is taken, the host is down, an artifact that is named is gone from it, the ledger cannot
    be used: nothing was written. Refused: the executor said no, and the row says so. Unreachable after that: the next
    command finds out.
    """
    rows = list(points) or [run]
    secret = secret_files(run, os.environ if env is None else env)
    waits = check_after(run, after)
    backend = backend or open_backend(run.executor, run.contact)
    notes = backend.check(run, files)  # a wrong key, a host that is down: said before there is anything to settle
    _check_named(backend.host, rows)
    passing = _keep_apart(ledger.folder, run.run_id, files)
    try:
        ledger.add(rows, before=lambda: _keep(ledger.folder, run.run_id, passing))
    finally:
        shutil.rmtree(passing, ignore_errors=True)
    return place(ledger, rows, run, [*files, *secret], backend, after=waits, notes=notes)


def submit_behind(
    ledger: Ledger,
    backends: Backends,
    run: Run,
    files: Sequence[Upload],
    after: Sequence[Run],
    warn: Warn,
    *,
    points: Sequence[Run] = (),
) -> list[Run]:
    """As submit, behind other runs, which the rows name; a Ctrl-C and a lost connection say how to find out."""
    names = tuple(one.run_id for one in after)
    run, points = replace(run, after=names), [replace(point, after=names) for point in points]
    hint = f"nemotron jobs status {run.run_id}"
    try:
        return submit(ledger, run, files, after=after, backend=backends.of(run), points=points)
    except KeyboardInterrupt:
        warn(f"interrupted: it may have been submitted; this finds out:  {hint}")
        raise
    except Unreachable as error:
        if ledger.get((points or [run])[0].run_id) is None:
            raise  # out of reach from the start
        hint = "\n".join(filter(None, [error.hint, f"it may have arrived; this finds out:  {hint}"]))
        raise Unreachable(error.message, where=error.where, hint=hint, exit_code=error.exit_code) from None


def place(
    ledger: Ledger,
    rows: Sequence[Run],
    run: Run,
    files: Sequence[Upload],
    backend: Backend,
    *,
    after: Sequence[Run] = (),
    notes: Sequence[str] = (),
) -> list[Run]:
    """Hand rows that are `submitting` to their executor as one job, and complete them. Errors: as submit's."""
    try:
        made = backend.submit(run, files, after=after)
    except Unreachable:
        raise
    except UserError as error:
        refused = {"state": "refused", "reason": error.message, "ended": time.time()}
        ledger.change_all([(row, refused) for row in rows])
        hint = "\n".join(filter(None, [error.hint, f"when that is put right:  nemotron jobs resubmit {run.run_id}"]))
        raise Refused(error.message, where=error.where, hint=hint, exit_code=error.exit_code) from None
    return settled(ledger, rows, made.job_id, made.cluster, "; ".join([*notes, *made.notes]))


def settled(ledger: Ledger, rows: Sequence[Run], job_id: str, cluster: str, reason: str = "") -> list[Run]:
    """Complete rows whose job is known. reason: why it waits, if that is known."""
    changes = []
    for row in rows:
        job = job_id if row.point is None or row.executor == "local" else f"{job_id.partition('_')[0]}_{row.point}"
        values = {"state": "pending", "job_id": job, "cluster": cluster, "reason": reason, "submitted": time.time()}
        changes.append((row, values))
    return [new or ledger.get(old.run_id) or old for new, old in zip(ledger.change_all(changes), rows, strict=True)]


def check_after(run: Run, after: Sequence[Run]) -> list[Run]:
    """Of the runs that must finish first those that have not. UserError: one never will, or lies elsewhere."""
    waits = []
    for other in after:
        if other.state == "finished":
            continue
        if other.state not in ("submitting", "pending", "running"):
            hint = f"nemotron jobs resubmit {other.run_id} lets it go on"
            raise UserError(f"{other.run_id} is {other.state}: a run after it would never start", hint=hint)
        if (other.executor, dict(other.contact)) != (run.executor, dict(run.contact)):
            hint = f"nemotron jobs wait {other.run_id} waits for it here"
            raise UserError(f"{other.run_id} runs elsewhere: {run.executor} cannot wait for it", hint=hint)
        waits.append(other)
    return waits


def _check_named(host: Host | None, rows: Sequence[Run]) -> None:
    """Raise where an artifact that a run names is gone from the machine that will read it."""
    named = {str(use["place"]): use for run in rows for use in run.uses if use.get("name")}
    if host is None or not named:
        return
    answer = host.run(f'for path in {shlex.join(named)}; do [ -e "$path" ] || printf "%s\\n" "$path"; done')
    for path in answer.stdout.splitlines():
        if use := named.get(path):
            label = f"{use['name']}@{use['version']} (run {use['run_id']})"
            hint = f"nemotron artifacts show {use['name']}@{use['version']} says of what it was made"
            where = f" on {host.name}" if host.name else ""
            raise UserError(f"{use['key']}={use['text']}: {label} is gone: there is no {path}{where}", hint=hint)


def secret_files(run: Run, env: Mapping[str, str]) -> list[Upload]:
    """The file that carries the secrets, where the executor takes them so. UserError: one is not set."""
    values: dict[str, str] = {}
    for name, given in run.secrets.items():
        source = given["source"]
        if source in env:
            values[name] = env[source]
        elif not given["optional"]:
            hint = f"export {source}=…"
            raise UserError(f"the secret {name} is not set: there is no {source} in the environment", hint=hint)
    write = getattr(import_module(f"nemotron_launch.backends.{run.executor}"), "secrets_text", None)
    return [Upload(SECRETS, write(values).encode("utf-8", "surrogateescape"))] if write and run.secrets else []


# The files of runs, kept beside the ledger ------------------------------------------------------------------------


def kept(folder: Path, run_id: str) -> list[Upload]:
    """The files of a run as they were submitted, without secrets. folder: the ledger's. UserError: they are gone."""
    home = kept_folder(folder, run_id)
    files = [path for path in sorted(home.rglob("*")) if path.is_file()]
    if not files:
        raise UserError(
            f"the files of {run_id} are no longer kept",
            where=str(home),
            hint="the command that started it, run again, goes on from its last checkpoint",
            exit_code=1,
        )
    return [Upload(str(path.relative_to(home)), path.read_bytes(), path.stat().st_mode & 0o777) for path in files]


def kept_folder(folder: Path, run_id: str) -> Path:
    """Where the files of a run, or of a whole sweep, are kept."""
    return folder / _KEPT / run_id


def forget(folder: Path, run_id: str) -> None:
    """Remove the kept files of a run, and the bundles that no run has any more."""
    shutil.rmtree(folder / _KEPT / run_id, ignore_errors=True)
    with suppress(OSError):
        for path in (folder / "bundles").iterdir():
            if path.stat().st_nlink == 1:
                path.unlink()
        for path in (folder / _KEPT).glob(".*"):  # of clients that were killed
            if path.stat().st_mtime < time.time() - _LEFT:
                shutil.rmtree(path, ignore_errors=True)


def _keep_apart(folder: Path, run_id: str, files: Sequence[Upload]) -> Path:
    """Write the files under a name of their own; many runs share a bundle, so it is linked."""
    passing = folder / _KEPT / f".{run_id}.{os.getpid()}"
    try:
        passing.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in files:
            path = passing / file.path
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=file.mode)
            if file.path.startswith("code-") and _linked(folder / "bundles" / file.path, file, path):
                continue
            path.write_bytes(file.data)
    except OSError as error:
        shutil.rmtree(passing, ignore_errors=True)
        reason = (error.strerror or str(error)).lower()
        where, hint = str(error.filename or passing), "files of runs are kept beside the ledger"
        raise UserError(f"cannot be written: {reason}", where=where, hint=hint, exit_code=1) from None
    return passing


def _linked(shared: Path, file: Upload, path: Path) -> bool:
    with suppress(OSError):
        if not shared.exists() or shared.stat().st_size != len(file.data):
            shared.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            passing = shared.with_name(f".{shared.name}.{os.getpid()}")
            passing.touch(mode=file.mode)
            passing.write_bytes(file.data)
            passing.replace(shared)
        path.unlink()
        path.hardlink_to(shared)
        return True
    path.touch(mode=file.mode)  # `prune` may have taken the shared one away just now
    return False


def _keep(folder: Path, run_id: str, passing: Path) -> None:
    """Give the files their name. Called while nobody else can take the run's id: what lies there is nobody's."""
    home = folder / _KEPT / run_id
    shutil.rmtree(home, ignore_errors=True)
    passing.replace(home)


def _checkpoints(job: Job, workdir: str) -> str:
    """The folder of the run's step_N folders; empty where it makes none."""
    for artifact in job.produces:
        if artifact.key == "checkpointing.checkpoint_dir" and artifact.value:
            return os.path.join(workdir, str(artifact.value))
    return ""


def _uses(job: Job, workdir: str) -> tuple[dict[str, Any], ...]:
    """All that a job consumes, each as a `job.Use`: artifacts that its config names, and paths as they are."""
    named = {use.place: dict(vars(use)) for use in job.uses}
    found = []
    for artifact in job.consumes:
        for value in artifact.value if isinstance(artifact.value, list) else [artifact.value]:
            if not isinstance(value, str):
                continue
            path = "" if value.startswith("step://") else os.path.join(workdir, os.path.expanduser(value))
            plain = {"key": artifact.key, "type": artifact.type, "text": value, "place": os.path.normpath(path)}
            found.append(named.get(value) or plain)
    return tuple(found)


def _code(job: Job) -> dict[str, Any]:
    made = job.bundle
    if made is None:
        return {}
    return {"bundle": made.file, "git_revision": made.git_revision, "git_dirty": made.git_dirty}


def _hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
