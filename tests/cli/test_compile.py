"""`nemotron steps run … -r|-b PROFILE -d`: what people type to see the job that they would submit."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.test_steps import in_terminal
from tests.conftest import Nemotron
from tests.sites import LEPTON, SLURM, profile_file
from tests.step_trees import REPOSITORY

DPO = "rl/nemo_rl/dpo"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with profiles of its own."""
    work = tmp_path / "site"
    profile_file(work / "profiles", "cluster", SLURM)
    profile_file(work / "profiles", "cloud", LEPTON)
    profile_file(work / "profiles", "here", {"executor": "local"}, env={"COLOUR": "blue"})
    monkeypatch.chdir(work)
    return work


# The documented commands ---------------------------------------------------------------------------------------------

DOCUMENTED = [
    ("dpo", "-r lepton_rl_nemo_rl_dpo dpo.reference_policy_kl_penalty=0.2 dpo.max_num_steps=1000"),
    (
        "dpo",
        "-b slurm_rl_nemo_rl_dpo policy.model_name=meta-llama/Llama-3.2-3B-Instruct policy.train_global_batch_size=64 "
        "policy.optimizer.lr=1.0e-6",
    ),
    ("rlvr", "-r lepton_rl_nemo_rl_rlvr grpo.num_generations_per_prompt=16 grpo.max_num_steps=1000"),
    ("rlvr", "-b slurm_rl_nemo_rl_rlvr policy.model_name=meta-llama/Llama-3.2-3B-Instruct policy.optimizer.lr=1.0e-6"),
    ("rlhf", "-r lepton_rl_nemo_rl_rlhf grpo.num_generations_per_prompt=16 grpo.max_num_steps=1000"),
    ("rlhf", "-b slurm_rl_nemo_rl_rlhf policy.model_name=meta-llama/Llama-3.2-3B-Instruct policy.optimizer.lr=1.0e-6"),
]


@pytest.mark.parametrize(
    ("step", "words"), DOCUMENTED, ids=[f"{step}-{words.split()[1]}" for step, words in DOCUMENTED]
)
def test_the_documented_commands_compile_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nemotron: Nemotron, step: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = nemotron("steps", "run", f"rl/nemo_rl/{step}", "-c", "default", *words.split(), "-d")
    assert done.returncode == 0, done.stderr
    if "slurm" in words:
        assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=")
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    else:
        config = yaml.safe_load(carried(json.loads(done.stdout), "grpo:" if step != "dpo" else "dpo:"))
        section = config["dpo" if step == "dpo" else "grpo"]
        assert section["max_num_steps"] == 1000


def carried(spec: dict[str, dict[str, list[dict[str, str]]]], holds: str) -> str:
    """The file in a Lepton spec's environment that holds this text."""
    for entry in spec["spec"]["envs"]:
        if entry["name"].startswith("NEMOTRON_FILE_"):
            text = base64.b64decode(entry["value"]).decode()
            if holds in text:
                return text
    raise AssertionError(holds)


# What is printed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cluster", "cloud", "here"])
def test_a_pipe_gets_the_main_file_byte_for_byte_and_the_same_each_time(
    site: Path, nemotron: Nemotron, profile: str
) -> None:
    first = nemotron("steps", "run", DPO, "-r", profile, "-d")
    assert first.returncode == 0, first.stderr
    assert nemotron("steps", "run", DPO, "-r", profile, "-d").stdout == first.stdout
    written = nemotron("steps", "run", DPO, "-r", profile, "-d", "--output", "dir=out")
    assert written.returncode == 0, written.stderr
    (main,) = (path for path in Path("out").iterdir() if path.name in ("job.sbatch", "job.json", "run.sh"))
    assert main.read_bytes().decode() == first.stdout
    script = nemotron("steps", "run", DPO, "-r", profile, "-d", "--output", "script")
    assert script.stdout == first.stdout


