"""A pipeline compiled as a whole: every stage composed, planned and rendered, and the links between them checked."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_launch import crosschecks
from nemotron_launch.artifacts.chain import check_link, choose
from nemotron_launch.catalog import Step, find_config, find_step, is_a, load_artifacts
from nemotron_launch.compiler import Compiled
from nemotron_launch.config.compose import Composed
from nemotron_launch.config.overrides import dump_value, parse_override
from nemotron_launch.config.tree import DEFAULT
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.inputs import check_inputs, notes
from nemotron_launch.pipelines.file import Pipeline, Source, Stage
from nemotron_launch.plan import LONGEST_RUN_ID, compose_for, plan_job
from nemotron_launch.render import render

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

COMMAND_LINE = "command line"


@frozen
class Place:
    """Where a stage runs. files: whose file system it sees; queue: whose jobs can wait for it, "" for nobody's.

    workdir: where relative paths of its config start; "." is the working directory.
    """

    files: str
    queue: str
    workdir: str


@frozen
class Planned:
    """A stage, compiled. binds: its inputs' config keys → the stage and the key that they come from."""

    stage: Stage
    compiled: Compiled
    binds: Mapping[str, Source]
    place: Place

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def label(self) -> str:
        """As a person would ask for it: its step and config."""
        return f"{self.compiled.step.id} -c {self.compiled.composed.name}"


def compile_pipeline(
    pipeline: Pipeline,
    *,
    profile: str | None = None,
    profiles_path: Path | None = None,
    words: Sequence[str] = (),
    attached: bool = True,
    to_run: bool = False,
) -> list[Planned]:
    """Every stage in order, compiled as it would run. profile: of the stages that name none; None is this machine.

    words: overrides of the command line, each with its stage's name before its key. to_run: under run ids of their own;
    else under those of a dry run. UserError: what is wrong with a stage, or with a link between two, with its place.
    """
    profiles = _Profiles(profile, profiles_path)
    given = _by_stage(pipeline, words)
    done: dict[str, Planned] = {}
    for stage in pipeline.stages:
        done[stage.name] = _compiled(pipeline, stage, done, profiles, given.get(stage.name, ()), attached, to_run)
    _check_folders(done.values())
    return list(done.values())


def check_inputs_of(planned: Planned) -> None:
    """Raise on what a stage takes from outside the pipeline and is not there, as far as it is seen from here."""
    compiled = planned.compiled
    try:
        check_inputs(compiled.step, compiled.composed, made=planned.binds, job=compiled.job, profile=compiled.profile)
    except UserError as error:
        own = "\n".join(filter(None, [error.hint, "or let an earlier stage make it:  inputs: {…: STAGE}"]))
        raise told(planned.stage, UserError(error.message, where=error.where, hint=own)) from None


def told(stage: Stage, error: UserError) -> UserError:
    """An error of a stage's step, config or job, with the stage's name and, where it has no place, its line."""
    where = stage.where("overrides" if stage.overrides else "inputs") if error.where == COMMAND_LINE else error.where
    if where in (None, str(DEFAULT)):
        where = stage.where()
    hint = error.hint and error.hint.replace(COMMAND_LINE, str(where))
    return UserError(f"stage {stage.name}: {error.message}", where=where, hint=hint, exit_code=error.exit_code)


# One stage ---------------------------------------------------------------------------------------------------------


class _Profiles:
    """The profiles of the stages, each read once."""

    def __init__(self, default: str | None, path: Path | None) -> None:
        self._default, self._path = default, path
        self._read: dict[str, Profile] = {}

    def of(self, stage: Stage) -> Profile | None:
        name = stage.profile or self._default
        if name is None:
            return None
        if name not in self._read:
            from nemotron_launch.profiles import load_profile

            self._read[name] = load_profile(name, profiles_path=self._path)
        return self._read[name]


