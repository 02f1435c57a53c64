"""A tree of small steps that record what they make, and a pipeline of three of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipelines.small_pipeline import ENDING, RECORDING, THREE


@pytest.fixture
def three(tree: Path) -> Path:
    """The file of a pipeline first → second → third, in the working directory; its steps record what they make."""
    for script in tree.rglob("train.py"):
        script.write_text(script.read_text().replace(ENDING, RECORDING + ENDING))
        # That a run was here, and which: what the stage before left is counted into it.
        script.write_text(
            script.read_text().replace(
                "'{\"step\": 1}'",
                'json.dumps({"step": 1, "from": config["checkpointing"]["pretrained"], "pid": os.getpid()})',
            )
        )
    Path("rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    path = Path("three.yaml")
    path.write_text(THREE)
    return path
