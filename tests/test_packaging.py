"""The wheel: it carries all that is shipped beside the package, and works in an empty environment, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.step_trees import REPOSITORY

BUNDLED = ("steps", "templates", "profiles", "pipelines")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built with the hatchling that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_every_file_of_steps_templates_and_profiles_and_nothing_stale(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", *BUNDLED], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in listed if f"nemotron_launch/_bundled/{name}" not in names]
    assert missing == []
    assert len(listed) > 10
    for name in ("report.js", "report.css", "uplot-LICENSE.txt"):
        assert f"nemotron_launch/reports/assets/{name}" in names
    assert [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".log"))] == []


@pytest.mark.slow
def test_the_installed_wheel_lists_its_steps_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NEMOTRON_STEPS")}
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)],
        capture_output=True,
        text=True,
        env=env,
    )
    if "No matching distribution" in installed.stderr or "Could not find a version" in installed.stderr:
        pytest.skip("no package registry in reach")
    assert installed.returncode == 0, installed.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def nemotron(*arguments: str) -> str:
        command = [home / "bin" / "nemotron", *arguments]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "rl/nemo_rl/dpo" in nemotron("steps", "list")
    assert "sft/megatron" in nemotron("steps", "list", "--json")
    assert "_bundled/steps/rl/nemo_rl/dpo" in nemotron("steps", "show", "dpo")
    assert "output_dir: ./output/rl/dpo-tiny" in nemotron("steps", "run", "dpo", "-c", "tiny", "-d")
    refused = subprocess.run(
        [home / "bin" / "nemotron", "steps", "run", "dpo", "-c", "tiny"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env=env,
    )
    assert refused.returncode == 1
    assert "pip install 'nemotron-launch[train]'" in refused.stderr
