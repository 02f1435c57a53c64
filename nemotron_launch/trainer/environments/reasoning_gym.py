"""Scores by reasoning-gym's own scorers, in a worker.

Row: an entry of reasoning-gym: `question`, `answer` (or another column of the right answer), `metadata` with
`source_dataset`, the task's name. The answer is what is in the last <answer> tags, or is announced, or all of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import final_answer, right_answers, without_thoughts

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    try:
        metadata = _metadata(row)
    except ValueError as error:
        return str(error)
    name = metadata.get("source_dataset")
    if not isinstance(name, str):
        return "missing key metadata.source_dataset"
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=1)
        return f"metadata.source_dataset is {name}, no task of reasoning-gym" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    return ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """The scorer's number, from 0 to 1. Raises what the scorer raises."""
    metadata = _metadata(row)
    score = reasoning_gym.get_score_answer_fn(metadata["source_dataset"])
    answer = next(iter(right_answers({"answer": row.get("answer")}) or right_answers(row)), None)
    entry = {"question": row.get("question"), "answer": answer, "metadata": metadata}
    return Score(float(score(answer=answer_of(text), entry=entry)))


def answer_of(text: str) -> str:
    """The final answer of a text."""
    text = without_thoughts(text)
    tagged = _TAGGED.findall(text)
    if tagged:
        return str(tagged[-1]).strip()
    found = final_answer(text)
    return text.strip() if found is None else found


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry's metadata. Raises ValueError, in words for the user."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            raise ValueError("metadata is not valid JSON") from None
    if not isinstance(metadata, Mapping):
        raise ValueError("missing key metadata")
    return metadata
