"""What runs have left behind: metrics, checkpoints, attempts; read through a host, in one call for many."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch.frozen import field, frozen
from nemotron_launch.hosts import Host
from nemotron_launch.jobs.run import Run

_AT_ONCE = 200  # runs that one call asks after
_LINE = 20_000  # bytes of metrics.jsonl's end that are read: a line has a few hundred
# Prints for a run, known by its number: the last lines of its metrics, its newest complete checkpoint, its attempts.
_SCRIPT = f"""\
LC_ALL=C; export LC_ALL
look() {{
    printf '@@%s\\n' "$1"
    tail -c {_LINE} -- "$2/metrics.jsonl" 2> /dev/null | tail -n 2 | sed 's/^/metrics /'
    echo # the last line may have no end yet
    if [ -n "$3" ]; then
        for step in "$3"/step_*; do
            name=${{step##*/step_}}
            case $name in '' | *[!0-9]*) continue ;; esac
            [ -f "$step/training_info.json" ] && echo "checkpoint $name"
        done
    fi
    for logs in "$4"/logs/attempt-*; do
        [ -d "$logs" ] || continue
        echo "attempt ${{logs##*-}} $(cat "$logs/exit_code" 2> /dev/null) $(stat -c %Y "$logs" 2> /dev/null)"
        for node in "$logs"/node-*.exit_code; do
            [ -f "$node" ] && name=${{node##*/}} && echo "node ${{name%.exit_code}} $(cat "$node")"
        done
    done
}}
"""


@frozen
class Attempt:
    """One attempt of a run. exit_code: None while it runs, and when it was killed. changed: when its folder last did,
    in seconds since 1970. nodes: exit code of each that has ended."""

    number: int
    exit_code: int | None = None
    changed: float | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)


@frozen
class Progress:
    """How far a run has come. metrics: the last line of metrics.jsonl. checkpoint: the newest complete one's step."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: int | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def step(self) -> int | None:
        step = self.metrics.get("step")
        return step if isinstance(step, int) else None


def progress(host: Host | None, runs: Sequence[Run]) -> dict[str, Progress]:
    """How far runs have come, by run id, as their folders say. Empty where there is no host to read them through."""
    found: dict[str, Progress] = {}
    for start in range(0, len(runs) if host else 0, _AT_ONCE):
        part = runs[start : start + _AT_ONCE]
        asked = "\n".join(
            shlex.join(["look", str(number), run.output_dir, run.checkpoints, run.state_dir])
            for number, run in enumerate(part)
        )
        assert host is not None
        answer = host.run(f"{_SCRIPT}{asked}\n:\n").stdout
        for number, text in re.findall(r"^@@(\d+)\n(.*?)(?=^@@\d+\n|\Z)", answer, re.MULTILINE | re.DOTALL):
            found[part[int(number)].run_id] = _read(text)
    return found


def _read(text: str) -> Progress:
    metrics: dict[str, Any] = {}
    steps: list[int] = []
    attempts: list[Attempt] = []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "metrics":
            metrics = _metrics(rest) or metrics
        elif kind == "checkpoint":
            steps.append(int(rest))
        elif kind == "attempt" and (found := re.fullmatch(r"(\d+) (-?\d*) (\d*)", rest)):
            code, changed = found[2], found[3]
            attempts.append(Attempt(int(found[1]), int(code) if code else None, float(changed) if changed else None))
        elif kind == "node" and attempts and (found := re.fullmatch(r"(\S+) (\d+)", rest)):
            last = attempts[-1]
            nodes = {**last.nodes, found[1]: int(found[2])}
            attempts[-1] = Attempt(last.number, last.exit_code, last.changed, nodes)
    attempts.sort(key=lambda attempt: attempt.number)
    return Progress(metrics, max(steps, default=None), tuple(attempts))


def _metrics(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None of one that is still being written."""
    try:
        read = json.loads(line)
    except ValueError:
        return None
    return read if isinstance(read, dict) else None
