"""The tutorial, executed: every command of the page in order, in an empty folder, and what the page shows of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.step_trees import REPOSITORY

pytestmark = pytest.mark.slow
PAGE = REPOSITORY / "docs" / "tutorial.md"
# Numbers may differ in their last digits from machine to machine, times anyhow. What is learnt is checked below.
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]\d+)?")


class Part(NamedTuple):
    """Commands of the page, and the lines that it shows below them."""

    commands: str
    shown: tuple[str, ...]


def parts() -> list[Part]:
    found: list[Part] = []
    for kind, body in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if kind == "bash":
            found.append(Part(body, ()))
        else:
            found[-1] = found[-1]._replace(shown=(*found[-1].shown, *body.splitlines()))
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the page was followed, and what each of its parts printed."""
    home = tmp_path_factory.mktemp("tutorial")
    for name, words in (("nemotron", "-m nemotron_launch"), ("python", "")):
        (home / "bin").mkdir(exist_ok=True)
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    work = home / "work"
    work.mkdir()
    left_out = ("RL_OUTPUT_DIR", "NEMOTRON_STEPS", "RL_BLEND", "RL_POLICY_MODEL")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= {"PATH": f"{home}/bin:{env['PATH']}", "NEMOTRON_STATE_DIR": str(home / "state"), "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1"}  # models this small are not faster on two
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")])
    said = []
    for part in parts():
        command = ["bash", "-euo", "pipefail", "-c", part.commands]
        ran = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{part.commands}\n{ran.stdout}{ran.stderr}"
        said.append(ran.stdout + ran.stderr)
    return work, said


def test_every_line_that_the_page_shows_is_printed(done: tuple[Path, list[str]]) -> None:
    checked = 0
    for part, said in zip(parts(), done[1], strict=True):
        printed = [NUMBER.sub("#", line) for line in said.splitlines()]
        for line in part.shown:
            assert any(NUMBER.sub("#", line) in one for one in printed), f"not printed: {line}\n{said}"
            checked += 1
    assert checked >= 12


def test_the_model_learns_what_the_page_says(done: tuple[Path, list[str]]) -> None:
    accuracies = [float(text) for text in re.findall(r"validation: accuracy ([\d.]+)", "".join(done[1]))]
    assert accuracies[0] < 0.6 and accuracies[-1] >= accuracies[0] + 0.25
    # It sorts upwards for nobody but the last model, which transformers has loaded.
    assert "sort 94061: 01469" in done[1][-2]


def test_both_sides_of_a_conversion_compute_the_same(done: tuple[Path, list[str]]) -> None:
    differences = [float(text) for text in re.findall(r"largest difference ([\d.e-]+)", "".join(done[1]))]
    assert len(differences) == 2 and max(differences) < 1e-4


def test_the_page_about_the_run_needs_no_network(done: tuple[Path, list[str]]) -> None:
    page = (done[0] / "report.html").read_text()
    assert "validation/accuracy" in page
    assert not re.findall(r"""(?:src|href)=["']?https?:""", page)


def test_the_one_file_compiles_to_the_same_jobs(done: tuple[Path, list[str]]) -> None:
    jobs = (done[0] / "jobs.txt").read_text()
    assert re.findall(r"^# stage \d of 6, (\S+):", jobs, re.MULTILINE) == [
        "start", "answers", "tasks", "sft", "rlvr", "finish"
    ]  # fmt: skip
    assert "path: output/rl/align/start/checkpoints" in jobs
