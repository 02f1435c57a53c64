"""Sweeps on a real Slurm: one array, a row and an output folder for each point, failed points submitted again alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Nemotron
from tests.sites import SLURM, profile_file
from tests.slurm.cluster import WAIT, Cluster

OVER = {"refused", "finished", "failed", "cancelled", "stopped", "lost"}


class Site:
    """The command with a ledger and a folder of runs of its own, and the profile `cluster`."""

    def __init__(self, cluster: Cluster, nemotron: Nemotron, folder: Path, **profile: Any) -> None:
        self.cluster, self.nemotron = cluster, nemotron
        self.jobs = folder / "all jobs"
        self.state = folder / "state"
        self.jobs.mkdir()
        # With little more than 5 minutes Slurm would send the signal to save at once.
        base = {**SLURM, "account": None, "mem": 100, "python": sys.executable, "time": "00:30:00"}
        profile_file(folder / "profiles", "cluster", {**base, **profile}, remote_job_dir=str(self.jobs))
        self.profiles = folder / "profiles"

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.nemotron(*words, **{**self.cluster.env, "NEMOTRON_STATE_DIR": str(self.state), **env})

    def submit(self, *words: str) -> list[dict[str, Any]]:
        done = self("steps", "run", *words, "-b", "cluster", "--profiles", str(self.profiles), "--json")
        assert done.returncode == 0, done.stderr
        found: Any = json.loads(done.stdout)
        return found if isinstance(found, list) else [found]

    def points(self) -> list[dict[str, Any]]:
        done = self("jobs", "status", "last", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return sorted(found if isinstance(found, list) else [found], key=lambda row: row["point"] or 0)

    def until_over(self, seconds: float = WAIT) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        rows = self.points()
        while not all(row["state"] in OVER for row in rows):
            assert time.monotonic() < end, (rows, self.all())
            time.sleep(0.2)
            rows = self.points()
        return rows

    def all(self) -> str:
        paths = [path for path in sorted(self.jobs.rglob("*")) if path.suffix in (".out", ".log")]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in paths)


MakeSite = Callable[..., Site]


@pytest.fixture
def site(cluster: Cluster, nemotron: Nemotron, tmp_path: Path) -> Any:
    """Makes a site; cancels what a failed test leaves behind."""
    made: list[Site] = []

    def make(**profile: Any) -> Site:
        made.append(Site(cluster, nemotron, tmp_path, **profile))
        return made[-1]

    yield make
    for each in made:
        each("jobs", "cancel", "last")


def test_points_run_as_one_array_each_with_its_own_config_output_and_row(tree: Path, site: MakeSite) -> None:
    here = site()
    rows = here.submit("small", "--sweep", "exit=0,3", "--sweep", "+env_vars.A='x $y',2", "--max-parallel", "2")
    assert [row["run_id"] for row in rows] == [f"{rows[0]['run_id'][:-2]}.{n}" for n in range(4)]
    assert len({row["job_id"].partition("_")[0] for row in rows}) == 1
    assert [row["job_id"].partition("_")[2] for row in rows] == ["0", "1", "2", "3"]
    assert here.cluster.show(rows[3]["job_id"]).get("ArrayTaskThrottle") == "2"
    over = here.until_over()
    assert [(row["state"], row["exit_code"]) for row in over] == [
        ("finished", 0), ("finished", 0), ("failed", 3), ("failed", 3)
    ], here.all()  # fmt: skip
    outputs = [Path(row["output_dir"]) for row in over]
    assert len(set(outputs)) == 4
    for output, (code, value) in zip(outputs, [(0, "x $y"), (0, 2), (3, "x $y"), (3, 2)], strict=True):
        config = json.loads((output / "seen.json").read_text())["config"]
        assert (config["exit"], config["env_vars"]["A"]) == (code, value)
        assert here.jobs / config["output_dir"] == output
        assert (output / "checkpoints/step_1").is_dir()
    # The code travelled once and was unpacked once.
    run_dir = Path(over[0]["run_dir"])
    assert len(list(run_dir.glob("code*"))) == 2 and (run_dir / "code/nemotron_launch").is_dir()


def test_failed_points_are_submitted_again_alone(tree: Path, site: MakeSite) -> None:
    here = site()
    here.submit("small", "--sweep", "exit=0,3,4", "--max-parallel", "2")
    first = here.until_over()
    done = here("jobs", "resubmit", "last")
    assert done.returncode == 0, done.stderr
    second = here.until_over()
    same = ("job_id", "state", "started", "ended")
    assert all(second[0][name] == first[0][name] for name in same)
    for n in (1, 2):
        assert second[n]["state"] == "failed" and second[n]["job_id"] != first[n]["job_id"]
        assert second[n]["job_id"].endswith(f"_{n}")
        assert here.cluster.show(second[n]["job_id"])["ArrayTaskThrottle"] == "2"
        assert len(list(Path(second[n]["state_dir"], "logs").iterdir())) == 2


@pytest.mark.slow
def test_a_point_that_resumes_takes_no_other_with_it_and_secrets_stay_until_the_last(
    tree: Path, site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point's job may have the array's own number, which to Slurm's commands means all of its points."""
    monkeypatch.setenv("API_TOKEN", "s3cret")
    here = site(max_restarts=1, secrets=["API_TOKEN"])
    here.submit("small", "--sweep", "exit=0,85,0,85", "--sweep", "+env_vars.A=1,2,3,4", "--zip", "--max-parallel", "2")
    over = here.until_over(120)
    assert [(row["state"], row["attempt"]) for row in over] == [
        ("finished", 0), ("stopped", 1), ("finished", 0), ("stopped", 1)
    ], here.all()  # fmt: skip
    for row, attempts in zip(over, (1, 2, 1, 2), strict=True):
        assert len(list(Path(row["state_dir"], "logs").iterdir())) == attempts
        seen = json.loads((Path(row["output_dir"]) / "seen.json").read_text())
        assert seen["env"]["API_TOKEN"] == "s3cret"
    assert not (Path(over[0]["run_dir"]) / "secrets.env").exists()