def _compiled(
    pipeline: Pipeline,
    stage: Stage,
    done: Mapping[str, Planned],
    profiles: _Profiles,
    words: Sequence[str],
    attached: bool,
    to_run: bool,
) -> Planned:
    step, config, profile = _named(pipeline, stage, profiles)
    place = _place(profile)
    binds: dict[str, Source] = {}
    for written, source in stage.inputs.items():
        key, found = _bind(stage, step, written, source, done)
        if key in binds:
            raise stage.problem(f"inputs.{written}", f"{key} is taken from {binds[key].stage} already")
        binds[key] = found
    _check_free(stage, binds, words)
    folder = pipeline.output_dir if place.workdir != "." else os.path.expanduser(pipeline.output_dir)
    values = {"output_dir": posixpath.join(folder, stage.name)}
    values |= {key: _path(stage, place, source, done) for key, source in binds.items()}
    overrides = [f"++{key}={dump_value(value)}" for key, value in values.items()]
    composed = _composed(stage, step, config, [*overrides, *stage.overrides], words, profile)
    for key, source in binds.items():
        _check_link(stage, step, composed, key, source, done[source.stage])
    try:
        run_id = _run_id(pipeline, stage) if to_run else None
        job = plan_job(step, composed, profile, run_id=run_id, attached=attached, made=binds)
        warnings = crosschecks.warnings(job, composed, profile)
        if Path(job.workdir).is_dir() and job.executor != "local":
            warnings += notes(step, composed, job, profile, made=binds)
        compiled = Compiled(step, composed, profile, job, render(job), tuple(warnings))
    except UserError as error:
        raise told(stage, error) from None
    return Planned(stage, compiled, binds, place)


def _named(pipeline: Pipeline, stage: Stage, profiles: _Profiles) -> tuple[Step, Path, Profile | None]:
    """What a stage names."""
    key = "step"
    try:
        step = find_step(stage.step)
        key, text = "config", stage.config
        if text is not None and text not in step.configs() and ("/" in text or text.endswith((".yaml", ".yml"))):
            text = os.path.join(pipeline.file.parent, os.path.expanduser(text))
        config = find_config(step, text)
        key = "profile"
        return step, config, profiles.of(stage)
    except UserError as error:
        where = error.where if key == "profile" and error.where else stage.where(key)
        inside = f"{error.where}: " if error.where and where != error.where else ""
        raise UserError(f"stage {stage.name}: {inside}{error.message}", where=where, hint=error.hint) from None


def _composed(
    stage: Stage, step: Step, config: Path, overrides: list[str], words: Sequence[str], profile: Profile | None
) -> Composed:
    try:
        return compose_for(step, config, [*overrides, *words], profile)
    except UserError as error:
        if words and error.where == COMMAND_LINE:
            try:
                compose_for(step, config, overrides, profile)
            except UserError as own:
                raise told(stage, own) from None
            raise UserError(f"stage {stage.name}: {error.message}", where=error.where, hint=error.hint) from None
        raise told(stage, error) from None


def _place(profile: Profile | None) -> Place:
    if profile is None or profile.executor == "local":
        return Place("this machine", "local" if profile else "", ".")
    workdir = posixpath.normpath(str(profile.data["remote_job_dir"]))
    if profile.executor == "lepton":
        return Place(f"Lepton {profile.data.get('workspace') or ''}".strip(), "", workdir)
    tunnel = profile.data.get("tunnel") or {}
    files = str(tunnel.get("host")) if tunnel.get("type") == "ssh" else "this machine"
    return Place(files, f"slurm {json.dumps(tunnel, sort_keys=True)}", workdir)


def _run_id(pipeline: Pipeline, stage: Stage) -> str:
    """As plan.new_run_id, with the names of pipeline and stage, which tell more than those of step and config."""
    import secrets
    import time

    tail = f"{re.sub(r'[^a-z0-9]+', '-', stage.name)}-{secrets.token_hex(3)}"
    when = time.strftime("%Y%m%d-%H%M%S")
    room = LONGEST_RUN_ID - len(when) - len(tail) - 2
    return f"{when}-{re.sub(r'[^a-z0-9]+', '-', pipeline.name.lower()).strip('-')[:room].strip('-')}-{tail}"


# Links -------------------------------------------------------------------------------------------------------------


