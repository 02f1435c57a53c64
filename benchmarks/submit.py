"""How long a submission takes and what following costs the controller, on a real Slurm that is started for it.

    python benchmarks/submit.py [--seconds 60] [--json] [--check] [PART...]

    sweep      1,000 points: from the command's start to its array job's id, on the login node. Limit: 5 s.
    following  squeue, sacct and scontrol calls a minute while one job, or 100 points of a sweep, are followed.

Needs root and the Debian packages of tests/slurm/cluster.py. Calls are counted by wrappers in front of Slurm's
commands, those of the jobs' own scripts left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.slurm.cluster import Cluster, missing  # noqa: E402

POINTS = 1000
LIMIT = 5.0  # seconds for the sweep
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel")
WAITS = "import time\ntime.sleep(3600)\n"


class Bench:
    """A cluster, a profile for it, and the command with a ledger of its own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.calls = folder / "calls"
        wrappers = folder / "bin"
        wrappers.mkdir()
        for name in COMMANDS:
            real = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
            (wrappers / name).write_text(
                f'#!/bin/sh\n[ -n "$SLURM_JOB_ID" ] || echo {name} >> {self.calls}\nexec {real} "$@"\n'
            )
            (wrappers / name).chmod(0o755)
        (folder / "jobs").mkdir()
        keys = {
            "executor": "slurm", "runtime": "none", "python": sys.executable, "time": 60, "mem": 100,
            "remote_job_dir": str(folder / "jobs"), "setup": ["sleep 3600"],
        }  # fmt: skip
        (folder / "site.yaml").write_text(json.dumps(keys))
        self.env = {
            **os.environ,
            **cluster.env,
            "PATH": f"{wrappers}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "NEMOTRON_STATE_DIR": str(folder / "state"),
        }

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "nemotron_launch", *words]

    def run(self, *words: str) -> str:
        done = subprocess.run(self.command(*words), env=self.env, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def submit(self, *words: str) -> Any:
        text = self.run("steps", "run", "dpo", "-c", "default", "-b", "./site.yaml", "--json", *words, *SMALL)
        return json.loads(text)

    def counted(self) -> dict[str, int]:
        """Calls of each command so far."""
        names = self.calls.read_text().split() if self.calls.exists() else []
        return {name: names.count(name) for name in COMMANDS if name in names}


SMALL = ("cluster.gpus_per_node=0", "cluster.procs_per_node=1", "policy.device=cpu", "policy.precision=float32")


def sweep(bench: Bench, seconds: float) -> dict[str, Any]:
    """Seconds for 1,000 points, the command's start included; and for one run, beside it."""
    found = {}
    for name, axes in {
        "one run": (),
        f"{POINTS} points": ("--sweep", "dpo.seed=range(100)", "--sweep", "policy.optimizer.lr=logspace(1e-7,1e-6,10)"),
    }.items():
        taken = []
        for _ in range(3):
            before = bench.counted()
            start = time.perf_counter()
            rows = bench.submit(*axes)
            taken.append(time.perf_counter() - start)
            assert not axes or len(rows) == POINTS
            calls = {key: count - before.get(key, 0) for key, count in bench.counted().items()}
            bench.run("jobs", "cancel", "last")
        found[name] = {"seconds": round(sorted(taken)[1], 2), "calls": {k: n for k, n in calls.items() if n}}
    return found


def following(bench: Bench, seconds: float) -> dict[str, Any]:
    """Calls a minute while runs are followed to their end by one client, after it has backed off for a while."""
    found = {}
    for name, axes in {"1 job": (), "100 jobs": ("--sweep", "dpo.seed=range(100)")}.items():
        bench.submit(*axes)
        follower = subprocess.Popen(
            bench.command("jobs", "wait", "last"), env=bench.env, cwd=bench.folder, stderr=subprocess.DEVNULL
        )
        try:
            first, start = bench.counted(), time.monotonic()
            time.sleep(seconds / 2)
            half, middle = bench.counted(), time.monotonic()
            time.sleep(seconds / 2)
            last, end = bench.counted(), time.monotonic()
        finally:
            follower.terminate()
            follower.wait(30)
        found[name] = {
            "calls a minute, at first": _rate(first, half, middle - start),
            "calls a minute, later": _rate(half, last, end - middle),
        }
        bench.run("jobs", "cancel", "last")
    return found


def _rate(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    rates = {name: round((after[name] - before.get(name, 0)) * 60 / seconds, 1) for name in after}
    return {name: rate for name, rate in rates.items() if rate}


PARTS: dict[str, Callable[[Bench, float], dict[str, Any]]] = {"sweep": sweep, "following": following}


@contextmanager
def started() -> Iterator[Bench]:
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        cluster = Cluster(Path(folder) / "slurm")
        try:
            cluster.start()
            yield Bench(cluster, Path(folder))
        finally:
            cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--seconds", type=float, default=60, help="for which each following is counted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="end with 1 where a limit is not kept")
    given = parser.parse_args()
    with started() as bench:
        found = {name: PARTS[name](bench, given.seconds) for name in given.parts or PARTS}
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        for part, results in found.items():
            for name, values in results.items():
                print(f"{part}, {name}: {values}")
    slow = found.get("sweep", {}).get(f"{POINTS} points", {}).get("seconds", 0) > LIMIT
    if given.check and slow:
        raise SystemExit(f"more than {LIMIT} s")


if __name__ == "__main__":
    main()
