"""Job specs for Lepton: what is in them, what is refused."""

from __future__ import annotations

import json
import random
import re
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nemotron_launch import bundle
from nemotron_launch.backends import lepton
from nemotron_launch.config.schema import load_schema
from nemotron_launch.config.validation import check
from nemotron_launch.errors import UserError
from nemotron_launch.job import Container, File, Job, Mount, Restart, Secret, Service
from nemotron_launch.render import render
from tests.backends.lepton_jobs import VOLUME, lepton_job, small_bundle


def spec_of(job: Job) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(render(job).text)
    return loaded


def envs_of(job: Job) -> dict[str, str]:
    return {env["name"]: env.get("value", "") for env in spec_of(job)["spec"]["envs"]}


def refused(job: Job) -> UserError:
    with pytest.raises(UserError) as caught:
        render(job)
    return caught.value


FULL = {
    "node_group": ["h100-a", "h100-b"],
    "reservation": "res-1",
    "priority": "high",
    "preemption": {"can_be_preempted": True, "can_preempt": False},
    "shared_memory_mib": 65536,
    "image_pull_secrets": ["ngc"],
    "ttl": 7200,
}


def test_a_job_says_everything_that_its_profile_asks_for() -> None:
    mounts = (Mount("/runs", "/lustre/runs", volume=VOLUME), Mount("/data", "/data", True, "node-local"))
    job = lepton_job(
        nodes=4,
        options=FULL,
        container=Container("lepton", "docker://nvcr.io/nvidia/nemo-rl:v0.6.0", mounts),
        env={"NCCL_DEBUG": "INFO"},
        secrets=(Secret("HF_TOKEN", reference="my-hf-token"),),
        restart=Restart(5),
        bundle=small_bundle({"code.py": b"pass"}),
    )
    spec = spec_of(job)["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    assert spec["intra_job_communication"] is True
    assert spec["affinity"] == {"allowed_dedicated_node_groups": ["h100-a", "h100-b"]}
    assert spec["reservation_config"] == {"reservation_id": "res-1"}
    assert spec["queue_config"] == {"priority_class": "high-7000", "can_be_preempted": True}
    assert spec["resource_shape"] == "gpu.8xh100-80gb"
    assert spec["shared_memory_size"] == 65536
    assert spec["container"]["image"] == "nvcr.io/nvidia/nemo-rl:v0.6.0"
    assert spec["mounts"] == [
        {"from": VOLUME, "path": "/runs", "mount_path": "/lustre/runs"},
        {"from": "node-local", "path": "/data", "mount_path": "/data", "mount_options": {"read_only": True}},
    ]
    assert spec["image_pull_secrets"] == ["ngc"]
    assert (spec["max_failure_retry"], spec["max_job_failure_retry"]) == (0, 5)
    assert spec["ttl_seconds_after_finished"] == 7200
    assert spec["log"] == {"enable_collection": True, "save_termination_logs": True}
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in spec["envs"]
    assert {"name": "HF_TOKEN", "value_from": {"secret_name_ref": "my-hf-token"}} in spec["envs"]


def test_finished_jobs_are_always_kept_for_a_while() -> None:
    assert spec_of(lepton_job())["spec"]["ttl_seconds_after_finished"] == 86400


def test_the_same_job_is_the_same_bytes() -> None:
    job = lepton_job(options=FULL, env={"B": "1", "A": "2"})
    assert render(job) == render(lepton_job(options=FULL, env={"A": "2", "B": "1"}))


def test_the_folder_holds_what_is_sent_and_what_is_inside_it() -> None:
    rendered = render(lepton_job(setup=("echo hello",)))
    assert [file.path for file in rendered.files] == ["job.json", "command.sh", "setup.sh", "config.yaml"]
    command = rendered.files[1].text
    assert json.loads(rendered.text)["spec"]["container"]["command"] == ["/bin/bash", "-c", command, "nemotron"]


def test_every_kind_of_spec_fits_the_strict_schema_as_two_checkers_read_it() -> None:
    service = Service("judge", ("serve",), 8000, nodes=1)
    schema = json.loads(lepton.SCHEMA.read_text())
    for job in (lepton_job(), lepton_job(options=FULL, nodes=2), lepton_job(services=(service,), setup=("true",))):
        spec = spec_of(job)
        jsonschema.validate(spec, schema)
        assert check(load_schema(lepton.SCHEMA), spec) == []


@pytest.mark.parametrize("change", [{"max_failure_retry": 1}, {"time_limit": 60}, {"completions": 0}, {"envs": None}])
def test_the_strict_schema_finds_what_lepton_would_let_through(change: dict[str, Any]) -> None:
    spec = spec_of(lepton_job())
    spec["spec"] |= change
    assert check(load_schema(lepton.SCHEMA), spec)


# Names and ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_id", "start"),
    [
        ("dpo-tiny-3fa9c1", "dpo-tiny-3fa9c1"),
        ("20261121-101500-dpo-tiny-3fa9c1", "dpo-tiny-3fa9c1-"),
        ("20261121-101500-a-very-long-name-of-a-config-3fa9c1", "a-very-long-name-of-a-confi-"),
        ("a" * 60, "a" * 27 + "-"),
        ("a" * 26 + "-b" * 10, "a" * 26 + "-"),
        ("2026", "run-"),
    ],
)
def test_a_run_has_one_name_that_lepton_takes(run_id: str, start: str) -> None:
    name = lepton.short_name(run_id)
    assert name == lepton.short_name(run_id)
    assert name.startswith(start)
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name) and len(name) <= 36 and not name.endswith("-")


