"""The public tool's env.toml: found where it finds it, and read as profiles of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.errors import UserError
from nemotron_launch.job import Secret
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.profiles import list_profiles, load_profile
from nemotron_launch.render import render
from tests.profile_files import LEPTON, SLURM, env_toml

ENV = {"USER": "ada"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; pyproject.toml above it, so that nothing is found further up."""
    (tmp_path / "pyproject.toml").touch()
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def put(work: Path, text: str) -> Path:
    path = work / "env.toml"
    path.write_text(text)
    return path


def message(name: str, **env: str) -> str:
    with pytest.raises(UserError) as caught:
        load_profile(name, env={**ENV, **env})
    return str(caught.value)


def names(tables: dict[str, Any]) -> list[str]:
    return [name for name in tables if name != "wandb"]


def test_it_is_as_long_as_the_public_tools() -> None:
    assert len(names(SLURM)) == 29


@pytest.mark.parametrize("name", names(SLURM))
def test_every_generated_slurm_profile_loads(work: Path, name: str) -> None:
    put(work, env_toml(SLURM))
    profile = load_profile(name, env=ENV)
    assert profile.executor == "slurm"
    assert profile.data["account"] == "nemotron"
    assert profile.data["remote_job_dir"] == "/lustre/ada/nemo-run"
    tunnel = {"host": "login.example.com", "user": "ada", "identity": "~/.ssh/id_ed25519"}
    assert tunnel.items() <= profile.data["tunnel"].items()
    assert profile.from_cwd


@pytest.mark.parametrize("name", names(LEPTON))
def test_every_generated_lepton_profile_loads(work: Path, name: str) -> None:
    put(work, env_toml(LEPTON))
    data = load_profile(name, env=ENV).data
    assert data["mounts"] == [
        {
            "source": "/path/to/shared/workspace",
            "target": "/mnt/lustre-shared",
            "read_only": False,
            "volume": "node-nfs:amlfs",
        }
    ]
    assert (data["node_group"], data["shared_memory_mib"]) == (["lepton-node-group"], 65536)
    assert data["remote_job_dir"] == "/mnt/lustre-shared/output"  # nemo_run_dir counts only where this is not said


@pytest.mark.parametrize("name", names({**SLURM, **LEPTON}))
def test_every_generated_profile_compiles_with_a_step_of_ours(work: Path, name: str) -> None:
    put(work, env_toml({**SLURM, **LEPTON}))
    step = find_step("sft/megatron")
    profile = load_profile(name, env=ENV)
    composed = compose_for(step, find_config(step, "default"), [], profile, env=ENV)
    job = plan_job(step, composed, profile)
    rendered = render(job)
    assert job.nodes == profile.data["nodes"]
    assert any(file.path == rendered.main and file.text for file in rendered.files)


def test_a_child_table_merges_variables_and_replaces_lists(work: Path) -> None:
    put(work, env_toml(SLURM))
    data = load_profile("slurm_rl_nemo_rl_rlhf", env=ENV).data
    assert data["nodes"] == 4
    assert data["procs_per_node"] == 8
    assert data["time"] == "04:00:00"
    assert data["image"] == "nvcr.io/nvidia/nemo-rl:v0.6.0"
    assert data["setup"] == ["python -m pip install --quiet --break-system-packages omegaconf"]
    assert data["env"]["RL_OUTPUT_DIR"] == "/lustre/ada/output/rl/rlhf"
    assert data["env"]["HF_HOME"] == "/lustre/ada/hf"
    assert data["env"]["RL_PREP_MANIFEST"] == "/lustre/ada/output/data_prep/rl_prep/manifest.json"


def test_tokens_become_optional_secrets_whose_values_are_nowhere(work: Path) -> None:
    put(work, env_toml(SLURM))
    profile = load_profile("slurm_byob_cpu", env={**ENV, "HF_TOKEN": "hf_abc", "NGC_API_KEY": "ngc_abc"})
    found = ["HF_TOKEN", "NGC_API_KEY", "NVIDIA_API_KEY", "WANDB_API_KEY"]
    assert profile.secrets == tuple(Secret(name, source=name, optional=True) for name in found)
    assert "_abc" not in repr(profile.data)
    assert not any(name in profile.data["env"] for name in found)


def test_a_lepton_token_without_a_workspace_secret_is_left_out_with_the_remedy(work: Path) -> None:
    put(work, env_toml(LEPTON))
    profile = load_profile("lepton_base", env=ENV)
    assert profile.secrets == ()
    remedy = "name one with secrets: {HF_TOKEN: {reference: NAME}}"
    assert any("HF_TOKEN, WANDB_API_KEY" in text and remedy in text for text in profile.warnings)
    tables = {**LEPTON, "mine": {"extends": "lepton_base", "secrets": {"HF_TOKEN": {"reference": "hub"}}}}
    put(work, env_toml(tables))
    found = load_profile("mine", env=ENV).secrets
    assert found == (Secret("HF_TOKEN", source="HF_TOKEN", reference="hub", optional=True),)


