"""The verifier math on GSM8K: right solutions are right, and those that people marked as wrong are wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from nemotron_launch.trainer.environments import Rollout

FOLDER = Path(os.environ.get("NEMOTRON_TEST_GSM8K", Path(__file__).parents[3] / "../shared/data/gsm8k"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no folder {FOLDER}; NEMOTRON_TEST_GSM8K names another")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def right() -> dict[str, str]:
    """The number behind #### by question."""
    both = rows("test.jsonl") + rows("train.jsonl")
    return {" ".join(row["question"].split()): row["answer"].rsplit("####", 1)[1].strip() for row in both}


def test_all_reference_solutions_are_right(opened, right):
    solutions = rows("test.jsonl")
    groups = [
        [Rollout([], row["answer"], {"expected_answer": right[" ".join(row["question"].split())]})] for row in solutions
    ]
    environments = opened()
    started = time.process_time()
    scores = [score for (score,) in environments.score(groups)]
    seconds = time.process_time() - started
    assert len(scores) == 1319
    assert all(score.reward == 1 and not score.error for score in scores)
    # 38,000 checks a second here; a tenth of the promised thousand allows for any machine.
    assert len(scores) / seconds > 100


@pytest.mark.parametrize("name", ["preferences.train.jsonl", "preferences.validation.jsonl"])
def test_marked_solutions_are_scored_as_they_were_marked(opened, right, name):
    pairs = rows(name)
    groups = []
    for pair in pairs:
        row = {"expected_answer": right[" ".join(pair["prompt"].split())]}
        groups.append([Rollout([], pair["chosen"], row), Rollout([], pair["rejected"], row)])
    scores = opened().score(groups)
    assert not any(score.error for group in scores for score in group)
    assert sum(chosen.reward for chosen, _ in scores) >= 0.99 * len(pairs)
    assert sum(rejected.reward for _, rejected in scores) == 0
