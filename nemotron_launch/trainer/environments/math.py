r"""Verifies a final answer as mathematics: plain numbers are compared here, the rest in a worker (math_expressions.py).

The answer is what follows the last `####`, `A:` or `answer is`, or is in the last `\boxed{}`; else the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import takewhile
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import ANSWER_KEYS, final_answer, right_answers, without_thoughts

RIGHT, WRONG = Score(1.0), Score(0.0)

#: Characters of the longest answer that is looked at; sympy would work on longer ones for long.
LONGEST_ANSWER = 1000

_PLAIN = re.compile(
    r"(?P<sign>[-+])? ?(?P<currency>[$€£¥])? ?(?P<inner>-)?"
    r"(?:(?:(?P<whole>\d+) )?(?P<over>\d+) ?/ ?(?P<under>0*[1-9]\d*)"
    r"|(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+))"
    r"(?: ?(?P<after>[%$€£¥]))?(?P<words>[A-Za-z]+)?(?P<unit>(?:[ -][A-Za-z][A-Za-z./']*){0,8})"
)
_WRAPPINGS = re.compile(r"(\*\*|__|[*_`]|\$\$)(.+)\1|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_SUBSTITUTIONS = (
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[,;:! ]|~|\s+"), " "),
    (re.compile("\u2212"), "-"),
)
# Words that make more of a number than a number with a unit.
_NO_UNITS = frozenset(
    ("or", "and", "to", "plus", "minus", "times", "over", "divided", "mod", "modulo")
    + ("pi", "than", "if", "is", "not", "but", "either", "point")
)
_MEASURES = {
    name: line.split()[0]
    for line in (
        "mm millimeter millimeters",
        "cm centimeter centimeters",
        "km kilometer kilometers",
        "m meter meters metre metres",
        "inch inches",
        "foot feet ft",
        "yard yards yd",
        "mile miles mi",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "ounce ounces oz",
        "pound pounds lb lbs",
        "ton tons",
        "second seconds sec s",
        "minute minutes min mins",
        "hour hours hr hrs h",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "ml milliliter milliliters",
        "liter liters l",
        "cup cups",
        "quart quarts",
        "gallon gallons",
        "cent cents",
        "$ dollar dollars usd",
        "€ euro euros",
        "% percent",
        "degree degrees",
    )
    for name in line.split()
}


@dataclass(frozen=True)
class Plain:
    """A number as it is written: its value, and the unit of measurement where one is named."""

    value: Fraction
    measure: str = ""


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    return "" if right_answers(row) else f"missing key {' or '.join(ANSWER_KEYS)}"


def quick(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score | None:
    """The score where answer and right answers are plain numbers, or there is no answer; None where it takes more."""
    answer, announced = said_answer(text)
    if not answer or (announced and len(answer) > LONGEST_ANSWER):
        return WRONG
    said = plain_number(answer)
    known = [(right, plain_number(right)) for right in map(right_answer, right_answers(row))]
    if any(answer == right or (said and plain and agree(said, plain)) for right, plain in known):
        return RIGHT
    return WRONG if said and all(plain for _, plain in known) else None


def said_answer(text: str) -> tuple[str, bool]:
    """The final answer of a text, and whether it was announced as one; all of the text where none was."""
    text = without_thoughts(text)
    found = final_answer(text)
    return (text.strip(), False) if found is None else (found, True)


@lru_cache(maxsize=4096)
def right_answer(text: str) -> str:
    """A right answer as a row has it: often the answer alone, often a worked solution."""
    found = final_answer(text)
    return (text if found is None else found).strip()


@lru_cache(maxsize=4096)
def plain_number(text: str) -> Plain | None:
    """The number that a text is, with currency, thousands separators, percent, a unit or emphasis; else None."""
    if len(text) > LONGEST_ANSWER or not any(character.isdigit() for character in text):
        return None
    for pattern, by in _SUBSTITUTIONS:
        text = pattern.sub(by, text)
    text = text.strip().rstrip(".!").strip()
    while (wrapped := _WRAPPINGS.fullmatch(text)) is not None:
        text = next(group for group in wrapped.groups()[1:] if group is not None).strip().rstrip(".")
    match = _PLAIN.fullmatch(text.strip())
    if match is None or (match["sign"] and match["inner"]):
        return None
    attached, words = match["words"], re.split(r"[ /-]+", match["unit"].strip().lower())
    if attached and (len(attached) < 2 or attached.lower() not in _MEASURES):
        return None
    words = [word.rstrip(".") for word in ([attached.lower()] if attached else []) + words if word]
    if any(word in _NO_UNITS or (len(word) == 1 and word not in ("a", *_MEASURES)) for word in words):
        return None
    counted = takewhile(lambda word: word not in ("per", "a", "an", "each", "every"), words)
    measures = [_MEASURES[name] for name in (match["currency"], match["after"], *counted) if name in _MEASURES]
    if match["number"]:
        value = Fraction(match["number"].replace(",", "").rstrip("."))
    else:
        value = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    return Plain(-value if "-" in (match["sign"], match["inner"]) else value, measures[0] if measures else "")


def agree(said: Plain, right: Plain) -> bool:
    """Whether two numbers are the same; a unit of measurement must be the same too where both name one.

    A percentage is also its share (50% is .5) where the other is not one.
    """
    if said.measure == right.measure or (said.value == right.value and not (said.measure and right.measure)):
        return said.value == right.value
    if said.measure == "%" and not right.measure:
        return said.value == right.value * 100
    if right.measure == "%" and not said.measure:
        return right.value == said.value * 100
    return False