def test_keys_without_a_meaning_give_one_warning(work: Path) -> None:
    put(work, env_toml(LEPTON))
    first, *others = load_profile("lepton_base", env=ENV).warnings
    assert first.startswith("env.toml: keys without a meaning here, left out: ")
    assert all(key in first for key in ("ray_version", "pip_extras", "workspace"))
    assert not any("meaning" in text for text in others)


def test_the_public_tools_code_folder_is_not_on_the_path(work: Path) -> None:
    put(work, env_toml(SLURM))
    profile = load_profile("slurm_prep_rl_prep", env=ENV)
    assert not {"PYTHONPATH", "RAY_RUNTIME_ENV_PYTHONPATH"} & set(profile.data["env"])
    assert "env_vars.PYTHONPATH" in profile.warnings[0]


def test_wandb_lies_below_the_profiles_own_variables(work: Path) -> None:
    put(work, env_toml({**SLURM, "other": {"extends": "slurm_base", "env_vars": {"WANDB_PROJECT": "mine"}}}))
    env = load_profile("other", env=ENV).data["env"]
    assert (env["WANDB_PROJECT"], env["WANDB_ENTITY"]) == ("mine", "nvidia")


@pytest.mark.parametrize(
    ("said", "mounts"),
    [
        ({}, ["/lustre"]),
        ({"lustre_mount": ""}, []),
        ({"lustre_mount": "/scratch:/lustre"}, ["/scratch"]),
        ({"mounts": ["/a:/b", "/x:/lustre"]}, ["/a", "/x"]),
    ],
)
def test_lustre_is_mounted_as_the_public_tool_mounts_it(work: Path, said: dict[str, Any], mounts: list[str]) -> None:
    put(work, env_toml({"p": {"executor": "slurm", "remote_job_dir": "/lustre/x", **said}}))
    assert [mount["source"] for mount in load_profile("p", env=ENV).data["mounts"]] == mounts


def test_their_other_names_are_ours(work: Path) -> None:
    table = {
        "executor": "lepton",
        "resource_shape": "gpu.8xh100-80gb",
        "nemo_run_dir": "/mnt/jobs",
        "container": "image:1",
        "ntasks_per_node": 1,
        "nprocs_per_node": 4,
        "node_reservation": "r-1",
        "queue_priority": "high-7",
        "can_be_preempted": True,
        "pre_launch_commands": ["first"],
        "startup_commands": ["before"],
    }
    put(work, env_toml({"p": table}))
    data = load_profile("p", env=ENV).data
    assert (data["remote_job_dir"], data["image"], data["procs_per_node"]) == ("/mnt/jobs", "image:1", 4)
    assert (data["reservation"], data["priority"]) == ("r-1", "high-7")
    assert data["preemption"] == {"can_be_preempted": True, "can_preempt": False}
    assert data["setup"] == ["before", "first"]


def test_setup_lines_come_before_startup_commands(work: Path) -> None:
    table = {"executor": "slurm", "remote_job_dir": "/x", "startup_commands": ["b"], "setup_lines": ["a"]}
    put(work, env_toml({"p": table}))
    assert load_profile("p", env=ENV).data["setup"] == ["a", "b"]


def test_without_a_tunnel_sbatch_runs_here(work: Path) -> None:
    put(work, env_toml({"p": {"executor": "slurm", "remote_job_dir": "/x"}}))
    assert load_profile("p", env=ENV).data["tunnel"] == {"type": "local"}
    put(work, env_toml({**SLURM, "p": {"extends": "slurm_base", "tunnel": "local"}}))
    assert load_profile("p", env=ENV).data["tunnel"] == {"type": "local"}


def test_a_time_without_quotes_is_a_time(work: Path) -> None:
    put(work, '[p]\nexecutor = "slurm"\nremote_job_dir = "/x"\ntime = 04:30:00\n')
    assert load_profile("p", env=ENV).data["time"] == "04:30:00"


def test_the_nemo_rl_image_is_used_with_its_python_that_has_megatron_core(work: Path) -> None:
    put(work, env_toml(SLURM))
    assert load_profile("slurm_rl_nemo_rl_dpo", env=ENV).data["python"] == "python-MegatronPolicyWorker"
    assert load_profile("slurm_base", env=ENV).data["python"] is None


