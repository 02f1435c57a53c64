"""Whether what a step consumes is there, and which step makes it when it is not."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_launch import crosschecks
from nemotron_launch.catalog import Step, conversion, find_config, find_step, is_a, load_artifacts, load_steps
from nemotron_launch.config.compose import Composed
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Artifact, Job
from nemotron_launch.plan import compose_for, new_run_id, plan_job
from nemotron_launch.trainer.data.manifest import check_target, read_manifest
from nemotron_launch.trainer.paths import is_hub_id, resolve_path

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

_DATA_SUFFIXES = (".jsonl", ".zst", ".json", ".csv", ".parquet", ".arrow")


@frozen
class Stage:
    """One job of what a command has to run. `why` is empty for the step that was asked for."""

    job: Job
    why: str


def stages(
    step: Step,
    composed: Composed,
    profile: Profile | None = None,
    passthrough: Sequence[str] = (),
    *,
    run_id: str | None = None,
) -> list[Stage]:
    """What to run here, in order: the steps that make missing artifacts (`run.make_missing`), then the step itself.

    run_id: of the step itself; None draws a fresh one. UserError: something is missing and no step is named to make
    it, or the named step would leave it elsewhere.
    """
    last = plan_job(step, composed, profile, passthrough, run_id=run_id or new_run_id(step, composed))
    return [*_makers(step, composed, profile, ()), Stage(last, "")]


def check_inputs(
    step: Step,
    composed: Composed,
    *,
    made: Collection[str] = (),
    job: Job | None = None,
    profile: Profile | None = None,
) -> None:
    """Raise on the first consumed artifact that is not there. made: keys of those that another run makes first.

    job: looked for where this job finds them, as far as that is seen from here; on this machine unless given.
    """
    for artifact, error in _consumed(step, composed, _locator(step, job, profile) if job else None):
        if error and error is not _UNSEEN and artifact.key not in made:
            raise _nobody_makes(step, composed, artifact, error)


def _makers(step: Step, composed: Composed, profile: Profile | None, chain: tuple[str, ...]) -> Iterator[Stage]:
    for artifact, error in _consumed(step, composed):
        key = f"run.make_missing.{artifact.type}"
        named = composed.get(key)
        if named is None or isinstance(error, _WrongKind):
            if error:
                raise _nobody_makes(step, composed, artifact, error)
            continue
        maker = find_step(str(named["step"]))
        config = find_config(maker, str(named["config"]))
        label = f"{maker.id} -c {named['config']}"
        made = compose_for(maker, config, (), profile)
        left = _left_in(maker, made, artifact)
        here = left is not None and _same_place(left, str(artifact.value))
        if error is None and (not here or _finished(made)):
            continue
        if not here:
            raise composed.problem(
                artifact.key,
                f"{artifact.key}: {artifact.value} is not there, and {label} leaves its {artifact.type} in {left}",
                f"set {artifact.key}={left}, or make it yourself" if left else f"choose another step in {key}",
            )
        if label in chain:
            circle = " → ".join([*chain, label])
            raise composed.problem(key, f"run.make_missing goes in a circle: {circle}")
        state = "is not there yet" if error else "is not finished"
        yield from _makers(maker, made, profile, (*chain, label))
        why = f"{artifact.type} {artifact.value} {state}: running {label} first (run.make_missing)"
        yield Stage(plan_job(maker, made, profile, run_id=new_run_id(maker, made)), why)


def notes(
    step: Step, composed: Composed, job: Job, profile: Profile | None, *, made: Collection[str] = ()
) -> list[str]:
    """What to say about inputs that are not there, or that only the job's machine can see. Nothing for those in place.

    made: as check_inputs. A job on a Slurm cluster sees the files of this machine when this is its login node:
    remote_job_dir is there, then.
    """
    found = []
    for artifact, error in _consumed(step, composed, _locator(step, job, profile)):
        maker = composed.get(f"run.make_missing.{artifact.type}")
        command = f"nemotron steps run {maker['step']} -c {maker['config']}" if maker else ""
        if job.executor != "local" and command:
            command += f" -b {job.profile}"
        if error is None or artifact.key in made:
            continue
        if error is _UNSEEN:
            if maker:
                found.append(f"{artifact.key}: {artifact.value} must be there; to make it:  {command}")
        elif maker and job.executor == "local":
            found.append(f"{artifact.key}: {artifact.value} is not there yet; {command} runs first")
        else:
            error = _nobody_makes(step, composed, artifact, error)
            hint = f"make it:  {command}" if command else (error.hint or "").replace("\n", "; ")
            found.append(f"{error.message}" + (f"; {hint}" if hint else ""))
    return found


_UNSEEN = UserError("it lies where only the job sees it")
Locator = Callable[[str, str], "Path | None"]


def _locator(step: Step, job: Job, profile: Profile | None) -> Locator:
    """Finds the file here that a path of the config means to the job; None where it lies on another machine."""
    if job.executor == "local":
        return lambda text, key: resolve_path(text, step.folder, key)
    here = crosschecks.sees_this_machine(job)

    def locate(text: str, key: str) -> Path | None:
        if text.startswith("step://"):
            return resolve_path(text, step.folder, key)
        path = posixpath.join(job.workdir, text)
        if here and (mount := crosschecks.covering(job.container.mounts, path)) is not None:
            path = posixpath.join(mount.source, posixpath.relpath(path, mount.target))
        return Path(path) if here else None

    return locate


def _consumed(
    step: Step, composed: Composed, locate: Locator | None = None
) -> Iterator[tuple[Artifact, UserError | None]]:
    """The artifacts that the config binds, each with why it cannot be consumed, _UNSEEN or None."""
    types = load_artifacts()
    find = locate or (lambda text, key: resolve_path(text, step.folder, key))
    for port in step.consumes:
        value = composed.get(port.key)
        if value is None:
            continue  # whether it may be null is for the schema and the checks to say
        artifact = Artifact(port.type, port.required, port.key, value)
        try:
            if is_a(types, port.type, "training_jsonl"):
                _check_data(artifact, find)
                if port.type == "prepared_jsonl" and (manifest := find(str(value), port.key)) is not None:
                    _check_manifest(manifest, step)
            elif not (port.type == "checkpoint_hf" and is_hub_id(str(value))):
                path = find(str(value), port.key)
                if path is None:
                    raise _UNSEEN
                _check_model(artifact, path)
        except UserError as error:
            yield artifact, error
        else:
            yield artifact, None


class _WrongKind(UserError):
    """Something is there, and it is not what is wanted: making it would help nobody."""


def _check_manifest(path: Path, step: Step) -> None:
    """Raise where a file is no manifest of rows that the step trains on."""
    try:
        check_target(read_manifest(path), step.id)
    except UserError as error:
        raise _WrongKind(error.message, where=error.where, hint=error.hint) from None


def _check_model(artifact: Artifact, path: Path) -> None:
    """Raise where a checkpoint is not there, or is one of the other kind, with the step that converts it."""
    from nemotron_launch.trainer.checkpoints import is_weights, newest_complete, resolve_checkpoint

    if artifact.type == "checkpoint_megatron":
        if (path / "config.json").is_file():
            raise _WrongKind(
                f"{artifact.value} is a Hugging Face model, not a checkpoint_megatron",
                where=artifact.key,
                hint=conversion("checkpoint_hf", artifact.type, str(artifact.value)),
            )
        resolve_checkpoint(path, where=artifact.key)
        return
    if not path.exists():
        raise UserError(f"there is no {artifact.type} {artifact.value}", where=artifact.key)
    folders = [path, *([newest] if (newest := newest_complete(path)) else [])]
    if any((folder / "policy" / "weights").is_dir() or is_weights(folder) for folder in folders):
        raise _WrongKind(
            f"{artifact.value} is a Megatron checkpoint, not a {artifact.type}",
            where=artifact.key,
            hint=conversion("checkpoint_megatron", artifact.type, str(artifact.value)),
        )


def _check_data(artifact: Artifact, find: Locator) -> None:
    import glob

    entries = artifact.value if isinstance(artifact.value, list) else [artifact.value]
    for entry in entries:
        path = find(str(entry), artifact.key)
        if path is None:
            if is_hub_id(str(entry)) and Path(entry).suffix not in _DATA_SUFFIXES:
                continue
            raise _UNSEEN
        if path.exists() or glob.glob(str(path), recursive=True):
            continue
        if is_hub_id(str(entry)) and path.suffix not in _DATA_SUFFIXES:
            continue
        what = "no file matches" if glob.has_magic(str(path)) else "there is no file"
        raise UserError(f"{what} {entry}", where=artifact.key)


def _left_in(maker: Step, made: Composed, artifact: Artifact) -> str | None:
    """Where the step that makes an artifact leaves it."""
    types = load_artifacts()
    for port in maker.produces:
        if is_a(types, port.type, artifact.type):
            value = made.get(port.key)
            return None if value is None else str(value)
    return None


def _same_place(left: str, wanted: str) -> bool:
    """Whether `wanted` is the folder `left` or lies in it (a step_N)."""
    folder, path = (Path(os.path.abspath(Path(text).expanduser())) for text in (left, wanted))
    return path == folder or folder in path.parents


def _finished(made: Composed) -> bool:
    """Whether the making run ended well; a folder that only holds its checkpoints counts as finished."""
    output = Path(str(made.get("output_dir", "")))
    if not (output / "metrics.jsonl").exists():
        return True
    try:
        return (output / "exit_code").read_text().strip() == "0"
    except OSError:
        return False


def _nobody_makes(step: Step, composed: Composed, artifact: Artifact, error: UserError) -> UserError:
    types = load_artifacts()
    hints = [error.hint] if error.hint else []
    elsewhere = {port.type for port in step.consumes} - {artifact.type}
    for maker in () if isinstance(error, _WrongKind) else load_steps():
        for port in maker.produces:
            if maker.id != step.id and port.type not in elsewhere and is_a(types, port.type, artifact.type):
                hints.append(f"make it:  nemotron steps run {maker.id} {port.key}={artifact.value}")
    where = composed.sources.where(artifact.key)
    return UserError(f"{artifact.key}: {error.message}", where=where, hint="\n".join(hints) or None)
