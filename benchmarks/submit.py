"""How long a submission takes and what following costs the controller, on a real Slurm that is started for it.

    python benchmarks/submit.py [--seconds 60] [--json] [--check] [PART...]

    sweep      1,000 points: from the command's start to its array job's id, here and over SSH. Limit: 5 s.
    following  squeue, sacct and scontrol calls a minute while one job, or 100 points of a sweep, are followed.
    ssh        from a compiled job to its job id on a login node behind sshd, a new connection each time, beside the
               same steps by hand: ssh makes the folder, sftp brings the files, ssh calls sbatch, all over one
               connection (ControlMaster). Turns alternate; each of ours is a new process, paramiko's import included.
               Limit: 1.5 times.

Needs root and the Debian packages of tests/slurm/cluster.py. Calls are counted by wrappers in front of Slurm's
commands, those of the jobs' own scripts left out.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.slurm.cluster import Cluster, missing  # noqa: E402
from tests.sshd import Sshd  # noqa: E402

POINTS = 1000
LIMIT = 5.0  # seconds for the sweep
LIMIT_SSH = 1.5  # times the same by hand
TURNS = 9
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel")


class Bench:
    """A cluster, a profile for it, and the command with a ledger of its own."""

    def __init__(self, cluster: Cluster, sshd: Sshd, folder: Path) -> None:
        self.cluster, self.sshd, self.folder = cluster, sshd, folder
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
        (folder / "here.yaml").write_text(json.dumps(keys))
        (folder / "there.yaml").write_text(json.dumps({**keys, "tunnel": sshd.tunnel}))
        self.env = {
            **os.environ,
            **cluster.env,
            **sshd.environment,
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

    def submit(self, *words: str, profile: str = "here") -> Any:
        text = self.run("steps", "run", "dpo", "-c", "default", "-b", f"./{profile}.yaml", "--json", *words, *SMALL)
        return json.loads(text)

    def counted(self) -> dict[str, int]:
        """Calls of each command so far."""
        names = self.calls.read_text().split() if self.calls.exists() else []
        return {name: names.count(name) for name in COMMANDS if name in names}


SMALL = ("cluster.gpus_per_node=0", "cluster.procs_per_node=1", "policy.device=cpu", "policy.precision=float32")


def sweep(bench: Bench, seconds: float) -> dict[str, Any]:
    """Seconds for 1,000 points, the command's start included; and for one run, beside it."""
    found = {}
    many = ("--sweep", "dpo.seed=range(100)", "--sweep", "policy.optimizer.lr=logspace(1e-7,1e-6,10)")
    cases = [("one run", (), "here"), (f"{POINTS} points", many, "here")]
    cases += [(f"{name} over SSH", axes, "there") for name, axes, _ in cases]
    for name, axes, profile in cases:
        taken = []
        for _ in range(3):
            before = bench.counted()
            start = time.perf_counter()
            rows = bench.submit(*axes, profile=profile)
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


def ssh(bench: Bench, seconds: float) -> dict[str, Any]:
    """Milliseconds from a compiled job to its job id over SSH, in each way and by hand."""
    sshd = bench.sshd
    by_hand = _ByHand(bench, sshd)
    bench = copy(bench)
    bench.env = {key: value for key, value in bench.env.items() if key != "SLURM_CONF"}
    taken: dict[str, list[float]] = {}
    for turn in range(1 + TURNS):
        for name in ("by hand", "paramiko", "openssh", "whole command"):
            signed_in = sshd.log.count("Accepted")
            if name == "by hand":
                took = by_hand.submit() if turn else 0.0
            else:
                took = _over_ssh(bench, sshd, name)
                by_hand.files = by_hand.files or sorted((bench.folder / "jobs").iterdir())[-1]
                assert sshd.log.count("Accepted") == signed_in + 1, "not one connection"
            if turn:  # the first one fills caches
                taken.setdefault(name, []).append(took)
        bench.cluster.run("scancel", "--user=root", check=False)
    found: dict[str, Any] = {name: {"ms": round(statistics.median(times) * 1000)} for name, times in taken.items()}
    for name in ("paramiko", "openssh", "whole command"):
        ratios = [ours / hand for ours, hand in zip(taken[name], taken["by hand"], strict=True)]
        found[name] |= {"times by hand": round(statistics.median(ratios), 2)}
        found[name] |= {"range": [round(min(ratios), 2), round(max(ratios), 2)]}
    return found


