"""Runs of this machine, through the real commands: what they make is registered, and named by the next."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from nemotron_launch.artifacts import registry
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import open_host
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.submission import _check_named
from tests.conftest import Nemotron
from tests.jobs.rows import row
from tests.step_trees import SCRIPT

RECORDED = SCRIPT.replace(
    "sys.exit(config.get",
    "if not config.get('exit', 0):\n"
    "    from nemotron_launch.artifacts.record import register_finished\n"
    "    register_finished(pathlib.Path(__file__).parent, config, config_path=known.config)\n"
    "sys.exit(config.get",
)
SFT = ("steps", "run", "sft/small", "data.path=rows.jsonl")
PAIRS = ("steps", "run", "rl/pairs", "data.path=rows.jsonl")


@pytest.fixture
def ledger(tree: Path) -> Ledger:
    """The ledger of a tree of steps that record what they make."""
    for step in ("sft/small", "rl/pairs"):
        (tree / step / "train.py").write_text(RECORDED)
    Path("rows.jsonl").write_text("{}\n")
    return Ledger()


def test_the_end_of_a_run_registers_what_it_made_and_the_next_one_names_it(ledger: Ledger, nemotron: Nemotron) -> None:
    assert nemotron(*SFT).returncode == 0
    (sft,) = registry.entries(ledger)  # without another command
    assert sft.label == "sft@1"
    done = nemotron(*PAIRS, "checkpointing.pretrained=run:last:small")
    assert done.returncode == 0, done.stderr
    seen = json.loads(Path("out/pairs/seen.json").read_text())
    assert seen["config"]["checkpointing"]["pretrained"] == f"{Path.cwd()}/out/sft/checkpoints/step_1"
    pairs = registry.find(ledger, "pairs")
    assert [used.record for used in pairs.record.inputs if used.type == "checkpoint_megatron"] == [sft.record.digest]
    assert [use["name"] for use in pairs.uses if use.get("name")] == ["sft"]
    again = nemotron(*SFT, "exit=3")
    assert again.returncode == 3 and len(registry.entries(ledger)) == 2


def test_a_run_in_the_background_is_registered_by_who_waits_for_it(ledger: Ledger, nemotron: Nemotron) -> None:
    run = json.loads(nemotron(*SFT, "-b", "local", "--json").stdout)
    assert nemotron("jobs", "wait", run["run_id"]).returncode == 0
    made = registry.of_run(ledger, run["run_id"])
    assert made and made.label == "sft@1" and made.record.artifacts[0].checkpoint == "step_1"


def test_points_of_a_sweep_are_versions_of_one_name(ledger: Ledger, nemotron: Nemotron) -> None:
    Path("other.jsonl").write_text("{}\n")
    done = nemotron("steps", "run", "sft/small", "--sweep", "data.path=rows.jsonl,other.jsonl")
    assert done.returncode == 0, done.stderr
    made = sorted(registry.entries(ledger), key=lambda one: one.version)
    assert [one.name for one in made] == ["small-default"] * 2 and [one.version for one in made] == [1, 2]
    done = nemotron(
        *PAIRS, "-d", "--sweep", "checkpointing.pretrained=artifact:small-default@1,artifact:small-default@2"
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_that_names_nothing_reads_no_ledger(tree: Path, nemotron: Nemotron, tmp_path: Path) -> None:
    Path("rows.jsonl").write_text("{}\n")
    (tmp_path / "state").write_text("not a folder")
    assert nemotron(*SFT, "-d").returncode == 0
    done = nemotron(*PAIRS, "-d", "checkpointing.pretrained=run:last")
    assert done.returncode == 1 and "the ledger of runs" in done.stderr and "Traceback" not in done.stderr


def test_what_is_gone_by_the_time_of_submission_is_said_before_anything_is_submitted(
    ledger: Ledger, nemotron: Nemotron
) -> None:
    assert nemotron(*SFT).returncode == 0
    place = f"{Path.cwd()}/out/sft/checkpoints/step_1"
    use = {
        "key": "checkpointing.pretrained",
        "text": "run:last",
        "name": "sft",
        "version": 1,
        "run_id": "r",
        "place": place,
    }
    run = row("next", uses=(use,), created=time.time())
    _check_named(open_host({}), [run])
    shutil.rmtree("out/sft")
    with pytest.raises(UserError) as raised:
        _check_named(open_host({}), [run])
    assert raised.value.message == f"checkpointing.pretrained=run:last: sft@1 (run r) is gone: there is no {place}"
    done = nemotron(*PAIRS, "-b", "local", "checkpointing.pretrained=artifact:sft@1")
    assert done.returncode == 2 and "is gone: there is no" in done.stderr
