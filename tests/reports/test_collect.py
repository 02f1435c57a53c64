"""What a report gathers around the numbers: lineages as one graph, the step of a folder, warnings that are cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.reports.collect import lineage_of, quick_warnings, step_of
from nemotron_launch.reports.sources import open_folder, update
from tests.jobs.rows import row
from tests.reports.conftest import make_run

DATA = {"type": "training_jsonl", "key": "data.train.data_path", "text": "x.jsonl", "place": "/data/x.jsonl"}


def test_lineages_of_several_runs_are_one_graph(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add([row("a", uses=(DATA,)), row("b", uses=(DATA,)), row("c")])
        runs = {run.run_id: run for run in ledger.runs()}
        found = lineage_of(ledger, [runs["a"], runs["b"]])
        assert found is not None
        assert found["roots"] == ["a", "b"]
        assert sorted(node["id"] for node in found["nodes"]) == ["/data/x.jsonl", "a", "b"]
        assert [(link["maker"], link["user"]) for link in found["links"]] == [
            ("/data/x.jsonl", "a"),
            ("/data/x.jsonl", "b"),
        ]
        assert lineage_of(ledger, [runs["c"]]) is None
        assert lineage_of(ledger, []) is None
        json.dumps(found)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"dpo": {}}, "rl/nemo_rl/dpo"),
        ({"sft": {}}, "sft/megatron"),
        ({"rm": {}}, "rm/hf"),
        ({"grpo": {}}, "rl/nemo_rl/rlvr"),
        ({"other": {}}, None),
    ],
)
def test_the_config_of_a_folder_tells_its_step(tmp_path: Path, config: dict[str, Any], step: str | None) -> None:
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    one = open_folder(tmp_path)
    update([one], print)
    found = step_of(one)
    assert (found and found.id) == step


def test_quick_warnings_are_of_short_metrics_on_this_machine(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "out")
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "train/truncation_rate": 0.5}) + "\n" for step in range(61, 200))
    run = row("r", tmp_path, output_dir=str(folder), state="finished", step="rl/nemo_rl/rlvr")
    with Backends() as backends:
        assert [one["when"] for one in quick_warnings(backends, run)] == [
            "Answers are cut off at their longest length."
        ]
        assert quick_warnings(backends, row("gone", output_dir=str(tmp_path / "no"), step="rl/nemo_rl/rlvr")) == []
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("\n" * (9 << 20))
        assert quick_warnings(backends, run) == []
