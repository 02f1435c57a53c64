"""What does not fit together is said before anything is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron_launch import crosschecks
from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.errors import UserError
from nemotron_launch.job import Job
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.profiles import Profile
from tests.sites import LEPTON, SLURM, profile

PYXIS = {**SLURM, "runtime": "pyxis"}
SSH = {**SLURM, "tunnel": {"type": "ssh", "host": "login"}}


def plan(where: Profile | None, *overrides: str, config: str = "default") -> Job:
    step = find_step("dpo")
    return plan_job(step, compose_for(step, find_config(step, config), overrides, where), where)


def refused(where: Profile | None, *overrides: str, config: str = "default") -> UserError:
    with pytest.raises(UserError) as caught:
        plan(where, *overrides, config=config)
    return caught.value


def warned(where: Profile | None, *overrides: str, config: str = "default") -> list[str]:
    step = find_step("dpo")
    composed = compose_for(step, find_config(step, config), overrides, where)
    return crosschecks.warnings(plan_job(step, composed, where), composed, where)


# GPUs --------------------------------------------------------------------------------------------------------------


def test_more_processes_than_gpus_are_refused() -> None:
    error = refused(None, "cluster.procs_per_node=16", "dpo.val_global_batch_size=16")
    assert error.message == "16 processes on each node and 8 GPUs: each process takes one"
    assert error.where == "command line"


def test_the_profiles_nodes_count_in_the_batch_arithmetic(tmp_path: Path) -> None:
    error = refused(profile(tmp_path, SLURM, nodes=2), "dpo.val_global_batch_size=8")
    assert "8 pairs do not divide into micro-batches of 1 on 16 data-parallel ranks" in error.message


def test_parallel_sizes_must_divide_the_profiles_gpus(tmp_path: Path) -> None:
    error = refused(profile(tmp_path, SLURM, gpus_per_node=6), "policy.megatron_cfg.tensor_model_parallel_size=4")
    assert "does not divide the 6 processes" in error.message


SERVE = "+run.services.judge={command: [serve], port: 8000, gpus: 4}"


def test_a_services_gpus_must_fit_beside_the_processes() -> None:
    error = refused(None, SERVE)
    assert error.message == "8 processes and the 4 GPUs of judge do not fit into a node of 8 GPUs"
    assert error.hint is not None
    assert error.hint.startswith("set cluster.procs_per_node=4, or give judge nodes of its own")
    plan(None, SERVE, "cluster.procs_per_node=4")


def test_services_on_one_node_need_ports_of_their_own() -> None:
    other = "+run.services.reward={command: [serve], port: 8000}"
    error = refused(None, SERVE, other, "cluster.procs_per_node=4")
    assert error.message == "run.services.reward and run.services.judge share a node and the port 8000"


def test_this_machine_has_no_node_for_a_service_of_its_own() -> None:
    assert "this machine is one node" in refused(None, SERVE, "+run.services.judge.nodes=1").message


def test_a_shape_must_have_the_gpus(tmp_path: Path) -> None:
    small = profile(tmp_path, {**LEPTON, "resource_shape": "gpu.4xh100"})
    error = refused(small)
    assert error.message == "profile site: 8 GPUs are used on each node, and gpu.4xh100 has 4"
    assert error.where == f"{tmp_path}/site.yaml:7"
    plan(small, "cluster.gpus_per_node=4")
    assert "no GPUs" not in " ".join(warned(small, config="tiny"))


@pytest.mark.parametrize(("shape", "fits"), [("gpu.a10", 1), ("cpu.small", 0), ("own-shape", 8), ("gpu.16xb200", 8)])
def test_a_shapes_name_says_its_gpus(tmp_path: Path, shape: str, fits: int) -> None:
    where = profile(tmp_path, {**LEPTON, "resource_shape": shape})
    plan(where, f"cluster.gpus_per_node={fits}", "cluster.procs_per_node=1")
    if fits < 8:
        assert f"and {shape} has {fits}" in refused(where).message


def test_gpus_of_a_shape_that_nothing_uses_are_said(tmp_path: Path) -> None:
    lines = warned(profile(tmp_path, LEPTON), "cluster.gpus_per_node=4")
    assert "4 of the 8 GPUs of gpu.8xh100-80gb are used on each node" in lines


def test_nodes_must_be_whole_segments(tmp_path: Path) -> None:
    assert "1 nodes are not whole segments of 4" in refused(profile(tmp_path, SLURM, segment=4)).message


# Paths -------------------------------------------------------------------------------------------------------------


def test_what_a_container_reads_must_be_mounted(tmp_path: Path) -> None:
    error = refused(profile(tmp_path, PYXIS), "data.train.data_path=/data/pairs/train.jsonl")
    assert error.message == (
        "data.train.data_path: /data/pairs/train.jsonl is read, and no mount of the container covers it"
    )
    assert error.hint == "add to the profile's mounts:  /data/pairs:/data/pairs\nor name a path below /lustre/jobs"
    assert error.where == "command line"
    plan(profile(tmp_path, PYXIS, mounts=["/data:/data"]), "data.train.data_path=/data/pairs/train.jsonl")


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=/scratch/out",
        "checkpointing.checkpoint_dir=/scratch/checkpoints",
        "checkpointing.pretrained_checkpoint.path=/scratch/step_1",
        "policy.model_name=/scratch/llama",
        "data.val_data_paths={more: /scratch/more.jsonl}",
        "data.train.data_path=[/lustre/jobs/a.jsonl,/scratch/b.jsonl]",
        "logger.log_dir=/scratch/logs",
    ],
)
def test_every_path_of_the_config_counts(tmp_path: Path, override: str) -> None:
    error = refused(profile(tmp_path, PYXIS), override)
    assert "/scratch" in error.message
    assert "no mount of the container covers it" in error.message
    plan(profile(tmp_path, PYXIS, mounts=["/scratch:/scratch"]), override)


def test_a_mount_covers_whole_folders_only(tmp_path: Path) -> None:
    where = profile(tmp_path, PYXIS, mounts=["/data:/data"])
    assert "/database/x" in refused(where, "data.train.data_path=/database/x.jsonl").message
    assert "/data/../etc" in refused(where, "data.train.data_path=/data/../etc/x.jsonl").message


def test_the_job_folder_and_what_images_carry_need_no_mount(tmp_path: Path) -> None:
    where = profile(tmp_path, PYXIS)
    plan(where, "data.train.data_path=/lustre/jobs/data/x.jsonl", "policy.model_name=/opt/models/llama")
    assert "is written to" in refused(where, "output_dir=/opt/out").message


def test_a_read_only_mount_is_not_written_to(tmp_path: Path) -> None:
    where = profile(tmp_path, PYXIS, mounts=["/data:/data:ro"])
    plan(where, "data.train.data_path=/data/x.jsonl")
    assert "is written to, and its mount /data is read-only" in refused(where, "output_dir=/data/out").message


def test_on_lepton_the_job_folder_must_lie_in_a_volume(tmp_path: Path) -> None:
    error = refused(profile(tmp_path, {**LEPTON, "remote_job_dir": "/jobs"}))
    assert "no mount covers remote_job_dir /jobs" in error.message


@pytest.mark.parametrize("base", [PYXIS, SSH, LEPTON])
def test_a_file_of_this_machine_is_no_input_of_a_job_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    error = refused(profile(tmp_path, base), f"data.train.data_path={tmp_path}/pairs.jsonl")
    assert error.message.startswith(f"data.train.data_path: {tmp_path}/pairs.jsonl")
    assert "this machine" in error.message
    assert error.hint is not None
    assert "mounts" in error.hint or "copy it there" in error.hint


def test_on_a_login_node_without_containers_the_job_sees_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    plan(profile(tmp_path, SLURM), f"data.train.data_path={tmp_path}/pairs.jsonl")


def test_a_home_folder_means_another_one_there(tmp_path: Path) -> None:
    error = refused(profile(tmp_path, SLURM), "data.train.data_path=~/pairs.jsonl")
    assert "~/pairs.jsonl is a home folder, which is another one where the job runs" in error.message


def test_hub_ids_and_addresses_are_no_paths(tmp_path: Path) -> None:
    plan(profile(tmp_path, PYXIS), "policy.model_name=owner/name", "data.train.data_path=owner/rows")


# Environment -------------------------------------------------------------------------------------------------------


def test_a_secret_has_no_place_in_env() -> None:
    error = refused(None, "run.env={HF_TOKEN: hf_abc}")
    assert error.message == "run.env.HF_TOKEN: HF_TOKEN is a secret, and env is written into the job's files"
    assert error.hint == "name it instead:  run.secrets: [HF_TOKEN]"
    assert "hf_abc" not in str(error)
    plan(None, "run.env={TOKENIZERS_PARALLELISM: false}")


def test_the_profile_may_say_that_a_name_is_no_secret(tmp_path: Path) -> None:
    plan(profile(tmp_path, SLURM, secrets={"CACHE_KEY": False}, env={"CACHE_KEY": "x"}))


def test_a_secret_of_the_config_is_one_of_the_job(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, secrets=["HF_TOKEN"])
    names = [secret.name for secret in plan(where, "run.secrets=[WANDB_API_KEY,HF_TOKEN]").secrets]
    assert names == ["HF_TOKEN", "WANDB_API_KEY"]


# Time --------------------------------------------------------------------------------------------------------------


def test_saving_after_the_time_limit_is_refused(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM)
    error = refused(where, "checkpointing.checkpoint_must_save_by='00:01:00:00'")
    assert error.message == "checkpointing.checkpoint_must_save_by=00:01:00:00 is not before the time limit 01:00:00"
    assert error.hint == "set it to 00:00:55:00, or raise the limit (run.time=…)"
    plan(where, "checkpointing.checkpoint_must_save_by='00:00:55:00'")
    plan(where, "checkpointing.checkpoint_must_save_by='00:01:00:00'", "run.time=2:00:00")


def test_a_run_that_ends_at_its_limit_for_good_is_said(tmp_path: Path) -> None:
    (line,) = warned(profile(tmp_path, SLURM))
    assert line.startswith("at the time limit of 01:00:00 the run saves and is over")
    assert "checkpointing.checkpoint_must_save_by=00:00:55:00" in line
    assert warned(profile(tmp_path, SLURM, max_restarts=1)) == []
    assert warned(profile(tmp_path, SLURM), "checkpointing.checkpoint_must_save_by='00:00:50:00'") == []
    assert warned(profile(tmp_path, SLURM), "checkpointing.enabled=false", "checkpointing.metric_name=null") == []


def test_an_image_that_nothing_runs_is_said(tmp_path: Path) -> None:
    lines = warned(profile(tmp_path, SLURM, image="x:1", max_restarts=1))
    assert lines == ["image x:1 is not used: the profile's runtime is none"]
