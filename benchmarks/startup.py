"""How long the light commands take, next to a bare interpreter and to the bare import of their libraries, in one run.

    python benchmarks/startup.py [--runs 15] [--json] [--check]

Each command runs in its own process with its output in a pipe, all of them in turns so that a busy moment hits every
one alike; the table has the median and the smallest of the runs, the ratio of the smallest to `python -c pass`, and to
the bare import. A first turn fills the caches: byte code, templates, YAML, the bundle.

What a dry run may cost: 1.25 times the bare import of click, yaml and jinja2, and 60 MiB. --check ends with 1 where it
costs more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BARE = "python -c pass"
LIBRARIES = "import click, yaml"
ALL_LIBRARIES = "import click, yaml, jinja2"
# What the installed `nemotron` does.
NEMOTRON = ["-c", "import sys; from nemotron_launch.cli.main import main; sys.exit(main())"]
DPO = ["steps", "run", "rl/nemo_rl/dpo", "-c", "default"]
SLURM_DRY_RUN = "steps run … -r slurm_rl_nemo_rl_dpo -d"
LEPTON_DRY_RUN = "steps run … -r lepton_rl_nemo_rl_dpo -d"
COMMANDS = {
    BARE: ["-c", "pass"],
    LIBRARIES: ["-c", LIBRARIES],
    ALL_LIBRARIES: ["-c", ALL_LIBRARIES],
    "--help": [*NEMOTRON, "--help"],
    "--version": [*NEMOTRON, "--version"],
    "steps list": [*NEMOTRON, "steps", "list"],
    "steps list --json": [*NEMOTRON, "steps", "list", "--json"],
    "steps show dpo": [*NEMOTRON, "steps", "show", "dpo"],
    "steps run dpo -c tiny -d": [*NEMOTRON, "steps", "run", "dpo", "-c", "tiny", "-d"],
    SLURM_DRY_RUN: [*NEMOTRON, *DPO, "-r", "slurm_rl_nemo_rl_dpo", "-d"],
    LEPTON_DRY_RUN: [*NEMOTRON, *DPO, "-r", "lepton_rl_nemo_rl_dpo", "-d"],
}
LIMIT = 1.25
LARGEST_MIB = 60


def measure(arguments: list[str], folder: str) -> tuple[float, float]:
    """Wall-clock seconds and peak memory in MiB of one process."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles every module
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *arguments], env=env, cwd=folder, **pipes) as process:
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
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.runs + 1):
            for name, arguments in COMMANDS.items():
                took, peak = measure(arguments, folder)
                memory[name] = max(peak, memory.get(name, 0.0))
                if turn:
                    seconds[name].append(took)
    # The smallest: what the machine does besides can only add to a time.
    best = {name: min(times) for name, times in seconds.items()}
    rows = [
        {
            "command": name,
            "median_ms": round(statistics.median(times) * 1000, 1),
            "best_ms": round(best[name] * 1000, 1),
            "ratio": round(best[name] / best[BARE], 2),
            "to_import": round(best[name] / best[ALL_LIBRARIES], 2),
            "peak_mib": round(memory[name], 1),
        }
        for name, times in seconds.items()
    ]
    if given.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'command':42} {'median ms':>9} {'best ms':>8} {'x bare':>7} {'x import':>8} {'peak MiB':>9}")
        for row in rows:
            print(
                f"{row['command']:42} {row['median_ms']:9} {row['best_ms']:8} {row['ratio']:7} {row['to_import']:8} "
                f"{row['peak_mib']:9}"
            )
    dry_runs = [row for row in rows if row["command"] in (SLURM_DRY_RUN, LEPTON_DRY_RUN)]
    if given.check and any(row["to_import"] > LIMIT or row["peak_mib"] > LARGEST_MIB for row in dry_runs):
        raise SystemExit(f"a dry run costs more than {LIMIT} times its libraries, or {LARGEST_MIB} MiB")


if __name__ == "__main__":
    main()