def test_different_runs_have_different_names() -> None:
    ids = [f"20261121-101500-a-very-long-name-of-a-config-{n:06x}" for n in range(500)]
    assert len({lepton.short_name(run_id) for run_id in ids}) == 500


def test_node_groups_are_sent_by_id_and_compiled_as_given() -> None:
    spec = spec_of(lepton_job(options={"node_group": ["h100-a", "already-an-id"]}))
    assert lepton.node_groups(spec) == ("h100-a", "already-an-id")
    sent = lepton.with_node_group_ids(spec, {"h100-a": "h100-a-x7k2"})
    assert lepton.node_groups(sent) == ("h100-a-x7k2", "already-an-id")
    assert lepton.node_groups(spec) == ("h100-a", "already-an-id")
    anywhere = spec_of(lepton_job())
    assert lepton.node_groups(anywhere) == () and lepton.with_node_group_ids(anywhere, {}) == anywhere


@pytest.mark.parametrize(
    ("given", "sent"),
    [("low", "low-1000"), ("mid-5", "mid-5000"), ("9", "high-9000"), ("high-8000", "high-8000"), ("LOW-2", "low-2000")],
)
def test_priorities_are_what_leptons_own_client_makes_of_them(given: str, sent: str) -> None:
    # Against _validate_queue_priority of leptonai 0.47.1.
    job = lepton_job(options={"node_group": "g", "priority": given})
    assert spec_of(job)["spec"]["queue_config"]["priority_class"] == sent


# Refusals ----------------------------------------------------------------------------------------------------------


def test_a_secret_without_a_reference_says_how_to_create_one() -> None:
    error = refused(lepton_job(secrets=(Secret("HF_TOKEN", source="MY_TOKEN"),)))
    assert error.where == "profile lepton_rl_nemo_rl_dpo: secrets.HF_TOKEN"
    assert 'lep secret create -n HF_TOKEN -v "$MY_TOKEN"' in (error.hint or "")
    assert "secrets: {HF_TOKEN: {reference: HF_TOKEN}}" in (error.hint or "")


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"container": Container("lepton", "")}, "image", "there is no image"),
        ({"container": Container("lepton", "/lustre/image.sqsh")}, "image", "is no image of a registry"),
        (
            {"container": Container("lepton", "i", (Mount("/a", "/b"),))},
            "mounts",
            "/a:/b does not say from which volume",
        ),
        ({"container": Container("lepton", "i", (Mount("/a", "/b", volume="nfs"),))}, "mounts", "is no volume"),
        ({"container": Container("lepton", "i", (Mount("a", "/b", volume=VOLUME),))}, "mounts", "not an absolute path"),
        ({"env": {"LEPTON_X": "1"}}, "env", "Lepton sets it"),
        ({"env": {"BASH_ENV": "/x"}}, "env", "its shell uses it"),
        ({"env": {"A": "1"}, "secrets": (Secret("A", reference="a"),)}, "secrets", "both a secret and in env"),
        ({"env": {"A": "x" * 131070}}, "env.A", "more than a program can be given in one variable (131071)"),
        ({"options": {"priority": "urgent", "node_group": "g"}}, "priority", "is no priority class"),
        ({"options": {"priority": "low-9", "node_group": "g"}}, "priority", "is no priority class"),
        ({"options": {"priority": "low"}}, "priority", "is about a node group"),
        ({"options": {"reservation": "r"}}, "reservation", "is about a node group"),
        ({"options": {"resource_shape": None}}, "", "spec.resource_shape is missing"),
        ({"options": {"ttl": 5}}, "ttl", "must be at least 60"),
        ({"run_dir": "runs/r1"}, "remote_job_dir", "is not an absolute path"),
    ],
)
def test_what_lepton_cannot_do_is_refused_with_its_key(change: dict[str, Any], where: str, message: str) -> None:
    error = refused(lepton_job(**change))
    assert message in str(error)
    assert where in (error.where or "")


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (Service("judge", ("x",), 29400), "port 29400 is taken by the trainer's rendezvous"),
        (Service("judge", ("x",), 8000, image="vllm/vllm-openai"), "runs one image on all nodes"),
        (Service("judge", ("x",), 8000, gpus=8), "1 processes and the services beside them need 9 GPUs, a node has 8"),
        (Service("judge", ("x",), 8000, health="health"), "is no path of an address"),
    ],
)
def test_services_that_do_not_fit_are_refused(service: Service, message: str) -> None:
    assert message in str(refused(lepton_job(gpus_per_node=8, services=(service,))))