def test_the_folder_holds_everything_that_the_job_needs(site: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", DPO, "-b", "cluster", "-d", "--output", "dir=out", "--run-id", "mine")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in Path("out").iterdir()}
    (code,) = (name for name in names if name.endswith(".tar.gz"))
    assert names >= {"job.sbatch", "node.sh", "config.yaml", code}
    assert code in Path("out/job.sbatch").read_text()
    assert done.stdout == ""
    assert "copy the folder to /lustre/jobs/mine on the cluster" in done.stderr
    for path in Path("out").iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, "a config may name what is private"


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_the_whole_job_as_data(site: Path, nemotron: Nemotron, form: str) -> None:
    done = nemotron("steps", "run", DPO, "-r", "cluster", "-d", "--output", form, "dpo.seed=7")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout) if form == "json" else yaml.safe_load(done.stdout)
    assert data["job"]["executor"] == "slurm"
    assert data["job"]["options"]["account"] == "physics"
    assert data["main"] == "job.sbatch"
    assert yaml.safe_load(data["files"]["config.yaml"])["dpo"]["seed"] == 7


def test_without_a_profile_there_are_the_same_forms(site: Path, nemotron: Nemotron) -> None:
    data = json.loads(nemotron("steps", "run", DPO, "-c", "tiny", "-d", "--output", "json").stdout)
    assert (data["job"]["profile"], data["main"]) == ("", "run.sh")
    script = nemotron("steps", "run", DPO, "-c", "tiny", "-d", "--output", "script").stdout
    assert script == data["files"]["run.sh"]


def test_a_run_id_of_ones_own_is_reproduced(site: Path, nemotron: Nemotron) -> None:
    derived = nemotron("steps", "run", DPO, "-r", "cluster", "-d").stdout
    run_id = derived.split("--job-name=")[1].split()[0]
    assert nemotron("steps", "run", DPO, "-r", "cluster", "-d", "--run-id", run_id).stdout == derived
    assert "--job-name=mine\n" in nemotron("steps", "run", DPO, "-r", "cluster", "-d", "--run-id", "mine").stdout


