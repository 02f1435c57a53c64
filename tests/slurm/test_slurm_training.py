"""The real trainer on a real Slurm: two nodes with two processes each, without a container."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, planned_run

pytestmark = pytest.mark.slow
STEPS = 300  # milliseconds each; enough for a signal to come in between
SMALL = [
    "cluster.num_nodes=2", "cluster.procs_per_node=2", f"sft.max_num_steps={STEPS}", "sft.val_period=0",
    "sft.val_at_end=false", "sft.val_global_batch_size=40", "sft.val_generation.num_prompts=0",
    "policy.architecture.num_layers=1", "policy.architecture.hidden_size=32", 
    "policy.architecture.num_attention_heads=2",
    "policy.architecture.intermediate_size=32", "policy.train_global_batch_size=8", "policy.train_micro_batch_size=2",
    "checkpointing.save_period=100000", "checkpointing.metric_name=null",
]  # fmt: skip


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Iterator[Any]:
    made: list[Run] = []

    def make(*overrides: str, **profile: Any) -> Run:
        profile["env"] = {"OMP_NUM_THREADS": "1", **profile.get("env", {})}
        made.append(planned_run(cluster, tmp_path, "sft/megatron", "tiny", [*SMALL, *overrides], **profile))
        return made[-1]

    yield make
    for each in made:
        for job in each.jobs:
            cluster.run("scancel", job, check=False)


def metrics(run: Run) -> list[dict[str, Any]]:
    path = Path(run.job.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_nodes_with_two_processes_save_on_a_signal_and_go_on_to_the_end(run: Any, cluster: Cluster) -> None:
    job = run("output_dir=out", max_restarts=1)
    job.submit()
    cluster.until(lambda: len(metrics(job)) > 3, f"steps; {os.linesep}{job.all()}", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", job.jobs[-1])
    ended = job.end(180)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), job.all()
    assert [job.exit_code(0), job.exit_code(1), job.exit_code()] == ["85", "0", "0"]
    steps = [line["step"] for line in metrics(job) if "train/loss" in line or "loss" in line]
    assert sorted(set(steps)) == list(range(1, STEPS + 1)), job.all()
