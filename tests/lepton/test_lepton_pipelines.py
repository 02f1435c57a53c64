"""Pipelines on a workspace that really runs them: its jobs cannot wait, so stages are submitted one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.lepton.service import Service
from tests.lepton.test_lepton_runs import PROFILE

PIPELINE = """\
output_dir: out
stages:
  - {name: second, step: rl/pairs, inputs: {checkpoint_megatron: first}}
  - {name: first, step: sft/small}
"""


@pytest.mark.slow
def test_stages_are_submitted_one_after_another_and_done_ones_are_passed_over(
    tree: Path, lepton: Service, nemotron: Nemotron, tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    profile = PROFILE.format(python=sys.executable, remote=remote).replace("nodes: 2", "nodes: 1")
    Path("cloud.yaml").write_text(profile)
    Path("pair.yaml").write_text(PIPELINE)
    refused = nemotron("pipeline", "run", "pair.yaml", "-b", "./cloud.yaml")
    assert refused.returncode == 2 and "Lepton's jobs cannot wait for another one" in refused.stderr
    assert "-r in place of -b" in refused.stderr

    done = nemotron("pipeline", "run", "pair.yaml", "-r", "./cloud.yaml")
    assert done.returncode == 0, done.stderr
    seen = json.loads((remote / "out/second/seen.json").read_text())
    assert seen["config"]["checkpointing"]["pretrained"] == "out/first/checkpoints"
    first, second = json.loads(nemotron("jobs", "list", "--json").stdout)[::-1]
    assert (first["stage"], second["stage"]) == ("first", "second")
    assert first["ended"] <= second["submitted"]
    again = nemotron("pipeline", "run", "pair.yaml", "-r", "./cloud.yaml")
    assert (again.returncode, again.stderr.count(" is done: ")) == (0, 2)
