"""How long compiling takes, and what the time goes to: one dry run by stage, a matrix of 100 cells, a sweep of 1,000.

    python benchmarks/compile.py [--json] [--check]

Stages are medians of 30 in one process, after a first round. The matrix and the sweep are what `steps check` (with
rendering and `bash -n`) and `steps run --sweep` do. Their limits are 3 s each; --check ends with 1 where
one takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from nemotron_launch import bundle, compiler, matrix, plan, sweeps  # noqa: E402
from nemotron_launch.catalog import find_config, find_step, load_steps  # noqa: E402
from nemotron_launch.profiles import load_profile  # noqa: E402
from nemotron_launch.render import render  # noqa: E402

LIMIT = 3.0  # seconds
CELLS = 100
POINTS = 1000
PROFILES = ("slurm_rl_nemo_rl_dpo", "lepton_rl_nemo_rl_dpo")


def timed(work: Callable[[], Any], times: int = 30) -> float:
    """Median seconds."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def stages(profile_name: str) -> dict[str, float]:
    """Milliseconds of each stage of a dry run of DPO's default config."""
    step = find_step("rl/nemo_rl/dpo")
    config = find_config(step, "default")
    profile = load_profile(profile_name)
    composed = compiler.compose_for(step, config, (), profile)
    job = plan.plan_job(step, composed, profile)
    found = {
        "find the step": lambda: find_step("rl/nemo_rl/dpo"),
        "load the profile": lambda: load_profile(profile_name),
        "compose and check the config": lambda: compiler.compose_for(step, config, (), profile),
        "describe the bundle": lambda: bundle.bundle(step),
        "plan and cross-check (with the bundle)": lambda: plan.plan_job(step, composed, profile),
        "render": lambda: render(job),
    }
    return {name: round(timed(work) * 1000, 2) for name, work in found.items()}


def check_cells() -> tuple[int, float]:
    """How many cells, and the seconds that `steps check` takes for about a hundred of them, each compiled anew."""
    cases = matrix.cases(load_steps(), path=REPOSITORY / "profiles")
    cases = (cases * (CELLS // len(cases) + 1))[:CELLS]
    start = time.perf_counter()
    results = matrix.check(cases, path=REPOSITORY / "profiles")
    taken = time.perf_counter() - start
    wrong = [result for result in results if not result.ok]
    if wrong:
        raise SystemExit(f"{wrong[0].case.name}: {wrong[0].problems[0]}")
    return len(results), taken


def sweep() -> float:
    """Seconds for 1,000 points as one array of Slurm's: composed, checked, planned, rendered and packed."""
    step = find_step("rl/nemo_rl/dpo")
    start = time.perf_counter()
    points = sweeps.read_points(["dpo.seed=range(100)", "policy.optimizer.lr=logspace(1e-7,1e-6,10)"])
    compiled = sweeps.compile_sweep(step, find_config(step, "default"), points, (), load_profile(PROFILES[0]))
    assert compiled.array and len(points) == POINTS
    sweeps.pack(compiled.array)
    return time.perf_counter() - start


def in_own_process(arguments: list[str]) -> float:
    """Seconds of the command `nemotron …`, its start included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "nemotron_launch", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env=env)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    data: dict[str, Any] = {"stages_ms": {name: stages(name) for name in PROFILES}}
    in_own_process(["steps", "check"])
    cells, seconds = check_cells()
    data["check"] = {"cells": cells, "seconds": round(seconds, 2)}
    data["steps check, whole command"] = {"seconds": round(in_own_process(["steps", "check"]), 2)}
    data["sweep"] = {"points": POINTS, "seconds": round(sweep(), 2)}
    data["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    if given.json:
        print(json.dumps(data, indent=2))
    else:
        for name, found in data["stages_ms"].items():
            print(f"one dry run, {name}: {sum(found.values()) - found['describe the bundle']:.1f} ms in the process")
            for stage, taken in found.items():
                print(f"  {stage:40} {taken:6.2f} ms")
        for name, value in data.items():
            if name != "stages_ms":
                print(f"{name}: {value}")
    if given.check and max(data["check"]["seconds"], data["sweep"]["seconds"]) > LIMIT:
        raise SystemExit(f"more than {LIMIT} s")


if __name__ == "__main__":
    main()