def summary(*arguments: str) -> str:
    """What a terminal shows, without colours, blanks run together."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", in_terminal("steps", "run", DPO, *arguments, "-d")).split())


def test_a_terminal_gets_a_summary_and_the_files(site: Path) -> None:
    plain = summary("-b", "cluster", "dpo.seed=7")
    assert "rl/nemo_rl/dpo -c default dpo.seed=7" in plain
    assert "Slurm, partition batch, profile cluster" in plain
    assert "1 node with 8 GPUs, 8 processes, at most 1 node-hours" in plain
    assert "from the working directory: profiles/cluster.yaml" in plain
    assert "checkpoint_megatron checkpointing.checkpoint_dir = ./output/rl/dpo-default/checkpoints" in plain
    assert "at the time limit of 01:00:00 the run saves and is over" in plain
    assert "job.sbatch ─" in plain
    assert "config.yaml ─" in plain


def test_a_template_from_the_working_directory_is_named(site: Path) -> None:
    (site / "mine.j2").write_text('{% extends "slurm/job.sbatch.j2" %}')
    profile_file(site / "profiles", "own", SLURM, template="../mine.j2")
    assert "from the working directory: mine.j2" in summary("-r", "own")


def test_the_cost_counts_services_and_restarts(site: Path) -> None:
    services = {"judge": {"command": ["serve"], "port": 8000, "nodes": 2}}
    profile_file(site / "profiles", "big", SLURM, services=services, max_restarts=1)
    # (1 node that trains + 2 of the judge) x 1 h x 2 attempts
    assert "at most 6 node-hours" in summary("-r", "big")


def test_warnings_stay_out_of_the_pipe(site: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", DPO, "-r", "cluster", "-d")
    assert done.stderr.startswith("warning: at the time limit of 01:00:00")
    assert "warning:" not in done.stdout


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "cluster", "-b", "cluster"], "-r and -b exclude each other\n       -r runs and follows"),
        (["-r", "clutser", "-d"], "there is no profile clutser\n       did you mean cluster?"),
        (["-b", "cloud"], "workspace: which Lepton workspace? None is named\n       export LEPTON_WORKSPACE_ID="),
        (["-r", "cluster", "--output", "json"], "--output goes with -d"),
        (["-r", "cluster", "-d", "--output", "xml"], "--output takes json, yaml, script or dir=PATH, got 'xml'"),
        (["-r", "cluster", "-d", "--output", "dir="], "--output takes json, yaml, script or dir=PATH, got 'dir='"),
        (["-r", "cluster", "-d", "--output", "dir=/proc/x"], "/proc/x: cannot be written: "),
        (
            ["-r", "cluster", "-d", "--output", "dir=profiles/cluster.yaml"],
            "profiles/cluster.yaml: cannot be written: ",
        ),
        (["-r", "cluster", "-d", "--run-id", "A B"], "--run-id: 'A B' cannot be a run id"),
        (["-r", "cluster", "-d", "--profiles", "nowhere"], "nowhere: there is no such"),
        (["-d", "--force-squash"], "--force-squash goes with a Slurm profile"),
        (
            ["-r", "cluster", "-d", "--force-squash"],
            "profiles/cluster.yaml:2: profile cluster: --force-squash has noth",
        ),
        (["-r", "cluster", "--dry-rum"], "nemotron steps run has no option --dry-rum\n       did you mean --dry-run?"),
        (["-r", "cluster", "-d", "dpo.sed=1"], "command line: unknown key dpo.sed\n       did you mean dpo.seed?"),
        (["-r", "cluster", "-d", "--", "x"], "rl/nemo_rl/dpo takes no arguments of its own, got 'x'"),
    ],
)
def test_a_wrong_command_submits_nothing_and_says_one_thing(
    site: Path, nemotron: Nemotron, arguments: list[str], message: str
) -> None:
    before = sorted(site.rglob("*"))
    done = nemotron("steps", "run", DPO, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    errors = done.stderr[done.stderr.index("error: ") :]
    assert errors.startswith(f"error: {message}"), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(site.rglob("*")) == before


def test_a_template_with_an_undefined_name_is_said_with_its_line(site: Path, nemotron: Nemotron) -> None:
    (site / "mine.j2").write_text("#!/bin/bash\n{{ nothing }}\n")
    profile_file(site / "profiles", "own", SLURM, template="../mine.j2")
    done = nemotron("steps", "run", DPO, "-r", "own", "-d")
    assert done.returncode == 2
    assert done.stderr.startswith("error: mine.j2:2: ")
    assert "nothing" in done.stderr


def test_profiles_of_a_folder_are_found_first(site: Path, tmp_path: Path, nemotron: Nemotron) -> None:
    profile_file(tmp_path / "more", "cluster", SLURM, account="chemistry")
    done = nemotron("steps", "run", DPO, "-r", "cluster", "-d", "--profiles", str(tmp_path / "more"))
    assert "--account=chemistry" in done.stdout


def test_profiles_are_completed(site: Path, nemotron: Nemotron) -> None:
    words = "nemotron steps run dpo -r c"
    env = {"_NEMOTRON_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "5"}
    assert nemotron(**env).stdout.split() == ["plain,cloud", "plain,cluster"]


# Secrets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SLURM, LEPTON, {"executor": "local"}])
def test_a_secrets_value_is_in_no_output_file_argument_or_log(
    site: Path, nemotron: Nemotron, base: dict[str, object], tmp_path: Path
) -> None:
    values = {"HF_TOKEN": "hf_kljweoiruzxcv", "WANDB_API_KEY": "8f3a9c2b7d6e", "MY_PASSWORD": "hunter2hunter2"}
    lepton = base.get("executor") == "lepton"
    secrets = {name: {"reference": name.lower().replace("_", "-")} if lepton else None for name in values}
    profile_file(site / "profiles", "own", base, secrets=secrets)
    env = {**values, "XDG_CACHE_HOME": str(tmp_path / "cache"), "NEMOTRON_DEBUG": "1"}
    outputs = []
    for form in (["--output", "json"], ["--output", "yaml"], ["--output", "dir=out"], []):
        done = nemotron("steps", "run", DPO, "-c", "tiny", "-r", "own", "-d", *form, **env)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    outputs.append(in_terminal("steps", "run", DPO, "-c", "tiny", "-r", "own", "-d", **env))
    files = [path.read_bytes() for top in (site, tmp_path / "cache") for path in top.rglob("*") if path.is_file()]
    assert len(files) > 5
    for value in values.values():
        packed = base64.b64encode(value.encode()).rstrip(b"=")
        for content in (*files, *(output.encode() for output in outputs)):
            assert value.encode() not in content
            assert packed[:-1] not in content
    assert "HF_TOKEN" in outputs[0], "its name is there"


@pytest.mark.parametrize(
    "override", ["policy.model_name='${oc.env:HF_TOKEN}'", "output_dir='out/${oc.env:HF_TOKEN,x}'"]
)
def test_a_secret_cannot_be_interpolated_anywhere(site: Path, nemotron: Nemotron, override: str) -> None:
    for where in ([], ["-r", "cluster"]):
        done = nemotron("steps", "run", DPO, "-d", *where, override, HF_TOKEN="hf_abc123")
        assert done.returncode == 2
        assert "HF_TOKEN is a secret" in done.stderr
        assert "hf_abc123" not in done.stdout + done.stderr


# Here ----------------------------------------------------------------------------------------------------------------


def test_a_local_profile_runs_with_its_environment_setup_and_secrets(tree: Path, nemotron: Nemotron) -> None:
    own = {"COLOUR": "it's blue"}
    profile_file(Path("profiles"), "here", {"executor": "local"}, env=own, setup=["export SET=up"], secrets=["A_TOKEN"])
    done = nemotron("steps", "run", "small", "-r", "here", "exit=3", A_TOKEN="s3")
    assert done.returncode == 3, done.stderr
    env = json.loads(Path("out/sft/seen.json").read_text())["env"]
    assert (env["COLOUR"], env["SET"], env["A_TOKEN"]) == ("it's blue", "up", "s3")
    for path in Path(".nemotron").rglob("*"):
        assert path.is_dir() or "s3" not in path.read_text()


def test_a_secret_that_is_not_set_is_said_before_the_run(tree: Path, nemotron: Nemotron) -> None:
    profile_file(Path("profiles"), "here", {"executor": "local"}, secrets={"A_TOKEN": {"env": "MY_TOKEN"}})
    done = nemotron("steps", "run", "small", "-r", "here")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the secret A_TOKEN is not set: there is no MY_TOKEN in the environment")
    assert not Path("out").exists()


def test_what_is_missing_is_made_with_the_profile_too(tree: Path, nemotron: Nemotron) -> None:
    profile_file(Path("profiles"), "here", {"executor": "local"}, env={"COLOUR": "blue"})
    done = nemotron("steps", "run", "pairs", "-c", "tiny", "-r", "here")
    assert done.returncode == 0, done.stderr
    for name in ("sft-tiny", "pairs-tiny"):
        assert json.loads(Path(f"out/{name}/seen.json").read_text())["env"]["COLOUR"] == "blue"


def test_a_run_id_names_the_folder_of_a_run_here(tree: Path, nemotron: Nemotron) -> None:
    assert nemotron("steps", "run", "small", "--run-id", "mine").returncode == 0
    assert Path(".nemotron/runs/mine/config.yaml").is_file()
    again = nemotron("steps", "run", "small", "--run-id", "mine")
    assert again.returncode == 2
    assert again.stderr.startswith("error: there is a run mine already\n")
    elsewhere = nemotron("steps", "run", "small", "--run-id", "mine", NEMOTRON_STATE_DIR=str(tree))
    assert elsewhere.stderr.startswith("error: .nemotron/runs/mine: ")


def test_the_tests_run_in_the_checkout() -> None:
    assert (REPOSITORY / "profiles").is_dir()
    assert os.environ["XDG_CACHE_HOME"], "and keep what the launcher caches to themselves"