def _bind(stage: Stage, step: Step, written: str, source: Source, done: Mapping[str, Planned]) -> tuple[str, Source]:
    """The config key that takes an input, and the key of the stage that makes it."""
    types = load_artifacts()
    at = f"inputs.{written}"
    ports = [port for port in step.consumes if written in (port.key, port.type)]
    ports = ports or [port for port in step.consumes if is_a(types, written, port.type)]
    if not ports:
        takes = ", ".join(f"{port.type} ({port.key})" for port in step.consumes)
        raise stage.problem(at, f"{step.id} takes no {written}", f"it takes {takes}")
    if len(ports) > 1:
        keys = ", ".join(port.key for port in ports)
        raise stage.problem(at, f"{step.id} takes {written} in several places", f"name the key: {keys}")
    [port] = ports
    maker = done[source.stage].compiled
    made = [one for one in maker.step.produces if source.key in ("", one.key, one.type)]
    if not made:
        makes = ", ".join(f"{source.stage}:{one.key}" for one in maker.step.produces)
        raise stage.problem(
            at, f"{source.stage} ({maker.step.id}) makes no {source.key}", f"it makes {makes or 'nothing'}"
        )
    what = f"what {source.stage} ({maker.step.id}) makes"
    try:
        fits = choose(made, step, port.key, what=what, where=stage.where(at))
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error.message}", where=error.where, hint=error.hint) from None
    if maker.composed.get(fits.key) is None:
        raise stage.problem(at, f"{source.stage} leaves no {fits.type}: its {fits.key} is null")
    return port.key, Source(source.stage, fits.key)


def _check_free(stage: Stage, binds: Mapping[str, Source], words: Sequence[str]) -> None:
    """Raise where an override sets a key that an input binds."""
    for text, where in [*((text, None) for text in stage.overrides), *((text, COMMAND_LINE) for text in words)]:
        try:
            path = parse_override(text).path
        except UserError as error:
            if where:
                raise
            raise told(stage, UserError(error.message, where=stage.where("overrides"), hint=error.hint)) from None
        for key, source in binds.items():
            bound = tuple(key.split("."))
            if path == bound[: len(path)] or bound == path[: len(bound)]:
                message = f"stage {stage.name}: {key} is taken from {source.stage}, and {text} sets it too"
                raise UserError(message, where=where or stage.where("overrides"), hint="remove one of the two")


def _path(stage: Stage, place: Place, source: Source, done: Mapping[str, Planned]) -> str:
    """What an earlier stage leaves, as this one finds it."""
    maker = done[source.stage]
    value = str(maker.compiled.composed.get(source.key))
    if maker.place.files != place.files:
        raise stage.problem(
            "profile",
            f"takes what {source.stage} leaves on {maker.place.files}, and runs on {place.files}: nothing copies it",
            "let both run in one place, or split the pipeline and copy in between (nemotron jobs fetch)",
        )
    if maker.place.workdir == place.workdir or os.path.isabs(value):
        return value
    return os.path.abspath(os.path.join(maker.place.workdir, value))


def _check_link(stage: Stage, step: Step, composed: Composed, key: str, source: Source, maker: Planned) -> None:
    made = maker.compiled
    port = next(port for port in made.step.produces if port.key == source.key)
    try:
        check_link(made.step, made.composed, port.type, step, composed, key)
    except UserError as error:
        raise told(stage, error) from None


def _check_folders(planned: Iterable[Planned]) -> None:
    taken: dict[tuple[str, str], str] = {}
    for one in planned:
        place = one.place.files, os.path.normpath(os.path.join(one.place.workdir, one.compiled.job.output_dir))
        if place in taken:
            raise one.stage.problem("overrides", f"has the output_dir of {taken[place]}: {place[1]}")
        taken[place] = one.name


# The command line --------------------------------------------------------------------------------------------------


def _by_stage(pipeline: Pipeline, words: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of the command line by stage: [+|++|~]STAGE.key=value."""
    found: dict[str, list[str]] = {}
    for word in words:
        mark, text = re.fullmatch(r"(\+{0,2}|~)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        name, dot, rest = text.partition(".")
        if not dot or "=" in name:
            hint = f"write STAGE.key=value; stages: {', '.join(stage.name for stage in pipeline.stages)}"
            raise UserError(f"{word} names no stage", where=COMMAND_LINE, hint=hint)
        pipeline.stage(name, COMMAND_LINE)
        found.setdefault(name, []).append(mark + rest)
    return found
