"""The page on CI and its workflow files hold what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import Nemotron
from tests.sites import LEPTON, SLURM, profile_file
from tests.step_trees import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of a user's, as the page means it."""
    work = tmp_path / "site"
    for folder in ("profiles", "ops/profiles"):
        profile_file(work / folder, "cluster", SLURM)
        profile_file(work / folder, "cloud", LEPTON)
    (work / "mine.yaml").write_text("defaults: step://config/default\ndpo: {seed: 1}\n")
    monkeypatch.chdir(work)


def commands(text: str) -> list[list[str]]:
    found = re.findall(r"^(?:\s*- (?:run: )?)?nemotron (.*?)(?: +#.*)?$", text, re.MULTILINE)
    return [line.split() for line in found]


def test_the_commands_of_the_page_work(site: None, nemotron: Nemotron) -> None:
    listed = commands((DOCS / "ci.md").read_text())
    assert len(listed) >= 9
    for words in listed:
        done = nemotron(*words)
        expected = {1} if words[1] == "diff" else {0}
        assert done.returncode in expected, f"{words}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_the_workflow_files_run_what_they_say(site: None, nemotron: Nemotron, name: str) -> None:
    text = (DOCS / "ci" / name).read_text()
    assert yaml.safe_load(text)
    (words,) = commands(text)
    assert nemotron(*words).returncode == 1, "there are no renderings yet"
    assert nemotron(*words, "--update").returncode == 0
    assert nemotron(*words).returncode == 0
    assert Path("check.xml").is_file()


def test_the_pages_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / "ci.md").read_text()):
        assert (DOCS / target).is_file(), target
