"""Rows that only name a row of a public dataset: filled in from the local cache, or listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.errors import UserError
from tests.data_prep.preparations import adds_up, rows_of, run, write_blend, write_rows

AGENT = {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}
PROBLEMS = [
    {"prompt": [{"role": "user", "content": f"What is {i} + {i}?"}], "reward_model": {"ground_truth": str(2 * i)}}
    for i in range(50)
]


def placeholder(row: int, dataset: str, template: Any) -> dict[str, Any]:
    named = {"row": row, "question_template": template}
    return {"id": row, "dataset": dataset, "_hf_placeholder": named, "agent_ref": AGENT}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as the hub's library keeps it, made here."""
    import datasets

    folder = tmp_path_factory.mktemp("saved") / "dapo"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(PROBLEMS)}).save_to_disk(str(folder))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    whole = {"responses_create_params": {"input": "whole"}, "agent_ref": AGENT, "_hf_placeholder": None}
    return write_rows(
        tmp_path / "rows.jsonl",
        [
            placeholder(3, "ours", {"prefix": "Solve. ", "suffix": " Box it."}),
            placeholder(4, "ours", "Q: {question}"),
            placeholder(50, "ours", None),
            placeholder(1, "nobody's", None),
            whole,
        ],
    )


def test_placeholders_are_filled_in_and_bad_ones_quarantined(tmp_path: Path, saved: Path, rows: Path) -> None:
    blend = write_blend(tmp_path, [{"path": "rows.jsonl"}], placeholders={"ours": {"path": str(saved)}})
    manifest = run(blend, tmp_path / "out", "target=gym", "max_bad_rows=0.5")
    assert adds_up(manifest["counts"])
    assert manifest["quarantine"]["reasons"] == {
        f"_hf_placeholder: {saved} has no row 50, only 50": 1,
        "_hf_placeholder: the blend's placeholders do not say what dataset nobody's is": 1,
    }
    made = {row.get("id"): row for row in rows_of(tmp_path / "out")}
    assert made[3]["responses_create_params"]["input"] == [{"role": "user", "content": "Solve. What is 3 + 3? Box it."}]
    assert (made[3]["expected_answer"], made[3]["agent_ref"]) == ("6", AGENT)
    assert made[4]["question"] == "Q: What is 4 + 4?"
    assert set(made) == {3, 4, None}


def test_unresolved_placeholders_are_dropped_when_asked(tmp_path: Path, rows: Path) -> None:
    blend = write_blend(tmp_path, [{"path": "rows.jsonl"}])
    manifest = run(blend, tmp_path / "out", "target=gym", "max_bad_rows=0.9", "resolve_hf_placeholders=false")
    assert (manifest["counts"]["train"], manifest["counts"]["dropped"]) == (1, {"bad_row": 4})


def test_what_is_missing_is_listed_and_found_once_it_is_there(tmp_path: Path, saved: Path) -> None:
    write_rows(
        tmp_path / "rows.jsonl",
        [
            placeholder(1, "nano_v3_sft_profiled_dapo17k", None),
            placeholder(1, "nano_v3_sft_profiled_skywork_no_omni", None),
            placeholder(2, "nano_v3_sft_profiled_skywork_no_omni", None),
        ],
    )
    blend = write_blend(tmp_path, [{"path": "rows.jsonl"}])
    with pytest.raises(UserError) as refusal:
        run(blend, tmp_path / "out", "target=gym", f"cache_dir={tmp_path / 'cache'}")
    text = str(refusal.value)
    assert "2 datasets are not there" in text
    assert "BytedTsinghua-SIA/DAPO-Math-17k, split train: not in the local cache" in text
    assert "(for 1 rows of nano_v3_sft_profiled_dapo17k)" in text
    assert "Skywork/Skywork-OR1-RL-Data, split math: not in the local cache" in text
    assert "(for 2 rows of nano_v3_sft_profiled_skywork_no_omni)" in text


def test_saved_dataset_is_a_source_with_its_split(tmp_path: Path, saved: Path) -> None:
    blend = write_blend(tmp_path, [{"path": str(saved), "environment": "math", "limit": 30}])
    manifest = run(blend, tmp_path / "out", "target=rlvr", "dedup.near=false")
    assert manifest["counts"]["train"] == 30
    assert {row["prompt"] for row in rows_of(tmp_path / "out")} == {f"What is {i} + {i}?" for i in range(30)}
    blend = write_blend(tmp_path, [{"path": str(saved), "split": "test"}])
    with pytest.raises(UserError, match="is not there") as refusal:
        run(blend, tmp_path / "out", "target=rlvr")
    assert "split test: there is no such split, only train" in str(refusal.value)
