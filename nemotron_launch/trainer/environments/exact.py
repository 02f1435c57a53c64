"""Verifies that an answer is the right one, letter by letter; spaces around it do not count.

Row: a right answer (text, or a list of which any will do); `ignore_case`, `ignore_whitespace` (all of it),
`ignore_punctuation`; `match`: `whole` (default), `final` (what is announced as the answer), `contains`, `last_line`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import ANSWER_KEYS, final_answer, right_answers, without_thoughts

MATCHES = ("whole", "final", "contains", "last_line")
_FLAGS = ("ignore_case", "ignore_whitespace", "ignore_punctuation")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    if not right_answers(row):
        return f"missing key {' or '.join(ANSWER_KEYS)}"
    if (row.get("match") or "whole") not in MATCHES:
        return f"match is {row['match']!r}, not one of {', '.join(MATCHES)}"
    return next((f"{flag} is not true or false" for flag in _FLAGS if row.get(flag) not in (None, True, False)), "")


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 for a right answer, else 0."""
    said, match = without_thoughts(text), row.get("match") or "whole"
    if match == "final":
        said = final_answer(said) or ""
    elif match == "last_line":
        said = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    said = _plain(said, row)
    rights = [_plain(right, row) for right in right_answers(row)]
    if match == "contains":
        return Score(float(any(right in said for right in rights)))
    return Score(float(said in rights))


def _plain(text: str, row: Mapping[str, Any]) -> str:
    text = text.casefold() if row.get("ignore_case") else text
    text = text.translate(_NO_PUNCTUATION) if row.get("ignore_punctuation") else text
    return re.sub(r"\s+", "", text) if row.get("ignore_whitespace") else text.strip()
