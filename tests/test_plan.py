"""From a composed config and a profile to a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.errors import UserError
from nemotron_launch.job import Job, Mount
from nemotron_launch.plan import compose_for, new_run_id, plan_job
from nemotron_launch.profiles import Profile
from tests.sites import LEPTON, SLURM, profile
from tests.step_trees import add_step


def job_of(step_id: str, config: str | None, *overrides: str, where: Profile | None = None, **options: Any) -> Job:
    step = find_step(step_id)
    return plan_job(step, compose_for(step, find_config(step, config), overrides, where), where, **options)


# On this machine ---------------------------------------------------------------------------------------------------


def test_a_training_step_is_started_by_spawn() -> None:
    job = job_of("dpo", "tiny", "cluster.procs_per_node=2")
    step = find_step("dpo")
    spawn = ("-m", "nemotron_launch.trainer.spawn", "--procs", "2", "--output-dir", job.output_dir, "--")
    config = f"{job.run_dir}/config.yaml"
    assert job.command == (sys.executable, *spawn, str(step.folder / "train.py"), "--config", config)
    assert (job.executor, job.nodes, job.procs, job.workdir) == ("local", 1, 2, ".")
    assert [file.path for file in job.files] == ["config.yaml"]
    assert job.bundle is None, "it runs the code that is here"


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


def test_sizes_that_do_not_fit_are_said_with_their_place() -> None:
    with pytest.raises(UserError) as caught:
        job_of("dpo", "tiny", "policy.train_global_batch_size=10")
    assert caught.value.where == "command line"
    assert "policy.train_global_batch_size" in caught.value.message
    assert caught.value.exit_code == 2


# Elsewhere ---------------------------------------------------------------------------------------------------------


def test_a_remote_job_names_no_path_of_this_machine(tmp_path: Path) -> None:
    job = job_of("dpo", "default", where=profile(tmp_path, SLURM), run_id="r1")
    run_dir = "/lustre/jobs/r1"
    out = "/lustre/jobs/output/rl/dpo-default"
    spawn = ("python3", "-m", "nemotron_launch.trainer.spawn", "--procs", "8", "--output-dir", out, "--")
    script = f"{run_dir}/code/steps/rl/nemo_rl/dpo/train.py"
    assert job.command == (*spawn, script, "--config", f"{run_dir}/config.yaml")
    assert (job.run_dir, job.workdir, job.output_dir) == (run_dir, "/lustre/jobs", out)
    assert job.bundle is not None
    assert str(Path.home()) not in repr(job)
    assert str(Path.cwd()) not in repr(job)


def test_the_executors_own_keys_are_options_and_the_rest_has_its_place(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, runtime="pyxis", mounts=["/data:/data:ro"], setup=["module load cuda"], qos="high")
    job = job_of("dpo", "default", where=where)
    assert job.options["account"] == "physics"
    assert job.options["qos"] == "high"
    assert not {"mounts", "setup", "image", "env", "secrets", "nodes", "config", "runtime"} & set(job.options)
    assert job.container.runtime == "pyxis"
    assert job.container.image == find_step("dpo").image, "the step's own, where nobody says another"
    assert job.container.mounts == (Mount("/data", "/data", read_only=True),)
    assert job.setup == ("module load cuda",)


@pytest.mark.parametrize(("attached", "partition"), [(True, "fast"), (False, "batch")])
def test_an_attached_run_may_have_its_own_partition(tmp_path: Path, attached: bool, partition: str) -> None:
    where = profile(tmp_path, SLURM, run_partition="fast")
    job = job_of("dpo", "default", where=where, attached=attached)
    assert job.options["partition"] == partition
    assert "run_partition" not in job.options


def test_services_come_from_the_config_and_the_profile(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, services={"judge": {"command": ["serve", "x y"], "port": 8000, "nodes": 1}})
    job = job_of("dpo", "default", "run.services.judge.gpus=4", "run.services.judge.env={A: 1}", where=where)
    (service,) = job.services
    assert (service.name, service.command, service.port, service.nodes) == ("judge", ("serve", "x y"), 8000, 1)
    assert (service.gpus, dict(service.env), service.start_timeout) == (4, {"A": "1"}, 1800)


def test_environment_values_are_text(tmp_path: Path) -> None:
    job = job_of("dpo", "default", "run.env={A: 1, B: true, C: 'x y'}", where=profile(tmp_path, SLURM))
    assert dict(job.env) == {"A": "1", "B": "true", "C": "x y"}


def test_a_python_steps_nodes_are_in_run_where_it_has_no_cluster(tree: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"run": {"type": "object"}}, "additionalProperties": False}
    add_step(tree, "data/plain", {"default": "{}\n"}, schema, consumes=[], produces=[])
    job = job_of("plain", None, where=profile(tmp_path, SLURM, nodes=3))
    assert job.nodes == 3


# Precedence: step defaults < config run.* < profile < command line ---------------------------------------------------


def own_config(folder: Path, run: str) -> str:
    path = folder / "own.yaml"
    path.write_text(f"defaults: step://config/default\nrun: {run}\n")
    return str(path)


def test_the_configs_run_section_is_over_the_manifest(tmp_path: Path) -> None:
    config = own_config(tmp_path, "{image: own, nodes: 2, python: py, max_restarts: 2}")
    more = ["dpo.val_global_batch_size=16"]
    job = job_of("dpo", config, *more, where=profile(tmp_path, SLURM, runtime="pyxis"))
    assert (job.container.image, job.container.python, job.nodes) == ("own", "py", 2)
    assert job.restart.max_restarts == 2


def test_the_profile_is_over_the_configs_run_section(tmp_path: Path) -> None:
    config = own_config(tmp_path, "{image: own, nodes: 2, time: '9', max_restarts: 2, env: {A: config, B: config}}")
    where = profile(
        tmp_path, SLURM, runtime="pyxis", image="theirs", nodes=1, time="02:00:00", max_restarts=0, env={"A": "profile"}
    )
    job = job_of("dpo", config, where=where)
    assert (job.container.image, job.nodes, job.options["time"]) == ("theirs", 1, "02:00:00")
    assert job.restart.max_restarts == 0, "said, although it is the default too"
    assert dict(job.env) == {"A": "profile", "B": "config"}


def test_a_profiles_defaults_do_not_hide_what_the_config_says(tmp_path: Path) -> None:
    where = profile(tmp_path, {**SLURM, "time": "00:30:00"})
    job = job_of("dpo", own_config(tmp_path, "{max_restarts: 3, start_timeout: 60}"), where=where)
    assert (job.restart.max_restarts, job.options["start_timeout"]) == (3, 60)


def test_the_command_line_is_over_all(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, nodes=2, time="02:00:00", env={"A": "profile"})
    job = job_of(
        *("dpo", own_config(tmp_path, "{time: '9'}"), "run.time=03:00:00", "cluster.num_nodes=1", "run.env.A=mine"),
        where=where,
    )
    assert (job.options["time"], job.nodes, job.env["A"]) == ("03:00:00", 1, "mine")


def test_the_profiles_own_config_values_lie_between_file_and_command_line(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, config={"dpo": {"seed": 7, "max_num_steps": 9}})
    step = find_step("dpo")
    composed = compose_for(step, find_config(step, "default"), ["dpo.max_num_steps=3000"], where)
    assert (composed.get("dpo.seed"), composed.get("dpo.max_num_steps")) == (7, 3000)
    assert composed.sources.where("dpo.seed") == f"{tmp_path}/site.yaml:5", "the line in the profile"


def test_the_configs_environment_sees_the_profiles(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, env={"RL_OUTPUT_DIR": "/lustre/out"})
    assert job_of("dpo", "default", where=where).output_dir == "/lustre/out/dpo-default"


# Ids ---------------------------------------------------------------------------------------------------------------


def test_the_same_content_has_the_same_id_and_a_submission_a_fresh_one(tmp_path: Path) -> None:
    assert job_of("dpo", "tiny") == job_of("dpo", "tiny")
    assert job_of("dpo", "tiny").run_id != job_of("dpo", "tiny", "dpo.seed=1").run_id
    step = find_step("dpo")
    composed = compose_for(step, find_config(step, "tiny"))
    ids = {new_run_id(step, composed) for _ in range(100)}
    assert len(ids) == 100
    for run_id in ids:
        plan_job(step, composed, run_id=run_id)


def test_everything_that_is_rendered_counts_for_the_id(tmp_path: Path) -> None:
    template = tmp_path / "own.j2"
    template.write_text("one")
    ids = set()
    changes: list[dict[str, Any]] = [
        {},
        {"account": "chemistry"},
        {"env": {"A": "1"}},
        {"setup": ["true"]},
        {"template": str(template)},
    ]
    for change in changes:
        ids.add(job_of("dpo", "default", where=profile(tmp_path, SLURM, **change)).run_id)
    template.write_text("two")
    ids.add(job_of("dpo", "default", where=profile(tmp_path, SLURM, template=str(template))).run_id)
    assert len(ids) == 6


def test_the_run_id_is_everywhere_where_the_job_names_it(tmp_path: Path) -> None:
    where = profile(tmp_path, LEPTON)
    derived = job_of("dpo", "default", where=where)
    given = job_of("dpo", "default", where=where, run_id=derived.run_id)
    assert derived == given


@pytest.mark.parametrize("run_id", ["", "A", "a b", "-a", "a-", "a/b", "ä", "a" * 61, "../x", "a\n"])
def test_a_run_id_that_cannot_be_a_name_is_refused(run_id: str) -> None:
    with pytest.raises(UserError, match="cannot be a run id") as caught:
        job_of("dpo", "tiny", run_id=run_id)
    assert caught.value.where == "--run-id"
