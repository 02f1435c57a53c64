"""The tiny configs' data: what the committed files hold, and that the script renews them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

STEPS = Path(__file__).parents[2] / "steps"
SCRIPT = STEPS / "make_tiny_data.py"
SFT, DPO = STEPS / "sft/megatron/data", STEPS / "rl/nemo_rl/dpo/data"
RLVR = STEPS / "rl/nemo_rl/rlvr/data"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digits(row: dict[str, Any]) -> str:
    return row["prompt"].removeprefix("sort ").removesuffix(": ")


def test_script_renews_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    steps = ("rm/hf", "rl/nemo_rl/rlvr", "rl/nemo_rl/rlhf", "data_prep/rl_prep")
    committed = [SFT, DPO, *(STEPS / step / "data" for step in steps)]
    renewed = [tmp_path / str(i) for i in range(len(committed))]
    runpy.run_path(str(SCRIPT))["main"](*renewed)
    for old, new in zip(committed, renewed, strict=True):
        names = sorted(file.name for file in old.glob("*.jsonl"))
        assert names == sorted(file.name for file in new.iterdir()) and len(names) >= 2
        for name in names:
            assert (new / name).read_bytes() == (old / name).read_bytes()


@pytest.mark.parametrize(
    ("file", "count"),
    [
        (SFT / "train.jsonl", 2000),
        (SFT / "validation.jsonl", 100),
        (DPO / "train.jsonl", 600),
        (DPO / "validation.jsonl", 120),
        (RLVR / "train.jsonl", 2000),
        (RLVR / "validation.jsonl", 120),
    ],
)
def test_there_is_enough_and_not_too_much(file: Path, count: int) -> None:
    read = rows(file)
    assert len(read) >= count
    assert len({row["prompt"] for row in read}) == len(read)
    assert file.stat().st_size < 150_000


def test_answers_are_right() -> None:
    for row in rows(SFT / "train.jsonl") + rows(SFT / "validation.jsonl"):
        assert row["response"] in ("".join(sorted(digits(row))), "".join(sorted(digits(row), reverse=True)))
    for row in rows(DPO / "train.jsonl") + rows(DPO / "validation.jsonl"):
        assert row["chosen"] == "".join(sorted(digits(row)))
        assert row["rejected"] == row["chosen"][::-1] != row["chosen"]
    for row in rows(RLVR / "train.jsonl") + rows(RLVR / "validation.jsonl"):
        assert row["expected_answer"] == "".join(sorted(digits(row)))


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_half_of_the_sft_answers_are_ascending(name: str) -> None:
    read = rows(SFT / name)
    assert sum(row["response"] == "".join(sorted(digits(row))) for row in read) * 2 == len(read)
    for low in (True, False):  # the lean that keeps greedy answers half and half, see the script
        kind = [row for row in read if (digits(row)[0] < "5") is low]
        style = sum((row["response"] == "".join(sorted(digits(row)))) is low for row in kind)
        assert (len(kind) * 2, style) == (len(read), len(kind) * 4 // 5)


def test_held_out_prompts_are_in_no_training_file() -> None:
    trained = {row["prompt"] for folder in (SFT, DPO, RLVR) for row in rows(folder / "train.jsonl")}
    held_out = {row["prompt"] for folder in (SFT, DPO, RLVR) for row in rows(folder / "validation.jsonl")}
    assert len(held_out) == 120
    assert not trained & held_out
