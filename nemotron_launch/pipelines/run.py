"""Runs a pipeline's stages, those that are not done: here one after another, or as jobs that wait for each other."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from nemotron_launch.backends.local import check_machine, run_job
from nemotron_launch.errors import UserError
from nemotron_launch.inputs import check_inputs
from nemotron_launch.jobs.attached import recorded
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.process import alive, identity
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends, Warn
from nemotron_launch.jobs.submission import secret_files, submit_behind, uploads
from nemotron_launch.pipelines.compile import Planned, check_inputs_of, told
from nemotron_launch.pipelines.file import Pipeline
from nemotron_launch.pipelines.standing import Standing, set_aside, standings

_LONGEST = 366 * 86400.0  # seconds that a pipeline may take


class Watcher(Protocol):
    """What running tells, and who follows a run that was submitted; a terminal, or a test."""

    def say(self, line: str) -> None:
        """What comes next, or why nothing does."""

    def submitted(self, stage: str, run: Run) -> None:
        """A stage has become a job, or is one since earlier."""

    def follow(self, run: Run) -> int:
        """Follow a run to its end; its exit code."""


def run_pipeline(
    pipeline: Pipeline,
    planned: Sequence[Planned],
    ledger: Ledger,
    backends: Backends,
    watcher: Watcher,
    warn: Warn,
    *,
    attached: bool,
    first: str | None = None,
    last: str | None = None,
) -> int:
    """Run the stages that are not done, in their order; the exit code of the first that fails.

    attached: this process stays until all are over; else they are submitted, and it returns. first: this stage and
    those behind it run again. last: nothing runs that this stage does not need. UserError: what can be known before
    anything has run.
    """
    again = pipeline.behind([first]) if first else set()
    wanted = set(again or [one.name for one in planned])
    if last:
        wanted &= pipeline.before([last])
        again &= wanted
    if not wanted:
        raise UserError(f"{last} does not need {first}: no stage is left", where="--until")
    with _alone(ledger, pipeline, planned):
        found = standings(pipeline, planned, ledger, backends, warn, again=again)
        to_do = [one for one in found.values() if one.name in wanted and one.state == "to do"]
        _check(to_do, found, wanted, attached)
        return _Running(ledger, backends, watcher, warn, attached, len(to_do)).all(
            [one for one in found.values() if one.name in wanted]
        )


@contextmanager
def _alone(ledger: Ledger, pipeline: Pipeline, planned: Sequence[Planned]) -> Iterator[None]:
    """Nobody else starts stages of this pipeline in its folder meanwhile."""
    place = planned[0].place
    folder = os.path.normpath(os.path.join(os.path.abspath(place.workdir), pipeline.output_dir))
    name = f"pipeline {place.files} {folder}"
    with ledger.lock(name, identity(), lambda holder: alive(holder) is not False, seconds=_LONGEST) as ours:
        if not ours:
            hint = f"how its stages are:  nemotron pipeline status {pipeline.file}"
            raise UserError(f"{pipeline.name} is being run in {pipeline.output_dir} already", hint=hint, exit_code=1)
        yield


# Before anything runs ----------------------------------------------------------------------------------------------


def _check(to_do: Sequence[Standing], found: Mapping[str, Standing], wanted: Collection[str], attached: bool) -> None:
    for one in to_do:
        stage, job = one.planned.stage, one.planned.compiled.job
        check_inputs_of(one.planned)
        try:
            if job.executor == "local":
                check_machine(job)
            secret_files(one.row, os.environ)
        except UserError as error:
            raise told(stage, error) from None
        for name in stage.needs:
            need = found[name]
            if need.state == "to do" and name not in wanted:
                raise stage.problem("inputs", f"needs {name}, which is not done", f"--from {name} runs it, too")
            if need.state != "done" and not attached and not _waits(one, need):
                raise stage.problem("profile", *_cannot_wait(one, need))


def _waits(one: Standing, need: Standing) -> bool:
    """Whether the job of a stage can be told to wait for that of another."""
    return bool(one.planned.place.queue) and one.planned.place.queue == need.planned.place.queue


def _cannot_wait(one: Standing, need: Standing) -> tuple[str, str]:
    hint = "-r in place of -b stays here and runs one after the other"
    if one.row.executor == "lepton" == need.row.executor:
        return f"needs {need.name}, and Lepton's jobs cannot wait for another one", hint
    ours, theirs = (f"{each.row.executor} ({each.planned.place.files})" for each in (one, need))
    return f"runs by {ours} and needs {need.name}, by {theirs}: neither can wait for the other", hint


# Running -----------------------------------------------------------------------------------------------------------


class _Running:
    def __init__(
        self, ledger: Ledger, backends: Backends, watcher: Watcher, warn: Warn, attached: bool, count: int
    ) -> None:
        self.ledger, self.backends, self.watcher, self.warn = ledger, backends, watcher, warn
        self.attached, self.count = attached, count
        self.number = 0
        self.pending: dict[str, tuple[Standing, Run]] = {}  # submitted, not followed to their ends

    def all(self, stages: Sequence[Standing]) -> int:
        self.left = [one.name for one in stages if one.state == "to do"]
        for one in stages:
            if code := self._one(one):
                return code
        for name in list(self.pending) if self.attached else []:
            if code := self._await(name):
                return code
        return 0

    def _one(self, one: Standing) -> int:
        name, job = one.name, one.planned.compiled.job
        if one.state == "done":
            self.watcher.say(f"{name} is done: {job.output_dir}")
            return 0
        if one.state == "live":
            assert one.run is not None
            self.pending[name] = one, one.run
            self.watcher.say(f"{name} is {one.run.state} already: {one.run.run_id}")
            self.watcher.submitted(name, one.run)
            return 0
        here = self.attached and job.executor == "local"
        needs = [need for need in one.planned.stage.needs if need in self.pending]
        for need in needs:
            if (here or not _waits(one, self.pending[need][0])) and (code := self._await(need)):
                return code
        self._announce(one)
        if here:
            return self._here(one)
        after = [self.pending[need][1] for need in needs if need in self.pending]
        files = uploads(job, one.planned.compiled.rendered)
        [run] = submit_behind(self.ledger, self.backends, one.row, files, after, self.warn)
        self.pending[name] = one, run
        self.left.remove(name)
        self.watcher.submitted(name, run)
        return 0

    def _announce(self, one: Standing) -> None:
        self.number += 1
        text = f"stage {self.number} of {self.count}, {one.name}: {one.planned.label}"
        if one.stale and (aside := set_aside(one, self.backends)):
            text += f", again: {one.why}; what it left is in {aside}"
        elif one.run is not None and not one.stale:
            text += f", goes on: it {one.why}"
        self.watcher.say(text)
        for warning in one.planned.compiled.warnings:
            self.warn(f"stage {one.name}: {warning}")

    def _here(self, one: Standing) -> int:
        compiled = one.planned.compiled
        try:
            check_inputs(compiled.step, compiled.composed)
        except UserError as error:
            raise told(one.planned.stage, error) from None
        marks = {"pipeline": one.row.pipeline, "stage": one.name}
        with recorded(compiled.job, compiled.composed.overrides, **marks) as ended:
            code = run_job(compiled.job, ended)
        if not code:
            self.left.remove(one.name)
        return self._ended(one.name, code)

    def _await(self, name: str) -> int:
        _, run = self.pending.pop(name)
        return self._ended(name, self.watcher.follow(run))

    def _ended(self, name: str, code: int) -> int:
        if code:
            others = [other for other in self.left if other != name]
            rest = f"; not started: {', '.join(others)}" if others else ""
            self.watcher.say(f"{name} ended with exit code {code}{rest}; the same command goes on from there")
        return code
