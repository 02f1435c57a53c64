"""Verifies that a pattern is found in an answer. In a worker: some patterns take for ever on some texts.

Row: `regex` (or `pattern`; a text or a list, all of which must be found), `regex_flags` (letters of `ims`),
`regex_match`: `search` (default) or `fullmatch`. With a right answer in the row, the pattern's group `answer`, or its
first, must be that answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import right_answers, without_thoughts

_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    patterns = _patterns(row)
    if not patterns:
        return "missing key regex or pattern"
    if any(not isinstance(pattern, str) for pattern in patterns):
        return "regex is neither text nor a list of texts"
    flags = row.get("regex_flags") or ""
    if not isinstance(flags, str) or set(flags) - set(_FLAGS):
        return f"regex_flags is {flags!r}, not letters of {''.join(_FLAGS)}"
    if (row.get("regex_match") or "search") not in ("search", "fullmatch"):
        return f"regex_match is {row['regex_match']!r}, not search or fullmatch"
    for pattern in patterns:
        try:
            re.compile(pattern, _flags(row))
        except re.error as error:
            return f"regex is no regular expression ({error})"
    return ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 if all patterns are found, and the groups are the right answer where the row has one; else 0."""
    said, rights = without_thoughts(text).strip(), [right.strip() for right in right_answers(row)]
    for pattern in _patterns(row):
        compiled = re.compile(pattern, _flags(row))
        if (row.get("regex_match") or "search") == "fullmatch":
            found = [match] if (match := compiled.fullmatch(said)) else []
        else:
            found = list(compiled.finditer(said))
        if not found:
            return Score(0.0)
        if rights and compiled.groups:
            group = "answer" if "answer" in compiled.groupindex else 1
            if (found[-1][group] or "").strip() not in rights:  # the last one is what is meant
                return Score(0.0)
    return Score(1.0)


def _patterns(row: Mapping[str, Any]) -> list[Any]:
    value = row.get("regex") if row.get("regex") is not None else row.get("pattern")
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _flags(row: Mapping[str, Any]) -> re.RegexFlag:
    flags = re.RegexFlag(0)
    for letter in row.get("regex_flags") or "":
        flags |= _FLAGS[letter]
    return flags
