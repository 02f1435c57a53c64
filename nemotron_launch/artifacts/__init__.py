"""Typed outputs of runs: recorded beside them and in the ledger, named by later steps, checked along the chain.

Here only what every compilation asks, so that one that uses no artifact imports nothing more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

RECORD = "artifacts.json"
ABOVE = 7  # folders between a run's output folder and the deepest that a config names: …/step_N/policy/weights/iter_N


def names_artifact(value: Any) -> bool:
    """Whether a value, or one of a list, is the name of an artifact instead of a path."""
    if isinstance(value, list):
        return any(names_artifact(one) for one in value)
    return isinstance(value, str) and value.startswith(("run:", "artifact:"))


def records_around(path: str) -> Iterator[str]:
    """The folders at a path and above it that hold a record, the nearest first."""
    folder = os.path.abspath(path)
    for _ in range(ABOVE + 1):
        if os.path.isfile(os.path.join(folder, RECORD)):
            yield folder
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return
