"""Real preference data: solutions of GSM8K problems, judged right and wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemotron_launch.trainer.data.preference import load_preferences
from nemotron_launch.trainer.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("NEMOTRON_TEST_GSM8K", REPOSITORY / "../shared/data/gsm8k"))


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no folder {FOLDER}; NEMOTRON_TEST_GSM8K names another")
@pytest.mark.parametrize("which", ["byte_tokenizer", "chat_tokenizer"])
@pytest.mark.parametrize("name", ["train", "validation"])
def test_every_row_of_real_preferences_loads(name: str, which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    file = FOLDER / f"preferences.{name}.jsonl"
    pairs, bad = load_preferences({"data_path": str(file)}, tokenizer=tokenizer, max_length=4096, max_bad_rows=0.0)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == bad.total == len(rows) > 300
    assert bad.summary() == ""
    for pair, row in zip(pairs, rows, strict=True):
        assert row["prompt"] in tokenizer.decode(pair.prompt_ids)
        assert tokenizer.decode(pair.chosen_answer).startswith(row["chosen"].rstrip("\n"))
        assert tokenizer.decode(pair.rejected_answer).startswith(row["rejected"].rstrip("\n"))
