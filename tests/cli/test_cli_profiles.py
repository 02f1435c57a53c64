"""`nemotron profiles list|show|check|init`, in their own processes."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.config.tree import to_plain
from nemotron_launch.profile_drafts import DRAFTS, Line, as_yaml, draft, write
from nemotron_launch.profiles import load_profile
from tests.conftest import Nemotron
from tests.profile_files import LEPTON as LEPTON_TABLES
from tests.profile_files import SLURM as SLURM_TABLES
from tests.profile_files import env_toml
from tests.profile_files import write as write_profiles
from tests.step_trees import REPOSITORY

SLURM = ("--account", "ours", "--partition", "gpu", "--remote-job-dir", "/lustre/me")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and home."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "NEMOTRON_ENV_FILE", "SLURM_ACCOUNT", "SLURM_PARTITION", "NEMO_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_list_has_ones_own_before_the_shipped(work: Path, nemotron: Nemotron) -> None:
    write_profiles(work / "profiles", slurm="extends: slurm\ndescription: ours\n", broken="executor: [")
    done = nemotron("profiles", "list")
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in done.stdout.splitlines()}
    assert lines["slurm"] == ["slurm", "profiles/slurm.yaml", "ours"]
    assert lines["broken"][:2] == ["?", "profiles/broken.yaml"]
    found = {entry["name"]: entry for entry in json.loads(nemotron("profiles", "list", "--json").stdout)}
    assert (found["slurm"]["shipped"], found["lepton"]["shipped"]) == (False, True)


def test_show_prints_everything_resolved_and_secrets_by_name_only(work: Path, nemotron: Nemotron) -> None:
    done = nemotron("profiles", "show", "slurm_rl_nemo_rl_dpo", SLURM_ACCOUNT="ours", HF_TOKEN="hf_abc")
    assert done.returncode == 0
    assert "account: ours\n" in done.stdout
    assert "HF_TOKEN:\n    env: HF_TOKEN\n    optional: true\n" in done.stdout
    as_json = nemotron("profiles", "show", "slurm_rl_nemo_rl_dpo", "--json", SLURM_ACCOUNT="ours", HF_TOKEN="hf_abc")
    data = json.loads(as_json.stdout)
    assert data["data"]["account"] == "ours"
    assert data["secrets"][0] == {"name": "HF_TOKEN", "source": "HF_TOKEN", "reference": "", "optional": True}
    assert "hf_abc" not in done.stdout + done.stderr + as_json.stdout


@pytest.mark.parametrize("name", sorted({**SLURM_TABLES, **LEPTON_TABLES}.keys() - {"wandb"}))
def test_what_show_prints_is_the_same_profile(work: Path, name: str) -> None:
    (work / "env.toml").write_text(env_toml({**SLURM_TABLES, **LEPTON_TABLES}))
    profile = load_profile(name, env={"USER": "ada"})
    write_profiles(work / "shown", p=as_yaml(profile))
    again = load_profile("shown/p.yaml", env={})
    assert (again.data, again.secrets, again.warnings) == (profile.data, profile.secrets, ())
    assert to_plain(again.layer) == to_plain(profile.layer)


def test_what_show_prints_keeps_text_that_looks_like_an_interpolation(work: Path) -> None:
    text = "executor: local\nsetup: ['echo \\${HOME} \\\\\\${X}']\nsecrets: {A_KEY: false}\nenv: {A_KEY: x}\n"
    write_profiles(work / "profiles", p=text)
    profile = load_profile("p", env={})
    assert profile.data["setup"] == ["echo ${HOME} \\${X}"]
    write_profiles(work / "shown", p=as_yaml(profile))
    assert load_profile("shown/p.yaml", env={}).data == profile.data


def test_check_says_all_that_is_wrong_and_ends_with_1(work: Path, nemotron: Nemotron) -> None:
    write_profiles(work / "profiles", a="executor: slurm\nnodes: x\n", b="executor: local\n", c="extends: d\n")
    done = nemotron("profiles", "check", "a", "b", "c")
    assert done.returncode == 1
    assert done.stdout == "b  local  good\n"
    assert "profile a: 2 problems" in done.stderr
    assert "there is no profile d" in done.stderr
    assert nemotron("profiles", "check", "b").returncode == 0


def test_check_without_a_name_checks_all_and_names_what_to_edit(work: Path, nemotron: Nemotron) -> None:
    done = nemotron("profiles", "check")
    assert done.returncode == 0
    assert "slurm  slurm  good  (an example's values still: remote_job_dir, account, partition)\n" in done.stdout
    assert "local  local  good\n" in done.stdout


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_profile_that_is_nowhere_is_code_2(work: Path, nemotron: Nemotron, command: str) -> None:
    done = nemotron("profiles", command, "slrum")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no profile slrum\n       did you mean slurm")


def test_names_are_completed(work: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "_NEMOTRON_COMPLETE": "bash_complete"}
    env |= {"COMP_WORDS": "nemotron profiles show slurm_rl", "COMP_CWORD": "3"}
    code = "from nemotron_launch.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    names = [line.split(",")[1] for line in done.stdout.splitlines()]
    assert names == [f"slurm_rl_nemo_rl_{step}" for step in ("dpo", "rlhf", "rlvr")]


# init ----------------------------------------------------------------------------------------------------------------


def test_init_writes_a_profile_that_the_step_profiles_build_on(work: Path, nemotron: Nemotron) -> None:
    done = nemotron("profiles", "init", "slurm", *SLURM, "--host", "cluster", "--user", "ada", "--mount", "/a:/b")
    assert (done.returncode, done.stderr) == (0, "")
    data = load_profile("slurm_rl_nemo_rl_dpo", env={}).data
    assert (data["account"], data["partition"], data["remote_job_dir"]) == ("ours", "gpu", "/lustre/me")
    assert {"type": "ssh", "host": "cluster", "user": "ada"}.items() <= data["tunnel"].items()
    assert data["mounts"][0]["target"] == "/b"
    checked = nemotron("profiles", "check", "slurm")
    assert checked.stdout == "slurm  slurm  good\n"


def test_init_takes_lepton_and_local_too(work: Path, nemotron: Nemotron) -> None:
    flags = ("--resource-shape", "gpu.8xh100-80gb", "--remote-job-dir", "/m/x", "--mount", "/:/m:node-nfs:x")
    assert nemotron("profiles", "init", "lepton", "--name", "mine", *flags).returncode == 0
    assert load_profile("mine", env={}).data["mounts"][0]["volume"] == "node-nfs:x"
    assert nemotron("profiles", "init", "local", "--output", "a/b.yaml").returncode == 0
    assert load_profile("a/b.yaml", env={}).executor == "local"


def test_init_never_writes_over_a_file_without_force(work: Path, nemotron: Nemotron) -> None:
    write_profiles(work / "profiles", slurm="mine")
    done = nemotron("profiles", "init", "slurm", *SLURM)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: profiles/slurm.yaml: is there already\n")
    assert (work / "profiles" / "slurm.yaml").read_text() == "mine"
    assert nemotron("profiles", "init", "slurm", *SLURM, "--force").returncode == 0
    assert load_profile("slurm", env={}).data["account"] == "ours"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("slurm",), "error: a slurm profile needs --remote-job-dir\n       on a terminal it is asked for"),
        (("lepton",), "error: a lepton profile needs --resource-shape, --mount, --remote-job-dir"),
        (("local", "--account", "x"), "error: --account has no meaning for the executor local"),
        (("slurm", *SLURM, "--user", "x"), "error: --user needs --host"),
        (("slurm", "--remote-job-dir", "lustre"), "error: profile slurm: remote_job_dir must be an absolute path"),
        (("dgx",), "error: invalid value for {slurm|lepton|local}"),
    ],
)
def test_init_says_what_it_needs(work: Path, nemotron: Nemotron, arguments: tuple[str, ...], expected: str) -> None:
    done = nemotron("profiles", "init", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert not (work / "profiles").exists()


def test_init_says_where_it_cannot_write(work: Path, nemotron: Nemotron) -> None:
    (work / "file").touch()
    done = nemotron("profiles", "init", "local", "--output", "file/p.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: file/p.yaml: cannot be written: not a directory\n" or "file exists" in done.stderr


def test_init_asks_on_a_terminal(work: Path) -> None:
    answers = iter(
        ["ours\n", "gpu\n", "\n", "/lustre/me\n", "cluster\n"]
    )  # an answer that is needed is asked for again
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "nemotron_launch", "profiles", "init", "slurm"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    seen = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if not select.select([master], [], [], 10)[0]:
            break
        try:
            seen += os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if seen.endswith(b": "):
            seen += b"\n"
            os.write(master, next(answers).encode())
    assert process.wait(10) == 0, seen
    data = load_profile("slurm", env={}).data
    assert (data["account"], data["remote_job_dir"], data["tunnel"]["host"]) == ("ours", "/lustre/me", "cluster")


def test_every_key_of_a_draft_is_one_of_its_executor(work: Path) -> None:
    needed = {"slurm": {"remote_job_dir": "/x"}, "lepton": {"remote_job_dir": "/x", "resource_shape": "g"}, "local": {}}
    for executor, lines in DRAFTS.items():
        examples = {line.key: line.example for line in lines if isinstance(line, Line)}
        (work / "all.yaml").write_text(draft(executor, {**examples, **needed[executor]}))
        assert load_profile("all.yaml", env={}).executor == executor


@settings(deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1))
def test_any_answer_arrives_as_it_was_given(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    text = text.replace("${", "$ {")
    path = tmp_path_factory.mktemp("drafts") / "p.yaml"
    write(path, draft("slurm", {"account": text, "remote_job_dir": "/x" + text}), force=False)
    data = load_profile(str(path), env={}).data
    assert (data["account"], data["remote_job_dir"]) == (text, "/x" + text)