def test_an_attached_sweep_ends_with_the_first_failure(tree: Path, site: MakeSite) -> None:
    here = site()
    done = here("steps", "run", "small", "--sweep", "exit=0,3", "-r", "cluster", "--profiles", str(here.profiles))
    assert done.returncode == 3, done.stderr + done.stdout
    assert "over, exit code 3" in done.stdout


def test_more_points_than_the_cluster_takes_are_refused_with_the_number(tree: Path, site: MakeSite) -> None:
    """1001 is Slurm's own default for MaxArraySize, and the test cluster's; the largest index is one less."""
    here = site()
    axis = "+env_vars.A=range(1002)"
    done = here("steps", "run", "small", "--sweep", axis, "-b", "cluster", "--profiles", str(here.profiles))
    assert done.returncode == 1, done.stdout
    assert "more points than this cluster takes in one array, which is 1001" in done.stderr
    listed = json.loads(here("jobs", "list", "--limit", "2000", "--json").stdout)
    assert [row["state"] for row in listed] == ["refused"] * 1002


# The real trainer.

TINY = [
    "cluster.num_nodes=2", "cluster.procs_per_node=2", "dpo.max_num_steps=3", "dpo.val_period=0",
    "dpo.val_at_start=false", "dpo.val_at_end=false", "dpo.val_global_batch_size=40",
    "dpo.val_generation.num_prompts=0", "checkpointing.pretrained_checkpoint.path=null",
    "policy.architecture.num_layers=1", "policy.architecture.hidden_size=32",
    "policy.architecture.num_attention_heads=2", "policy.architecture.intermediate_size=32",
    "policy.train_global_batch_size=8", "policy.train_micro_batch_size=2", "checkpointing.metric_name=null",
]  # fmt: skip


@pytest.mark.slow
def test_tiny_dpo_on_two_nodes_with_two_processes_as_an_array_of_three(
    site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = site(mem=2000, env={"OMP_NUM_THREADS": "1"}, time="00:10:00")
    here.submit("dpo", "-c", "tiny", *TINY, "--sweep", "dpo.reference_policy_kl_penalty=0.05,0.1,0.2")
    over = here.until_over(300)
    assert [(row["state"], row["exit_code"]) for row in over] == [("finished", 0)] * 3, here.all()
    losses = []
    for row, penalty in zip(over, ("0.05", "0.1", "0.2"), strict=True):
        output = Path(row["output_dir"])
        assert output.name == f"reference_policy_kl_penalty={penalty}" and row["nodes"] == 2
        assert (output / "checkpoints" / "step_3").is_dir()
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in metrics if "train/loss" in line][-1])
    # The same data and start; after steps, what the penalty does.
    assert len(set(losses)) == 3