def _over_ssh(bench: Bench, sshd: Sshd, name: str) -> float:
    """Seconds of one submission of ours, the whole command's or from the compiled job on."""
    keys = json.loads((bench.folder / "here.yaml").read_text())
    client = "openssh" if name == "openssh" else "paramiko"
    (bench.folder / "ssh.yaml").write_text(json.dumps({**keys, "tunnel": {**sshd.tunnel, "client": client}}))
    words = ["dpo", "-c", "default", "-b", "./ssh.yaml", "--json", *SMALL]
    if name == "whole command":
        start = time.perf_counter()
        bench.run("steps", "run", *words)
        return time.perf_counter() - start
    code = SUBMISSION.format(words=["steps", "run", *words])
    done = subprocess.run([sys.executable, "-c", code], env=bench.env, cwd=bench.folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stderr.split()[-1])


# The command, with a clock that starts when the job is compiled and stops at its id.
SUBMISSION = """
import sys, time
from nemotron_launch.cli import main, submit
inner = submit.submit_all
def timed(planned, asked):
    start = time.perf_counter()
    code = inner(planned, asked)
    print(time.perf_counter() - start, file=sys.stderr)
    return code
submit.submit_all = timed
sys.exit(main.run({words!r}))
"""


class _ByHand:
    """What somebody types who submits these files; with their settings for a shared connection."""

    def __init__(self, bench: Bench, sshd: Sshd) -> None:
        self.bench, self.sshd = bench, sshd
        self.files: Path | None = None
        self.turn = 0

    def submit(self) -> float:
        """Seconds."""
        assert self.files
        self.turn += 1
        folder = self.bench.folder / "by-hand" / str(self.turn)
        options = ["-F", self.sshd.config, "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
        options += ["-o", f"ControlPath={self.bench.folder}/c"]
        names = [path.name for path in self.files.iterdir() if path.suffix in (".sbatch", ".sh", ".yaml", ".gz")]
        batch = "".join(
            f"put {self.files}/{name} {folder}/{name}.part\nrename {folder}/{name}.part {folder}/{name}\n"
            for name in names
        )
        (self.bench.folder / "batch").write_text(batch)
        start = time.perf_counter()
        self._run("ssh", *options, self.sshd.tunnel["host"], f"umask 077; mkdir -p {folder}")
        self._run("sftp", "-q", *options, "-b", self.bench.folder / "batch", self.sshd.tunnel["host"])
        self._run("ssh", *options, self.sshd.tunnel["host"], f"sbatch --parsable {folder}/job.sbatch")
        took = time.perf_counter() - start
        self._run("ssh", *options, "-O", "exit", self.sshd.tunnel["host"])
        return took

    def _run(self, *command: object) -> None:
        with (self.bench.folder / "by-hand.log").open("ab") as log:  # a master would hold a pipe open
            done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60)
        if done.returncode:
            raise SystemExit(f"{command}: {(self.bench.folder / 'by-hand.log').read_text()}")


def _rate(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    rates = {name: round((after[name] - before.get(name, 0)) * 60 / seconds, 1) for name in after}
    return {name: rate for name, rate in rates.items() if rate}


PARTS: dict[str, Callable[[Bench, float], dict[str, Any]]] = {"sweep": sweep, "following": following, "ssh": ssh}


@contextmanager
def started() -> Iterator[Bench]:
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="submit-") as name:
        folder = Path(name)
        cluster = Cluster(folder / "slurm")
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        sshd = Sshd(folder / "sshd", env={"SLURM_CONF": str(cluster.conf), "HOME": name, "PATH": path})
        try:
            cluster.start()
            sshd.start()
            yield Bench(cluster, sshd, folder)
        finally:
            sshd.stop()
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
    if given.check and max([0, *(case["seconds"] for case in found.get("sweep", {}).values())]) > LIMIT:
        raise SystemExit(f"more than {LIMIT} s")
    if given.check and found.get("ssh", {}).get("paramiko", {}).get("times by hand", 0) > LIMIT_SSH:
        raise SystemExit(f"more than {LIMIT_SSH} times as long as by hand")


if __name__ == "__main__":
    main()
