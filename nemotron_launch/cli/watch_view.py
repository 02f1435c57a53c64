"""How a watched run looks in a terminal: its state, a bar, curves, warnings and the last lines of its log."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemotron_launch.cli.job_tables import plain, span
from nemotron_launch.cli.plots import braille, sparkline
from nemotron_launch.frozen import frozen
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.reports.figures import figures_of
from nemotron_launch.reports.metrics_file import MetricsFile

COLOURS = {
    "finished": "green", "failed": "red", "lost": "red", "refused": "red", "running": "cyan", "stopped": "yellow",
    "pending": "yellow",
}  # fmt: skip
# The figures of a report that fit a terminal, by key, the most telling first.
_SHOWN = {
    "reward": "reward", "accuracy": "accuracy", "loss": "loss", "val-accuracy": "held out", "kl": "KL",
    "reward-spread": "spread", "length": "length", "entropy": "entropy", "clip": "clip share",
    "truncation": "truncated", "tokens": "tokens/s", "chosen-rejected": "reward", "grad-norm": "grad norm",
    "memory": "GiB", "step-time": "step time", "lr": "learning rate",
}  # fmt: skip
_WHOLE = ("val-accuracy", "reward-spread", "chosen-rejected")  # figures whose every curve is worth a place
_ALONE = (
    "train",
    "shaped",
    "measured",
    "mean",
    "trained",
    "generated",
    "step",
    "policy",
)  # labels that say nothing new
_NARROW, _CELL = 72, 36  # columns below which a curve is one line; columns of a curve
_LOG = 9  # lines that are left for the log
_RECENT = 20  # steps by whose time what is left is reckoned


@frozen
class Curve:
    """A metric that is shown."""

    label: str
    metric: str


@frozen
class Facts:
    """What is known of a run when it is drawn. total: steps, where the config tells."""

    run: Run
    metrics: MetricsFile
    total: int | None = None
    nodes: Sequence[str] = ()
    expected_start: float | None = None
    warnings: Sequence[Mapping[str, Any]] = ()
    problems: Sequence[str] = ()
    lines: Sequence[str] = ()
    notice: str = ""


def curves_of(metrics: MetricsFile) -> list[Curve]:
    """The metrics that a terminal shows of these, the most telling first."""
    by_key = {figure.key: figure for figure in figures_of(metrics.names)}
    found = []
    for key, name in _SHOWN.items():
        lines = by_key[key].lines if key in by_key else ()
        for number, line in enumerate(lines):
            held_out = line.label.startswith("validation")
            if number == 0 or held_out or key in _WHOLE:
                said = line.label in _ALONE or line.label.lower() in (name, by_key[key].title.lower())
                more = "" if said else line.label.removeprefix("validation").strip()
                found.append(Curve(plain(f"{'val ' * held_out}{name} {more}".rstrip()), line.metric))
    return sorted(found, key=lambda one: _still(metrics.values(one.metric)))


def _still(values: Sequence[float]) -> bool:
    """Whether a metric has not moved so far: it stands behind the others."""
    return len(values) > 1 and min(values) == max(values)


def step_seconds(metrics: MetricsFile) -> float | None:
    """How long a step takes, by the last ones; None while that is not known."""
    steps, times = metrics.steps("time")[-_RECENT:], metrics.times[-_RECENT:]
    each = [
        (times[i] - times[i - 1]) / (steps[i] - steps[i - 1]) for i in range(1, len(steps)) if steps[i] > steps[i - 1]
    ]
    usual = statistics.median(each) if each else 0.0
    return usual if usual > 0 and math.isfinite(usual) else None


def view(facts: Facts, width: int, height: int | None) -> RenderableType:
    """Everything that fits into so many lines; None: as many as it takes, but of the log only the end."""
    parts: list[RenderableType] = [_head(facts, width)]
    used = 2 + len(_wrapped(_what(facts.run), width))
    if bar := _progress(facts, width):
        parts.append(bar)
        used += 1
    notes = _notes(facts, width)
    room = (height or 60) - used - sum(lines for _, lines in notes) - _LOG
    curves = [one for one in curves_of(facts.metrics) if len(facts.metrics.values(one.metric))]
    if curves and room > 1:
        drawn, lines = _curves(facts.metrics, curves, width, room)
        parts += [Text(), drawn]
        used += lines + 1
    parts += [note for note, _ in notes]
    left = 10 if height is None else height - used - sum(lines for _, lines in notes) - 1
    if facts.lines and left > 1:
        shown = facts.lines[-min(left - 1, 200) :]
        parts.append(Text("\n" + "\n".join(line[:width] for line in shown), style="dim", no_wrap=True, overflow="crop"))
    return Group(*parts)


def _head(facts: Facts, width: int) -> RenderableType:
    run = facts.run
    state = Text.assemble((run.state, f"bold {COLOURS.get(run.state, '')}"))
    if run.exit_code is not None:
        state.append(f", exit code {run.exit_code}")
    if run.attempt:
        state.append(f", attempt {run.attempt + 1}")
    since = run.started or run.submitted
    if since:
        end = run.ended if run.state not in LIVE and run.ended else time.time()
        state.append(f"  {span(end - since)}", "dim")
    if run.reason and run.state != "running":
        state.append(f"  {plain(run.reason)}", "dim")
    if facts.expected_start and run.state == "pending":
        state.append(f"  expected to start {time.strftime('%F %T', time.localtime(facts.expected_start))}", "dim")
    if facts.nodes and run.state == "running":
        state.append(f"  on {plain(' '.join(facts.nodes))}", "dim")
    state.truncate(width, overflow="ellipsis")
    name = Text(run.run_id, style="bold", no_wrap=True, overflow="ellipsis")
    return Group(name, Text("\n".join(_wrapped(_what(run), width)), style="dim"), state)


def _what(run: Run) -> str:
    return plain(" ".join([run.step, "-c", run.config, *run.overrides]))


def _wrapped(text: str, width: int) -> list[str]:
    """At most two lines of it."""
    import textwrap

    return textwrap.wrap(text, max(10, width), max_lines=2, placeholder=" …")


def _progress(facts: Facts, width: int) -> RenderableType | None:
    step, total = facts.metrics.last_step, facts.total
    if step is None:
        return None
    words = f"step {step}" + (f"/{total}" if total else "")
    each = step_seconds(facts.metrics)
    if each and facts.run.state in LIVE:
        words += f"  {_seconds(each)} a step" if width >= _NARROW else ""
        words += f"  {span((total - step) * each)} left" if total and total > step else ""
    if not total or width < len(words) + 12:
        return Text(words)
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    colour = COLOURS.get(facts.run.state, "cyan") if facts.run.state not in LIVE else "cyan"
    bar = ProgressBar(total=total, completed=min(step, total), complete_style=colour, finished_style=colour)
    table.add_row(words, bar)
    return table


def _curves(metrics: MetricsFile, curves: Sequence[Curve], width: int, room: int) -> tuple[RenderableType, int]:
    """The curves as plots beside each other where there is room for them, else a line each; and how many lines."""
    columns = max(1, width // _CELL)
    rows = math.ceil(len(curves) / columns)
    each = min(5, room // max(1, min(rows, 3))) - 1
    if width < _NARROW or each < 3:
        shown = curves[: min(room, len(curves))]
        return _lines(metrics, shown, width), len(shown)
    rows = min(rows, room // (each + 1))
    cell = width // columns - 2
    table = Table.grid(padding=(0, 2, 0, 0))
    for row in range(rows):
        part = curves[row * columns : (row + 1) * columns]
        table.add_row(*(_plot(metrics, one, cell, each) for one in part), *[""] * (columns - len(part)))
    return table, rows * (each + 1)


def _plot(metrics: MetricsFile, curve: Curve, width: int, height: int) -> RenderableType:
    """Its name, how far it has reached, its last value; below them the curve."""
    values = metrics.values(curve.metric)
    known = [value for value in values if math.isfinite(value)]
    last, reach = _last(values), f"{number(min(known))} … {number(max(known))}" if len(known) > 1 else ""
    title = Text(curve.label, style="bold", no_wrap=True)
    title.truncate(max(4, width - len(last) - 1), overflow="ellipsis")
    room = width - title.cell_len - len(last) - len(reach) - 3
    if reach and room >= 0:
        title.append(" " * (room + 1) + reach + "  ", "not bold dim")
    else:
        title.append(" " * max(1, width - title.cell_len - len(last)))
    title.append(last, "bold cyan")
    return Group(title, Text("\n".join(braille(values, width, height)), style="cyan"))


def _lines(metrics: MetricsFile, curves: Sequence[Curve], width: int) -> RenderableType:
    names = min(max(len(one.label) for one in curves), 16 if width < 60 else 26)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=names)
    table.add_column(no_wrap=True, justify="right", style="bold cyan")
    table.add_column(no_wrap=True, style="cyan")
    texts = [_last(metrics.values(one.metric)) for one in curves]
    room = max(4, width - names - max(map(len, texts)) - 3)
    for curve, text in zip(curves, texts, strict=True):
        table.add_row(Text(curve.label), text, sparkline(metrics.values(curve.metric), min(room, 60)))
    return table


def _notes(facts: Facts, width: int) -> list[tuple[RenderableType, int]]:
    """Warnings and what cannot be read, with how many lines each takes."""
    import textwrap

    notes = [(f"⚠ {one['when']} {one['seen']} {one['then']}", "yellow") for one in facts.warnings[:3]]
    notes += [(f"! {text}", "red") for text in facts.problems[:2]]
    notes += [(facts.notice, "magenta")] if facts.notice else []
    found: list[tuple[RenderableType, int]] = []
    for text, style in notes:
        lines = textwrap.wrap(plain(text), max(10, width - 2), max_lines=4, placeholder=" …", subsequent_indent="  ")
        found.append((Padding(Text("\n".join(lines), style=style), (1, 0, 0, 0)), len(lines) + 1))
    return found


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _last(values: Sequence[float]) -> str:
    return number(next((value for value in reversed(values) if math.isfinite(value)), None))


def _seconds(value: float) -> str:
    return f"{value:.2g}s" if value < 10 else span(value)


def table_view(facts: Sequence[Facts], width: int, height: int | None) -> RenderableType:
    """Several runs, or the points of a sweep: a row each, those at work first where not all fit."""
    points = all(one.run.sweep for one in facts) and len({one.run.sweep for one in facts}) == 1
    counts: dict[str, int] = {}
    for one in facts:
        counts[one.run.state] = counts.get(one.run.state, 0) + 1
    title = Text(
        facts[0].run.sweep if points else f"{len(facts)} runs", style="bold", no_wrap=True, overflow="ellipsis"
    )
    states = Text(", ".join(f"{count} {state}" for state, count in counts.items()), style="dim")
    room = None if height is None else max(1, height - 5 - (2 if any(one.notice for one in facts) else 0))
    shown = list(facts)
    if room is not None and len(shown) > room:
        shown.sort(key=lambda one: (one.run.state not in LIVE, facts.index(one)))
        shown = sorted(shown[: room - 1], key=facts.index)
    metric, label = _common(facts)
    table = Table.grid(padding=(0, 2, 0, 0))
    heads = ["point" if points else "run", "state", "step"] + ([label, ""] if metric and width >= 60 else [])
    if width >= _NARROW:
        heads.append("overrides")
    table.add_row(*(Text(head, style="bold") for head in heads))
    for one in shown:
        table.add_row(*_cells(one, points, metric, width, len(heads)))
    parts: list[RenderableType] = [title, states, Text(), table]
    if len(shown) < len(facts):
        parts.append(Text(f"… and {len(facts) - len(shown)} more", style="dim"))
    parts += [note for one in facts[:1] for note, _ in _notes(one, width)]
    return Group(*parts)


def _cells(one: Facts, points: bool, metric: str, width: int, count: int) -> list[Text]:
    run, step = one.run, one.metrics.last_step
    name = str(run.point) if points else run.run_id
    far = "–" if step is None else f"{step}/{one.total}" if one.total else str(step)
    cells = [
        Text(name, no_wrap=True, overflow="ellipsis"),
        Text(run.state + (f" {run.exit_code}" if run.exit_code else ""), style=COLOURS.get(run.state, "")),
        Text(far),
    ]
    if metric and width >= 60:
        values = one.metrics.values(metric)
        cells += [Text(_last(values), style="bold cyan"), Text(sparkline(values, 16), style="cyan")]
    if len(cells) < count:
        # Their last words tell points apart: optim.lr=1e-6 is lr=1e-6.
        told = " ".join(f"{key.rpartition('.')[2]}{is_}{value}" for key, is_, value in map(_parted, run.overrides))
        cells.append(Text(plain(told), no_wrap=True, overflow="ellipsis", style="dim"))
    return cells


def _parted(override: str) -> tuple[str, str, str]:
    return override.partition("=")


def _common(facts: Sequence[Facts]) -> tuple[str, str]:
    """The most telling metric that most of the runs have, and what it is called."""
    votes: dict[tuple[str, str], int] = {}
    for one in facts:
        for curve in curves_of(one.metrics)[:1]:
            votes[curve.metric, curve.label.lower()] = votes.get((curve.metric, curve.label.lower()), 0) + 1
    return max(votes, key=lambda key: votes[key]) if votes else ("", "")
