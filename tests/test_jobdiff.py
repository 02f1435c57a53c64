"""How two compiled jobs differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_launch import jobdiff
from nemotron_launch.errors import UserError
from tests.conftest import Nemotron
from tests.sites import LEPTON, SLURM, profile_file

DPO = "rl/nemo_rl/dpo"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "site"
    profile_file(work / "profiles", "cluster", SLURM)
    profile_file(work / "profiles", "bigger", SLURM, qos="high")
    profile_file(work / "profiles", "cloud", LEPTON)
    monkeypatch.chdir(work)
    return work


def compare(a: str, b: str) -> str:
    return jobdiff.compare(jobdiff.load(a), jobdiff.load(b))


def test_a_job_does_not_differ_from_itself(site: Path) -> None:
    assert compare("dpo", "dpo:default") == ""
    assert compare("dpo:tiny:cloud", f"{DPO}:tiny:cloud") == ""


def test_configs_differ_by_key(site: Path, nemotron: Nemotron) -> None:
    Path("mine.yaml").write_text("defaults: step://config/tiny\ndpo: {seed: 7, max_num_epochs: 1}\n")
    text = compare("dpo:tiny:cluster", "dpo:mine.yaml:cluster")
    assert "-dpo.seed=42\n+dpo.seed=7\n" in text
    assert "-dpo.max_num_epochs=10\n+dpo.max_num_epochs=1\n" in text
    done = nemotron("steps", "diff", "dpo:tiny:cluster", "dpo:mine.yaml:cluster")
    assert (done.returncode, done.stdout) == (1, text)


def test_scripts_differ_by_line_and_not_by_the_run_id(site: Path) -> None:
    text = compare("dpo:default:cluster", "dpo:default:bigger")
    changed = [line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    assert "+#SBATCH --qos=high" in changed
    assert not [line for line in changed if "job-name" in line]


@pytest.mark.parametrize("profile", ["cluster", "cloud"])
def test_a_jobs_folder_is_a_side_and_its_run_id_does_not_count(site: Path, nemotron: Nemotron, profile: str) -> None:
    for name in ("first", "second"):
        done = nemotron("steps", "run", DPO, "-b", profile, "-d", "--output", f"dir={name}", "--run-id", f"run-{name}")
        assert done.returncode == 0, done.stderr
    text = compare("first", "second")
    assert [line for line in text.splitlines() if line.startswith(("+", "-")) and "run-" in line] == []
    if profile == "cluster":
        assert text == ""
        assert nemotron("steps", "diff", "first", f"{DPO}:default:cluster").returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("empty", "empty: is not a job's folder: it has no config.yaml"),
        ("file", "file: is a file; a job is a folder"),
        ("dqo", "dqo is no folder, and there is no step dqo"),
        ("dpo:defualt", "rl/nemo_rl/dpo has no config defualt"),
        ("dpo:default:clutser", "there is no profile clutser"),
    ],
)
def test_what_is_no_job_is_said(site: Path, nemotron: Nemotron, text: str, message: str) -> None:
    Path("empty").mkdir()
    Path("file").write_text("")
    with pytest.raises(UserError):
        jobdiff.load(text)
    done = nemotron("steps", "diff", "dpo", text)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
