"""What a pipeline says while it runs, and how its stages are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from nemotron_launch.cli.job_tables import plain
from nemotron_launch.cli.tables import print_table
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.pipelines.standing import Standing


class Terminal:
    """Prints what running tells, and follows jobs. See pipelines.run.Watcher."""

    def __init__(
        self, ledger: Ledger, backends: Backends, *, attached: bool, on_interrupt: str | None, as_json: bool
    ) -> None:
        self.ledger, self.backends = ledger, backends
        self.attached, self.on_interrupt, self.as_json = attached, on_interrupt, as_json
        self.jobs: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        sys.stdout.flush()
        click.echo(f"nemotron: {line}", err=True)

    def submitted(self, stage: str, run: Run) -> None:
        from nemotron_launch.cli import submit

        self.jobs.append({"stage": stage, **submit.as_data([run]), "after": list(run.after)})
        if not self.as_json:
            submit.say_submitted([run], self.attached)

    def follow(self, run: Run) -> int:
        from nemotron_launch.cli.following import follow_to_end
        from nemotron_launch.jobs.follow import Detached

        try:
            return follow_to_end(self.ledger, self.backends, [run], on_interrupt=self.on_interrupt)
        except Detached as error:
            hint = f"{error.hint}\nthe pipeline's command, run again, follows it and goes on behind it"
            raise Detached(error.message, hint=hint, exit_code=error.exit_code) from None

    def close(self) -> None:
        """Print what waits for the end."""
        if self.as_json:
            click.echo(json.dumps(self.jobs, indent=2))


# How it is --------------------------------------------------------------------------------------------------------


def print_standings(found: Sequence[Standing]) -> None:
    rows = [
        (
            one.name,
            one.planned.label,
            _state(one),
            one.run.run_id if one.run else "-",
            one.planned.compiled.job.output_dir,
        )
        for one in found
    ]
    print_table(("STAGE", "STEP", "STATE", "RUN", "OUTPUT"), [tuple(map(plain, row)) for row in rows], whole=1)


def _state(one: Standing) -> str:
    if one.state == "done":
        return "done"
    if one.state == "live":
        assert one.run is not None
        return one.run.state + (f": {one.why}" if one.why else "")
    return "to do" + (f": {one.why}" if one.why else "")


def as_data(one: Standing) -> dict[str, Any]:
    """A stage as `pipeline status --json` prints it."""
    run, compiled = one.run, one.planned.compiled
    return {
        "stage": one.name,
        "step": compiled.step.id,
        "config": compiled.composed.name,
        "profile": compiled.job.profile,
        "state": one.state if one.state != "live" or run is None else run.state,
        "why": one.why,
        "run_id": run.run_id if run else None,
        "run_state": run.state if run else None,
        "exit_code": run.exit_code if run else None,
        "output_dir": one.row.output_dir,
        "after": list(one.planned.stage.needs),
        "outputs": {
            port.key: compiled.composed.get(port.key)
            for port in compiled.step.produces
            if compiled.composed.get(port.key)
        },
    }
