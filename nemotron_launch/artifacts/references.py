"""Artifacts that a config names in place of a path: found in the ledger, checked, and replaced by where they lie.

    run:RUN              what a run made: its id, the unique start of one, or `last`
    run:last:STEP        what the newest finished run of a step made: its id, or the unique end of it
    artifact:NAME@V      version V of a name; @latest or nothing for the newest

at the key of a port that the step consumes. Which of a run's artifacts is meant follows from the port's type. A path
that has a record around it is checked in the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch.artifacts import chain, record, registry
from nemotron_launch.artifacts.record import Made
from nemotron_launch.artifacts.registry import Entry
from nemotron_launch.catalog import Step, find_step
from nemotron_launch.config.compose import Composed
from nemotron_launch.config.tree import Node, find, from_plain, put
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.job import Use
from nemotron_launch.jobs.ledger import LAST, Ledger
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.status import refresh

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

RUN, ARTIFACT = "run:", "artifact:"
_WEIGHTS = "policy/weights/iter_0000000"


def resolved(
    step: Step,
    profile: Profile | None,
    composed: Composed,
    again: Callable[[Callable[[Node], Node]], Composed],
) -> Composed:
    """The config with the paths of the artifacts that its consumed ports name, and what they were in `uses`.

    composed: with the names. again: composes it once more, with a change to its tree. UserError, with the place where
    the name was written: there is no such run or artifact; it has not finished, ended otherwise or made nothing; its
    type does not fit; it lies on another machine than the profile's, or no longer; a tokenizer, chat template or
    architecture that differs.
    """
    found: list[tuple[Use, Made, Entry]] = []
    values: dict[str, Any] = {}
    with Ledger() as ledger, Backends() as backends:
        for key in dict.fromkeys(port.key for port in step.consumes):
            given = composed.get(key)
            listed = given if isinstance(given, list) else [given]
            places: list[Any] = []
            for text in listed:
                if isinstance(text, str) and text.startswith((RUN, ARTIFACT)):
                    asked = _Asked(ledger, backends, step, composed, profile, key, text)
                    use, made, entry = _use(asked)
                    found.append((use, made, entry))
                    places.append(use.place)
                else:
                    places.append(text)
            if places != listed:
                values[key] = places if isinstance(given, list) else places[0]

    def change(root: Node) -> Node:
        for key, value in values.items():
            path = tuple(key.split("."))
            at = find(root, path)
            root = put(root, path, from_plain(value, at.source if at else composed.sources.source(path)))
        return root

    new = again(change)
    for use, made, entry in found:
        chain.check_made(made, step, new, use.key, what=_called(entry), named=use.text)
    return replace(new, uses=tuple(use for use, _, _ in found))


def check_path(step: Step, composed: Composed, key: str, text: str, path: Path) -> None:
    """As for a reference, where a path at a key of a consumed port leads to an artifact with a record on this machine.

    text: as the config has it.
    """
    found = record.find(path)
    if found is None:
        return
    what, where = f"what {found[0].step} left in {found[0].folder}", composed.sources.where(key)
    made = chain.choose(found[1], step, key, what=what, where=where, named=text)
    chain.check_made(made, step, composed, key, what=what, named=text)


@frozen
class _Asked:
    """A name at a key of a config, and all that is needed to find what it means."""

    ledger: Ledger
    backends: Backends
    step: Step
    composed: Composed
    profile: Profile | None
    key: str
    text: str

    def problem(self, message: str, hint: str | None = None) -> UserError:
        return self.composed.problem(self.key, f"{self.key}={self.text}: {message}", hint)

    def said(self, error: UserError) -> UserError:
        return self.problem(error.message, error.hint)


def _use(asked: _Asked) -> tuple[Use, Made, Entry]:
    entry = _entry(asked)
    where = asked.composed.sources.where(asked.key)
    artifacts = entry.record.artifacts
    made = chain.choose(artifacts, asked.step, asked.key, what=_called(entry), where=where, named=asked.text)
    _check_machine(asked, entry, made)
    place = made.place
    if made.type == "checkpoint_megatron" and asked.composed.get(chain.ALLOW) and made.checkpoint:
        place = os.path.join(place, _WEIGHTS)  # a trainer takes them as they are, whatever they were trained with
    use = Use(
        asked.key, made.type, asked.text, entry.name, entry.version, entry.run_id, entry.record.digest, place
    )  # fmt: skip
    return use, made, entry


def _entry(asked: _Asked) -> Entry:
    """What the name means: artifacts that are registered."""
    kind, _, name = asked.text.partition(":")
    if name in ("", f"{LAST}:") or name.startswith("@"):
        hint = "run:RUN, run:last, run:last:STEP" if kind == "run" else "artifact:NAME@VERSION, artifact:NAME@latest"
        raise asked.problem("names nothing", hint)
    if kind == "artifact":
        return _by_name(asked, name)
    run = _newest_of(asked, name.removeprefix(f"{LAST}:")) if name.startswith(f"{LAST}:") else _run(asked, name)
    return run if isinstance(run, Entry) else _of_run(asked, run)


def _by_name(asked: _Asked, name: str) -> Entry:
    plain = name.partition("@")[0]
    live = asked.ledger.runs(states=LIVE, where=lambda run: run.artifact == plain)
    _look(asked, live)
    registry.register_finished(asked.ledger, asked.backends, _warn)
    try:
        return registry.find(asked.ledger, name)
    except UserError as error:
        raise asked.said(error) from None


def _run(asked: _Asked, name: str) -> Run | Entry:
    try:
        found = asked.ledger.find(name)
    except UserError as error:
        forgotten = [one for one in registry.entries(asked.ledger) if one.run_id == name]
        if forgotten:
            return forgotten[0]
        raise asked.said(error) from None
    if len(found) > 1:
        found = sorted(found, key=lambda run: run.point or 0)
        points = [run.run_id for run in found if run.state == "finished"] or [found[0].run_id]
        hint = "one of  " + "  ".join(f"run:{point}" for point in points[:8])
        raise asked.problem(f"{found[0].sweep} is a sweep of {len(found)} points", hint)
    return _look(asked, found)[0]


def _newest_of(asked: _Asked, tail: str) -> Run:
    try:
        step_id = find_step(tail).id
    except UserError as error:
        raise asked.said(error) from None
    _look(asked, asked.ledger.runs(states=LIVE, where=lambda run: run.step == step_id))
    found = asked.ledger.runs(states={"finished"}, limit=1, where=lambda run: run.step == step_id)
    if found:
        return found[0]
    others = asked.ledger.runs(limit=1, where=lambda run: run.step == step_id)
    hint = f"the newest, {others[0].run_id}, is {others[0].state}" if others else f"nemotron steps run {step_id}"
    raise asked.problem(f"no run of {step_id} has finished", hint)


def _look(asked: _Asked, runs: list[Run]) -> list[Run]:
    """The runs as they are now."""
    return [known.run for known in refresh(asked.ledger, asked.backends, runs, _warn)]


def _of_run(asked: _Asked, run: Run) -> Entry:
    if run.state in LIVE:
        raise asked.problem(f"{run.run_id} is {run.state}", f"nemotron jobs wait {run.run_id} waits until it is over")
    if run.state != "finished":
        code = f", exit code {run.exit_code}" if run.exit_code is not None else ""
        hint = f"nemotron jobs resubmit {run.run_id} goes on with it"
        if run.checkpoints:
            hint += f"\nto take its last checkpoint as it is, name the path:  {asked.key}={run.checkpoints}"
        raise asked.problem(f"{run.run_id} has not finished: it {_ended(run.state)}{code}", hint)
    registry.register_finished(asked.ledger, asked.backends, _warn, [run])
    entry = registry.of_run(asked.ledger, run.run_id)
    if entry is None:
        hint = f"its output is in {run.output_dir}; if it is there, name the path in {asked.key}"
        raise asked.problem(f"{run.run_id} has left no record of what it made ({record.FILE})", hint)
    return entry


def _ended(state: str) -> str:
    return {"failed": "failed", "cancelled": "was cancelled", "refused": "was refused"}.get(state, f"is {state}")


# Where it lies -----------------------------------------------------------------------------------------------------


def _check_machine(asked: _Asked, entry: Entry, made: Made) -> None:
    """Raise where the artifact lies on another machine than the one on which the step will run, or no longer."""
    theirs, ours = place_of(entry.executor, entry.contact, entry.host), _place(asked.profile)
    if theirs != ours:
        there = f"{_machine(theirs)}:{made.place}" if theirs[1] else made.place
        what = "--checkpoints" if made.type.startswith("checkpoint") else "--all"
        hint = f"run the step there, or copy it here:  nemotron jobs fetch {entry.run_id} {what}, and name the copy"
        raise asked.problem(f"{_called(entry)} lies on {there}; this run is for {_machine(ours)}", hint)
    if theirs[0] != "here":
        return
    fate = record.is_there(made)
    if fate == "gone":
        hint = f"make it again, or choose another:  nemotron artifacts list --step {entry.step}"
        raise asked.problem(f"{_called(entry)} is gone: there is no {made.place}", hint)
    if fate == "replaced":
        newest = max(one.version for one in registry.entries(asked.ledger, name=entry.name))
        hint = f"the newest is artifact:{entry.name}@{newest}" if newest != entry.version else "run the step again"
        raise asked.problem(f"{_called(entry)} is gone: {made.place} holds something else by now", hint)


def place_of(executor: str, contact: Mapping[str, Any], host: str) -> tuple[str, str]:
    """The machine whose files a run sees: ("here", name of this one), ("ssh", host), ("lepton", workspace)."""
    if executor == "lepton":
        return "lepton", str(contact.get("workspace") or host)
    if executor == "local" or contact.get("type", "local") == "local":
        return "here", host or os.uname().nodename
    return "ssh", f"{contact.get('host')}:{contact.get('port') or 22}"


def _place(profile: Profile | None) -> tuple[str, str]:
    if profile is None or profile.executor == "local":
        return "here", os.uname().nodename
    if profile.executor == "lepton":
        from nemotron_launch.backends.lepton_access import contact_of

        return place_of("lepton", contact_of(profile.data), "")
    return place_of("slurm", profile.data.get("tunnel") or {}, "")


def _machine(place: tuple[str, str]) -> str:
    kind, name = place
    if kind == "here" and name == os.uname().nodename:
        return "this machine"
    return f"Lepton's workspace {name}" if kind == "lepton" else name.removesuffix(":22")


def _called(entry: Entry) -> str:
    return f"{entry.label} (run {entry.run_id})"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
