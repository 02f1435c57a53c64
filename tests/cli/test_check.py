"""`nemotron steps check`: what CI types."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.sites import SLURM, profile_file


@pytest.fixture
def site(tree: Path) -> Path:
    profile_file(Path("mine"), "cluster", SLURM)
    return Path("mine")


CHECK = ("steps", "check", "--profiles", "mine", "--profile", "cluster")


def test_all_is_well_in_one_line(site: Path, nemotron: Nemotron) -> None:
    done = nemotron(*CHECK)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 compiled, all as they should be\n"


def test_a_difference_is_exit_code_1_with_a_readable_diff(site: Path, nemotron: Nemotron) -> None:
    assert nemotron(*CHECK, "--against", "kept", "--update").returncode == 0
    assert nemotron(*CHECK, "--against", "kept").returncode == 0
    profile_file(site, "cluster", SLURM, qos="high")
    done = nemotron(*CHECK, "small", "-c", "tiny", "--against", "kept")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "sft/small -c tiny, profile cluster"
    assert "  --- kept/sft_small-tiny-cluster/job.sbatch" in lines
    assert "  +#SBATCH --qos=high" in lines
    assert lines[-1] == "1 compiled, 1 wrong"


def test_reports_for_machines(site: Path, nemotron: Nemotron) -> None:
    profile_file(site, "cluster", SLURM, segment=4)
    done = nemotron(*CHECK, "small", "--json", "--junit", "out/junit.xml")
    assert done.returncode == 1
    rows = json.loads(done.stdout)
    assert [(row["step"], row["config"], row["profile"], row["ok"]) for row in rows] == [
        ("sft/small", "default", "cluster", False),
        ("sft/small", "tiny", "cluster", False),
    ]
    assert "1 nodes are not whole segments of 4" in rows[0]["problems"][0]
    suite = ElementTree.parse("out/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update"], "--update goes with --against"),
        (["smal"], "there is no step smal"),
        (["-c", "tny"], "no step has a config tny"),
        (["--junit", "/proc/x/y"], "/proc/x/y: cannot be written"),
        (["--against", "/proc/x", "--update"], "/proc/x"),
    ],
)
def test_a_wrong_command_says_one_thing(site: Path, nemotron: Nemotron, arguments: list[str], message: str) -> None:
    done = nemotron(*CHECK, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


def test_a_profile_that_is_not_there_is_a_problem(site: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "check", "small", "--profile", "clutser", "--profiles", "mine")
    assert done.returncode == 1
    assert "there is no profile clutser" in done.stdout
