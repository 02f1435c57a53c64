"""Where the right answer is in a row, and the final answer in a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Columns of the right answer, the first that a row has. The trainer fills in the first of them.
ANSWER_KEYS = ("expected_answer", "answer", "ground_truth", "output")

_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>")
_THOUGHT_BEGINS = re.compile(r"<think(?:ing)?>")
# What an answer is announced by; emphasis around it is allowed for. `A:` counts at a line's beginning only.
_ANNOUNCED = re.compile(
    r"####[ \t]*"
    r"|^[ \t*_#>]*(?:(?-i:A)|(?:final )?answer)[*_]*[ \t]*:[*_]*[ \t]*"
    r"|\banswer(?: is[ \t]*:?|[*_]*:)[*_]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def right_answers(row: Mapping[str, Any]) -> list[str]:
    """The row's right answers as text, any of which will do; empty where it has none."""
    value = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), None)
    values = value if isinstance(value, list | tuple) else [value]
    return [as_text(item) for item in values if item is not None and as_text(item).strip()]


def as_text(value: Any) -> str:
    """A cell as text: numbers as they are written, 18.0 of a column of floats as 18."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def without_thoughts(text: str) -> str:
    """What is said after the reasoning (`</think>`); nothing where the reasoning does not end."""
    ends = list(_THOUGHT_ENDS.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    begins = _THOUGHT_BEGINS.search(rest)
    return rest[: begins.start()] if begins else rest


def final_answer(text: str) -> str | None:
    r"""What follows the last `####`, `A:`, `answer:` or `answer is`, or is in the last `\boxed{}`, the later one.

    None if there is none. An announced answer ends with its line; one that begins on the next line is taken from there.
    """
    boxed = _last_boxed(text)
    announced = next(reversed(list(_ANNOUNCED.finditer(text))), None)
    if boxed is not None and (announced is None or boxed[0] >= announced.start()):
        return boxed[1].strip()
    if announced is None:
        return None
    return next((line.strip() for line in text[announced.end() :].splitlines() if line.strip()), "")


def _last_boxed(text: str) -> tuple[int, str] | None:
    """Where the last complete box begins, and what is in it; one pass, whatever a policy repeats."""
    last: tuple[int, str] | None = None
    opened: list[tuple[int, int]] = []  # where each open brace begins, -1 for those of no box, and its content
    for found in _BRACES.finditer(text):
        if found[0] == "}":
            begin, content = opened.pop() if opened else (-1, 0)
            if begin >= 0 and (last is None or begin > last[0]):
                last = (begin, text[content : found.start()])
        elif found[1] or found[0] == "{":
            opened.append((found.start() if found[1] else -1, found.end()))
    return last
