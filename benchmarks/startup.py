"""How long the light commands take, next to a bare interpreter and to the bare import of their libraries, in one run.

    python benchmarks/startup.py [--runs 15] [--json]

Each command runs in its own process with its output in a pipe, all of them in turns so that a busy moment hits every
one alike; the table has the median and the smallest of the runs, and the ratio of the medians to `python -c pass`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BARE = "python -c pass"
LIBRARIES = "import click, yaml"
NEMOTRON = ["-m", "nemotron_launch"]
COMMANDS = {
    BARE: ["-c", "pass"],
    LIBRARIES: ["-c", LIBRARIES],
    "nemotron --help": [*NEMOTRON, "--help"],
    "nemotron --version": [*NEMOTRON, "--version"],
    "nemotron steps list": [*NEMOTRON, "steps", "list"],
    "nemotron steps list --json": [*NEMOTRON, "steps", "list", "--json"],
    "nemotron steps show dpo": [*NEMOTRON, "steps", "show", "dpo"],
    "nemotron steps run dpo -c tiny -d": [*NEMOTRON, "steps", "run", "dpo", "-c", "tiny", "-d"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall-clock seconds and peak memory in MiB of one process."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    memory: dict[str, float] = {}
    for turn in range(given.runs + 1):
        for name, arguments in COMMANDS.items():
            took, peak = measure(arguments)
            memory[name] = max(peak, memory.get(name, 0.0))
            if turn:  # the first turn fills the caches
                seconds[name].append(took)
    bare = statistics.median(seconds[BARE])
    rows = [
        {
            "command": name,
            "median_ms": round(statistics.median(times) * 1000, 1),
            "best_ms": round(min(times) * 1000, 1),
            "ratio": round(statistics.median(times) / bare, 2),
            "peak_mib": round(memory[name], 1),
        }
        for name, times in seconds.items()
    ]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'command':36} {'median ms':>10} {'best ms':>8} {'x bare':>7} {'peak MiB':>9}")
    for row in rows:
        print(f"{row['command']:36} {row['median_ms']:10} {row['best_ms']:8} {row['ratio']:7} {row['peak_mib']:9}")


if __name__ == "__main__":
    main()
