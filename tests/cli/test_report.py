"""`nemotron jobs report` as a person types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.reports.conftest import add_run, make_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ledger with one finished run, a-run, and an empty working directory."""
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    add_run("a-run", make_run(tmp_path / "out"), overrides=("env.judge.api_key=s3cret", "grpo.seed=7"))
    return tmp_path


def test_it_writes_a_page_and_says_where(here: Path, nemotron: Nemotron) -> None:
    done = nemotron("jobs", "report", "a-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("wrote a-run.html (")
    text = Path("a-run.html").read_text(encoding="ascii")
    assert "<title>a-run</title>" in text
    assert "s3cret" not in text
    assert "grpo.seed=7" in text
    assert os.listdir() == ["a-run.html"]


def test_the_page_can_go_elsewhere_and_to_the_terminal(here: Path, nemotron: Nemotron) -> None:
    assert nemotron("jobs", "report", "last", "-o", "x.html").stderr.startswith("wrote x.html")
    done = nemotron("jobs", "report", "last", "-o", "-")
    assert (done.stdout, done.stderr) == (Path("x.html").read_text(), ""), "and the bytes are the same"


def test_its_data_are_json(here: Path, nemotron: Nemotron) -> None:
    data = json.loads(nemotron("jobs", "report", "a-", "--json").stdout)
    assert data["runs"][0]["name"] == "a-run"
    assert data["runs"][0]["last_step"] == 60


def test_several_runs_and_folders_share_a_page(here: Path, nemotron: Nemotron) -> None:
    make_run(here / "work" / "other", grpo={"max_num_steps": 60, "seed": 2})
    done = nemotron("jobs", "report", "a-run", "other")
    assert done.stderr.startswith("wrote a-run-and-1-more.html")
    data = json.loads(nemotron("jobs", "report", "a-run", "./other", "--json").stdout)
    assert [run["name"] for run in data["runs"]] == ["a-run", "other"]
    assert data["differences"] == ["grpo.seed"]


def test_a_sweep_is_all_its_points(here: Path, nemotron: Nemotron) -> None:
    for point in range(3):
        folder = make_run(here / f"out-{point}", grpo={"seed": point})
        add_run(f"s.{point}", folder, sweep="s", point=point, created=1.8e9)
    assert nemotron("jobs", "report", "s").stderr.startswith("wrote s.html")
    data = json.loads(nemotron("jobs", "report", "s", "--json").stdout)
    assert [run["point"] for run in data["runs"]] == [0, 1, 2]


def test_a_corrupt_line_is_named_once_and_the_rest_is_shown(here: Path, nemotron: Nemotron) -> None:
    path = here / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:30]
    path.write_text("\n".join(lines) + "\n")
    done = nemotron("jobs", "report", "a-run")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == (
        "warning: a-run: metrics.jsonl:17: is not a JSON object; the line is left out"
    )
    assert done.stderr.count("metrics.jsonl:17") == 1


def test_metrics_without_a_line_that_can_be_read_are_one_message(here: Path, nemotron: Nemotron) -> None:
    (here / "out" / "metrics.jsonl").write_text("oops\n" * 50)
    done = nemotron("jobs", "report", "a-run")
    assert done.returncode == 1
    assert done.stderr == f"error: {here}/out/metrics.jsonl:1: nothing in the metrics of a-run can be read\n"


def test_a_run_that_shows_signs_is_warned_of(here: Path, nemotron: Nemotron) -> None:
    with (here / "out" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "train/truncation_rate": 0.5}) + "\n" for step in range(61, 200))
    data = json.loads(nemotron("jobs", "report", "a-run", "--json").stdout)
    warning = data["runs"][0]["warnings"][0]
    assert warning["when"] == "Answers are cut off at their longest length."
    assert warning["parameters"][0] == "policy.generation.max_new_tokens"
    shown = nemotron("jobs", "status", "a-run").stdout
    assert (
        "\nwarnings\n  Answers are cut off at their longest length.\n    train/truncation_rate is 0.5 (steps 180-199)"
        in shown
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: there is no run 'nothing'\n       nemotron jobs list shows the runs\n"),
        (["./nothing"], "error: nothing: there is no such folder\n"),
        ([".."], "error: ..: holds no metrics.jsonl\n"),
        (["../out/config.yaml"], "error: ../out/config.yaml: is no folder\n"),
        (["a-run", "-o", "/nowhere/x.html"], "error: /nowhere/x.html: no such file or directory\n"),
        (["a-run", "-o", "."], "error: .: is a directory\n"),
        ([], "error: missing argument RUN...\n"),
    ],
)
def test_bad_input_is_one_message(here: Path, nemotron: Nemotron, arguments: list[str], message: str) -> None:
    done = nemotron("jobs", "report", *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(message)
    assert done.stdout == ""
    assert os.listdir() == []


def test_a_deleted_run_is_one_message_and_a_warning_beside_others(here: Path, nemotron: Nemotron) -> None:
    add_run("gone", here / "away")
    done = nemotron("jobs", "report", "gone")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {here}/away: the output of gone is gone\n")
    done = nemotron("jobs", "report", "gone", "a-run", "-o", "both.html")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == f"warning: {here}/away: the output of gone is gone"
