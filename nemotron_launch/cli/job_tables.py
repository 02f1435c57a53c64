"""How runs look: tables on a terminal, the same as plain text in a pipe, everything as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from nemotron_launch.cli.tables import print_facts, print_section, print_table
from nemotron_launch.jobs.run import OVER, Run
from nemotron_launch.jobs.run_folder import Progress
from nemotron_launch.jobs.status import Known

_COLOURS = {
    "finished": "green",
    "failed": "red",
    "lost": "red",
    "refused": "red",
    "running": "cyan",
    "stopped": "yellow",
}
_RESUMABLE = ("failed", "cancelled", "stopped", "lost", "refused")
_HIDDEN = ("submitter", "options", "contact")


def print_list(found: Sequence[Known]) -> None:
    if not found:
        click.echo("no run matches", err=True)
        return
    rows = []
    for run in (one.run for one in found):
        began = run.submitted or run.created
        what = f"{run.step.rpartition('/')[2]} -c {run.config}"
        cells = (
            run.run_id,
            run.state,
            span(time.time() - began),
            _lasted(run),
            run.profile or "-",
            run.job_id or "-",
            what,
        )
        rows.append(tuple(map(plain, cells)))
    print_table(("RUN", "STATE", "AGE", "TOOK", "PROFILE", "JOB", "STEP"), rows, whole=4)


def print_run(known: Known, progress: Progress | None, made: Sequence[tuple[str, str, str]] = ()) -> None:
    """All that is known of one run. made: label, type and path of its artifacts."""
    run, seen = known.run, known.seen
    where = {"local": f"this machine ({run.host}), process {run.job_id}"}.get(
        run.executor, f"{run.executor}{f' on {run.host}' if run.host else ''}, job {run.job_id or 'none yet'}"
    )
    facts = [
        ("run", run.run_id),
        ("step", " ".join([run.step, "-c", run.config, *run.overrides])),
        ("state", state_line(run)),
        ("why", run.reason),
        ("starts", f"expected {_when(seen.expected_start)}" if seen and seen.expected_start else ""),
        ("where", where),
        ("nodes", " ".join(seen.nodes) if seen else ""),
        ("profile", run.profile),
        ("after", " ".join(run.after)),
        ("stage", f"{run.stage} of {run.pipeline}" if run.stage else ""),
        ("submitted", _when(run.submitted)),
        ("started", _when(run.started)),
        ("ended", _when(run.ended)),
        ("folder", run.state_dir),
        ("output", run.output_dir),
    ]
    if progress:
        facts.append(("progress", progress_line(progress)))
        if progress.checkpoint is not None:
            facts.append(("checkpoint", f"{run.checkpoints}/step_{progress.checkpoint}"))
    print_facts([(name, value if name == "state" else plain(value)) for name, value in facts])
    if made:
        print_section("artifacts", (plain("  ".join(one)) for one in made))
    if progress and progress.attempts:
        print_section("attempts", (_attempt(run, progress, n) for n in range(len(progress.attempts))))
    if run.state in _RESUMABLE:
        click.echo(f"\nto go on:  nemotron jobs resubmit {run.run_id}")


def print_warnings(warnings: Sequence[Mapping[str, Any]]) -> None:
    """What a run's numbers call for."""
    texts = (f"{one['when']}\n  {one['seen']}\n  {one['then']}" for one in warnings)
    print_section("warnings", texts)


def print_points(found: Sequence[Known], progress: Mapping[str, Progress]) -> None:
    """A sweep: a row a point."""
    rows = []
    for run in (one.run for one in found):
        far = progress.get(run.run_id)
        step = "-" if far is None or far.step is None else str(far.step)
        loss = "-" if far is None else _number(far.metrics.get("train/loss"))
        code = "-" if run.exit_code is None else str(run.exit_code)
        rows.append((str(run.point), run.state, code, step, loss, _lasted(run), plain(" ".join(run.overrides))))
    print_table(("POINT", "STATE", "EXIT", "STEP", "LOSS", "TOOK", "OVERRIDES"), rows)
    counts: dict[str, int] = {}
    for one in found:
        counts[one.run.state] = counts.get(one.run.state, 0) + 1
    click.echo(", ".join(f"{count} {state}" for state, count in counts.items()), err=True)


def as_data(
    known: Known, progress: Progress | None = None, made: Sequence[tuple[str, str, str]] = ()
) -> dict[str, Any]:
    """A run for `--json`: its row, what was seen, how far it is, what it made."""
    run, seen = known.run, known.seen
    data: dict[str, Any] = {key: value for key, value in vars(run).items() if key not in _HIDDEN}
    data["secrets"] = sorted(run.secrets)
    if seen:
        data |= {"nodes_at_work": list(seen.nodes), "expected_start": seen.expected_start}
    if made:
        data["artifacts"] = [dict(zip(("name", "type", "path"), one, strict=True)) for one in made]
    if progress:
        data |= {"metrics": dict(progress.metrics), "last_checkpoint": progress.checkpoint}
        data["attempts"] = [{**vars(attempt), "nodes": dict(attempt.nodes)} for attempt in progress.attempts]
    return data


def plain(text: str) -> str:
    """Text for one line of a terminal: what would move its cursor, or cannot be written, is a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def state_line(run: Run) -> str:
    """Its state with what belongs to it: the exit code, the restarts, for how long."""
    text = click.style(run.state, fg=_COLOURS.get(run.state), bold=True)
    if run.exit_code is not None:
        text += f", exit code {run.exit_code}"
    if run.attempt:
        text += f", restarted {run.attempt} {'time' if run.attempt == 1 else 'times'}"
    since = run.started if run.state == "running" else run.submitted if run.state == "pending" else None
    return text + (f", for {span(time.time() - since)}" if since else "")


def progress_line(progress: Progress) -> str:
    """Step, epoch and loss of the last line of metrics, and how old it is."""
    metrics = progress.metrics
    if progress.step is None:
        return ""
    parts = [f"step {progress.step}"]
    if "epoch" in metrics:
        parts.append(f"epoch {metrics['epoch']}")
    for key in ("train/loss", "train/reward"):
        if isinstance(metrics.get(key), (int, float)):
            parts.append(f"{key} {_number(metrics[key])}")
    if isinstance(metrics.get("time"), (int, float)):
        parts.append(_ago(metrics["time"]))
    return ", ".join(parts)


def _attempt(run: Run, progress: Progress, n: int) -> str:
    attempt = progress.attempts[n]
    last = n + 1 == len(progress.attempts)
    end = "killed" if not last or run.state in OVER else "at work"
    code = attempt.exit_code
    if code is None and run.executor == "lepton" and len(attempt.nodes) == run.nodes:  # where nobody sums them up
        code = next((code for code in attempt.nodes.values() if code), 0)
    if code is not None:
        end = f"exit code {code}"
    bad = [f"{name} {code}" for name, code in attempt.nodes.items() if code]
    nodes = f" ({', '.join(bad)})" if bad and len(attempt.nodes) > 1 else ""
    return f"{attempt.number}  {end}{nodes}  {run.state_dir}/logs/attempt-{attempt.number}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "-"


def _when(moment: float | None) -> str:
    return time.strftime("%F %T", time.localtime(moment)) if moment else ""


def _ago(moment: float | None) -> str:
    return "-" if moment is None else f"{span(time.time() - moment)} ago"


def _lasted(run: Run) -> str:
    if run.started is None:
        return "-"
    return span((run.ended or time.time()) - run.started)


def span(seconds: float) -> str:
    """90 → 1m30s: two units at most."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])