# Where it is ---------------------------------------------------------------------------------------------------------


def test_it_is_looked_for_upwards_to_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "project" / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    (tmp_path / "env.toml").write_text('[outside]\nexecutor = "local"\n')
    assert load_profile("outside", env=ENV).executor == "local"
    (tmp_path / "project" / "pyproject.toml").touch()
    assert "there is no profile outside" in message("outside")
    (tmp_path / "project" / "env.toml").write_text('[inside]\nexecutor = "local"\n')
    assert load_profile("inside", env=ENV).executor == "local"


def test_nemotron_env_file_names_another(work: Path, tmp_path: Path) -> None:
    put(work, '[p]\nexecutor = "local"\n')
    other = tmp_path / "env.slurm.toml"
    other.write_text('[q]\nexecutor = "local"\n')
    profile = load_profile("q", env={**ENV, "NEMOTRON_ENV_FILE": str(other)})
    assert (profile.file, profile.from_cwd) == (other, False)
    assert "there is no profile p" in message("p", NEMOTRON_ENV_FILE=str(other))
    missing = message("q", NEMOTRON_ENV_FILE="gone.toml")
    assert missing == "error: gone.toml: there is no such file of profiles\n       NEMOTRON_ENV_FILE names it"


def test_its_profiles_go_before_the_shipped_ones_and_may_extend_them(work: Path) -> None:
    put(work, env_toml(SLURM))
    assert load_profile("slurm_rl_nemo_rl_dpo", env=ENV).file == work / "env.toml"
    put(work, '[slurm]\nextends = "slurm"\naccount = "mine"\nlustre_mount = ""\n')
    data = load_profile("slurm_rl_nemo_rl_dpo", env=ENV).data
    assert (data["account"], data["max_restarts"]) == ("mine", 3)


def test_reserved_tables_are_no_profiles(work: Path) -> None:
    put(work, '[cli]\ntheme = "dark"\n[cache]\ngit_dir = "/x"\n[artifacts]\nwandb = true\n[p]\nexecutor = "local"\n')
    mine = [entry.name for entry in list_profiles(env=ENV) if not entry.shipped]
    assert mine == ["p"]
    assert "cli is a reserved table of env.toml, not a profile" in message("cli")


# What is wrong with it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[p]\nexecutor = "dgxcloud"\n', "env.toml:2: profile p: the executor dgxcloud is not supported"),
        ('[p]\n\nexecutor = "docker"\n', "env.toml:3: profile p: the executor docker is not supported"),
        ("[p]\nnodes = 1\n", "env.toml:1: profile p: executor is missing"),
        ("p = 3\n", "env.toml:1: p is no table: a profile is written as [p]"),
        ('[p]\nexecutor = "local\n', "env.toml:2: not TOML: "),
        (
            '[p]\nexecutor = "slurm"\nremote_job_dir = "${oc.env:NOWHERE}/x"\n',
            "env.toml:3: profile p: remote_job_dir: the environment variable NOWHERE is not set",
        ),
        (
            '[p]\nexecutor = "slurm"\nremote_job_dir = "/x"\nmounts = ["${auto_mount:git+https://x@main,/opt}"]\n',
            "env.toml:4: ${auto_mount:git+https://x@main,/opt} is not supported",
        ),
        (
            '[p]\nexecutor = "slurm"\nremote_job_dir = "/x"\nacount = "me"\n',
            "env.toml:4: profile p: unknown key acount\n       did you mean account?",
        ),
        (
            '[p]\nexecutor = "slurm"\nremote_job_dir = "/x"\n\n[p.env_vars]\nA = 1\nWANDB_API_KEY = "abc"\n',
            "env.toml:7: profile p: env.WANDB_API_KEY is a secret by its name",
        ),
        (
            '[p]\nexecutor = "slurm"\nremote_job_dir = "/x"\naccount = "${oc.env:HF_TOKEN}"\n',
            "env.toml:4: profile p: account: HF_TOKEN is a secret",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(work: Path, text: str, expected: str) -> None:
    put(work, text)
    said = message("p", HF_TOKEN="hf_abc")
    assert said.startswith(f"error: {expected}")
    assert "abc" not in said


def test_a_circle_of_extends_is_named(work: Path) -> None:
    put(work, '[a]\nextends = "b"\n[b]\nextends = "c"\n[c]\nextends = "a"\n')
    assert "env.toml:6: extends goes in a circle: a → b → c → a" in message("a")


def test_a_file_that_is_no_text_is_said(work: Path) -> None:
    (work / "env.toml").write_bytes(b"[p]\nx = '\xff'\n")
    assert message("p") == "error: env.toml: not UTF-8 text (byte 9)"
