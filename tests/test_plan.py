"""From a composed config to a job."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.config.compose import compose
from nemotron_launch.errors import UserError
from nemotron_launch.job import Job
from nemotron_launch.plan import new_run_id, plan_job


def job_of(step_id: str, config: str | None, *overrides: str, passthrough: tuple[str, ...] = ()) -> Job:
    step = find_step(step_id)
    return plan_job(step, compose(find_config(step, config), overrides, schema=step.schema), None, passthrough)


def test_a_training_step_is_started_by_spawn() -> None:
    job = job_of("dpo", "tiny", "cluster.procs_per_node=2")
    step = find_step("dpo")
    config = f"{job.run_dir}/config.yaml"
    spawn = ("-m", "nemotron_launch.trainer.spawn", "--procs", "2", "--output-dir", job.output_dir, "--")
    assert job.command == (sys.executable, *spawn, str(step.folder / "train.py"), "--config", config)
    assert (job.nodes, job.procs) == (1, 2)
    assert [file.path for file in job.files] == ["config.yaml"]


def test_without_procs_per_node_there_is_one_process_per_gpu() -> None:
    assert job_of("dpo", "default").procs == 8


def test_a_python_step_is_started_by_itself(tree: Path) -> None:
    job = job_of("small", None, passthrough=("--flag",))
    script = str(tree / "sft/small/train.py")
    assert job.command == (sys.executable, script, "--config", f"{job.run_dir}/config.yaml", "--flag")


def test_artifacts_are_bound_to_their_keys() -> None:
    job = job_of("dpo", "tiny")
    bound = {(artifact.type, artifact.key): artifact.value for artifact in (*job.consumes, *job.produces)}
    assert bound[("training_jsonl", "data.train.data_path")] == "step://data/train.jsonl"
    assert str(bound[("checkpoint_megatron", "checkpointing.checkpoint_dir")]).endswith("dpo-tiny/checkpoints")


def test_the_same_content_has_the_same_id_and_a_submission_a_fresh_one() -> None:
    assert job_of("dpo", "tiny") == job_of("dpo", "tiny")
    assert job_of("dpo", "tiny").run_id != job_of("dpo", "tiny", "dpo.seed=1").run_id
    step = find_step("dpo")
    composed = compose(find_config(step, "tiny"), schema=step.schema)
    assert len({new_run_id(step, composed) for _ in range(100)}) == 100


def test_sizes_that_do_not_fit_are_said_with_their_place() -> None:
    with pytest.raises(UserError) as caught:
        job_of("dpo", "tiny", "policy.train_global_batch_size=10")
    assert caught.value.where == "command line"
    assert "policy.train_global_batch_size" in caught.value.message
    assert caught.value.exit_code == 2
