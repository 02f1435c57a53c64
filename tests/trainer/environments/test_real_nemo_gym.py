"""NeMo Gym's own servers score their own example rows; NEMOTRON_TEST_NEMO_GYM names a Python that has nemo-gym."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_launch.trainer.environments import Rollout

PYTHON = os.environ.get("NEMOTRON_TEST_NEMO_GYM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="NEMOTRON_TEST_NEMO_GYM names no Python with nemo-gym"),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, Path]]:
    """The head server's address, and the folder of the servers' examples."""
    process = subprocess.Popen(
        [str(PYTHON), str(HERE / "real_gym.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address, folder = process.stdout.readline().split()
    yield address, Path(folder)
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


@pytest.mark.parametrize("name", ["mcqa", "math_with_judge", "reasoning_gym"])
def test_real_servers_score_their_examples(opened, servers, name):
    address, folder = servers
    section = {"server": address, "ready_timeout": 300, "timeout": 120}
    environments = opened(should_use_nemo_gym=True, nemo_gym=section)
    lines = (folder / name / "data/example.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "agent_ref": {"name": f"{name}_simple_agent"}} for line in lines]
    environments.check(rows, [f"example.jsonl:{n}" for n in range(1, len(rows) + 1)])
    groups = []
    for i, row in enumerate(rows):
        right = str(row.get("expected_answer") or row["answer"])
        said = f"<answer>{right}</answer>" if name == "reasoning_gym" else rf"<think>hm</think>So \boxed{{{right}}}"
        groups.append([Rollout([], text, row, key=(0, i, n)) for n, text in enumerate((said, r"\boxed{none}"))])
    scores = environments.score(groups)
    assert not any(score.lost for group in scores for score in group)
    assert all(wrong.reward == 0 for _, wrong in scores)
    # The server does not read its own reference where it is in \( \); two of its five are.
    assert sum(right.reward for right, _ in scores) >= (3 if name == "math_with_judge" else len(rows))
    unreadable = {key: value for key, value in rows[0].items() if key not in ("options", "expected_answer", "question")}
    if name != "mcqa":  # all of whose fields are optional
        assert "Field required" in environments.problems([unreadable])[0]
