"""Compares answers as mathematical expressions, by math-verify: in a worker, it may hang and needs a main thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import right_answers
from nemotron_launch.trainer.environments.math import LONGEST_ANSWER, RIGHT, WRONG, right_answer, said_answer


def compare(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """The score by math-verify, in the main thread of a worker. Raises what math-verify raises."""
    answer, announced = said_answer(text)
    said = parse(_boxed(answer) if announced else answer[-LONGEST_ANSWER:], raise_on_error=True)
    for right in map(right_answer, right_answers(row)):
        known = parse(_boxed(right), raise_on_error=True)
        if not known:
            raise ValueError(f"the right answer cannot be read as mathematics: {right[:80]}")
        if verify(known, said, raise_on_error=True):
            return RIGHT
    return WRONG


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"