# Sizes -------------------------------------------------------------------------------------------------------------


def noise(size: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(0).randbytes(size)


def test_a_bundle_travels_in_variables_that_linux_takes() -> None:
    made = small_bundle({"code.bin": noise(500_000)})
    envs = envs_of(lepton_job(bundle=made, mounted=False))
    parts = [envs[f"NEMOTRON_BUNDLE_{n}"] for n in range(7)]  # 500,000 · 4 / 3 / 98,304 = 6.8
    assert "NEMOTRON_BUNDLE_7" not in envs
    assert all(len(part) < 131072 - 40 for part in parts)
    assert b64decode("".join(parts)) == bundle.read(made)


def test_a_bundle_too_large_for_the_spec_is_refused_with_size_and_remedy() -> None:
    error = refused(lepton_job(bundle=small_bundle({"code.bin": noise(1_500_000)}), mounted=False))
    # 1,500,000 · 4 / 3 bytes of base64 are 1,953 KiB; 2 MiB - 256 KiB = 1,792 KiB.
    assert re.search(r"carries 1792 KiB, and this one takes 19\d\d KiB, 195\d KiB of them its code", error.message)
    assert "mount a volume at /lustre/runs or above" in (error.hint or "")
    assert ".nemotronignore" in (error.hint or "")


def test_a_bundle_too_large_for_the_spec_comes_from_the_mount_where_there_is_one() -> None:
    job = lepton_job(bundle=small_bundle({"code.bin": noise(1_500_000)}))
    assert not [name for name in envs_of(job) if name.startswith("NEMOTRON_BUNDLE")]
    assert lepton.environment_size(spec_of(job)) < 20_000


def test_a_config_too_large_for_the_spec_is_refused() -> None:
    error = refused(lepton_job(files=(File("config.yaml", "x" * 1_500_000),)))
    assert "the rest is its config and environment" in (error.hint or "")


def test_the_computed_size_is_the_size_that_linux_refuses() -> None:
    # A stack of 8 MiB allows 2 MiB of arguments and variables (execve(2)); PWD and the like are not counted here.
    def starts(size: int) -> bool:
        spec = {"spec": {"container": {"command": ["/bin/true"]}, "envs": []}}
        while (left := size - lepton.environment_size(spec)) > 200:
            name = f"V{len(spec['spec']['envs']):06d}"
            value = "x" * (min(left, 100_000) - len(name) - 10)
            spec["spec"]["envs"].append({"name": name, "value": value})
        env = {entry["name"]: entry["value"] for entry in spec["spec"]["envs"]}
        script = "import os,sys,ast; os.execve('/bin/true', ['/bin/true'], ast.literal_eval(sys.stdin.read()))"
        limited = ["bash", "-c", 'ulimit -s 8192 && exec python3 -c "$1"', "_", script]
        return subprocess.run(limited, input=repr(env), text=True, capture_output=True).returncode == 0

    assert starts(lepton.LARGEST_ENVIRONMENT)
    assert not starts((2 << 20) + 4096)


# Templates ---------------------------------------------------------------------------------------------------------


def test_a_profiles_own_template_can_change_a_part_of_the_command(tmp_path: Path) -> None:
    own = tmp_path / "own.sh.j2"
    own.write_text('{% extends "lepton/command.sh.j2" %}{% block launch %}echo mine {{ job.run_id }}\n{% endblock %}')
    command = render(lepton_job(template=str(own))).files[1].text
    assert "echo mine 20261121-101500-dpo-tiny-3fa9c1" in command
    assert "Who our peers are" in command


def test_a_template_that_kubernetes_would_rewrite_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.sh.j2"
    for text in ("echo $$\n", "echo $(NCCL_DEBUG)\n", "echo $(LEPTON_JOB_NAME)\n"):
        own.write_text(f"first\n{text}")
        error = refused(lepton_job(template=str(own), env={"NCCL_DEBUG": "1"}))
        assert "Kubernetes would rewrite" in error.message and "line 2" in error.message
        assert error.where == str(own)
    own.write_text("echo $(hostname)\n")
    assert render(lepton_job(template=str(own)))


# Exit lines --------------------------------------------------------------------------------------------------------


def test_only_the_runs_own_last_line_tells_its_exit_code() -> None:
    job = lepton_job()
    mark = lepton.nonce(job)
    assert lepton.read_exit(f"nemotron-exit {mark} attempt=2 node=1 code=85\n", mark) == (2, 1, 85)
    assert lepton.read_exit("nemotron-exit 0000 attempt=2 node=1 code=0", mark) is None
    assert lepton.read_exit("anything", mark) is None
    assert lepton.nonce(lepton_job(run_id="another")) != mark
