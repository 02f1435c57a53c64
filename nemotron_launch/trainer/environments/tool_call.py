"""Verifies that an answer calls the right tools with the right arguments.

Row: `expected_calls` (or `tool_calls`, or the right answer): a call or a list of calls {name, arguments}, as an object
or as text; an empty list: no call is right. `ordered`: their order counts. `partial_reward`: the share of calls that
are right, instead of all or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import ANSWER_KEYS
from nemotron_launch.trainer.environments.code import same_value
from nemotron_launch.trainer.environments.tool_calls import NoCall, ToolCall, calls_in, calls_of

KEYS = ("expected_calls", "tool_calls", *ANSWER_KEYS)


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    try:
        _expected(row)
    except (NoCall, ValueError) as error:
        return str(error)
    return ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 if exactly the expected calls are made; components: whether they can be read, the share of right names."""
    expected = _expected(row)
    try:
        said = calls_of(text)
    except NoCall:
        return Score(0.0, components={"valid_calls": 0.0, "right_names": 0.0})
    most = max(len(expected), len(said))
    right = _right_ones(said, expected, ordered=bool(row.get("ordered")))
    names = [call.name for call in expected]
    right_names = 0
    for call in said:
        if call.name in names:
            names.remove(call.name)
            right_names += 1
    components = {"valid_calls": 1.0, "right_names": right_names / most if most else 1.0}
    share = right / most if most else 1.0
    return Score(share if row.get("partial_reward") else float(share == 1.0), components=components)


def _expected(row: Mapping[str, Any]) -> list[ToolCall]:
    """The calls that are right. Raises NoCall or ValueError, in words for the user."""
    key = next((key for key in KEYS if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"missing key {' or '.join(KEYS)}")
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{key} is not valid JSON") from None
    try:
        return calls_in(value)
    except NoCall as error:
        raise ValueError(f"{key}: {error}") from None


def _right_ones(said: list[ToolCall], expected: list[ToolCall], *, ordered: bool) -> int:
    """How many calls are right; each expected one counts once."""
    if ordered:
        return sum(_same(one, other) for one, other in zip(said, expected, strict=False))
    left = list(expected)
    for call in said:
        match = next((other for other in left if _same(call, other)), None)
        if match is not None:
            left.remove(match)
    return len(expected) - len(left)


def _same(one: ToolCall, other: ToolCall) -> bool:
    return one.name == other.name and same_value(one.arguments, other.arguments)
