"""Verifies the letter of a choice.

Row: the right answer (a letter, or an option's text); `options` (or `choices`): texts, or texts by letter, so that an
answer that repeats an option's text counts too. The letter is taken from the last box, or from what is announced as the
answer; with `multilingual`, in other languages too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import (
    ANSWER_KEYS,
    as_text,
    final_answer,
    right_answers,
    without_thoughts,
)

# Characters of an answer within which its letter must come.
_HEAD = 100
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Letters that stand for A, B, C, D in other scripts: Arabic, Bengali, Hindi, Japanese, Korean.
_OTHER_LETTERS = {
    other: LETTERS[i]
    for alphabet in ("أبجد", "অবডঢ", "অআইঈ", "अबसड", "アイウエ", "가나다라")
    for i, other in enumerate(alphabet)
}
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(
    r"^[\s(\[{*_$\"'`]*(?:(?:option|choice|answer)\s*)?[\s(\[{*_$\"'`]*([A-Z])(?![A-Za-z])", re.IGNORECASE
)
_SAID = re.compile(r"\b(?:option|choice|answer)\b(?:\s+(?:is|would be|must be))?[\s:(*_]*([A-Z])\b(?![’'])")
_ELSEWHERE = re.compile(
    r"(?:answer|antwort|respuesta|réponse|reponse|resposta|risposta|odpowiedź|ответ|відповідь|cevap|jawaban|jibu|"
    r"đáp án|trả lời|答案|回答|答え|解答|정답|답변|답|उत्तर|উত্তর|الإجابة|الجواب|คำตอบ)"
    r"[^\S\n]*(?:is|ist|es|est|é|è|는|은|は)?[^\S\n]*[:：\-]?[\s(（*_]*(\S)",
    re.IGNORECASE,
)


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    rights = right_answers(row)
    if not rights:
        return f"missing key {' or '.join(ANSWER_KEYS)}"
    options = options_of(row)
    if isinstance(options, str):
        return options
    if not any(_right_letter(right, options) for right in rights):
        named = f"none of the options {', '.join(options)}" if options else "no letter"
        return f"the right answer {rights[0][:40]!r} is {named}"
    return ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 for the right letter, else 0."""
    known = options_of(row)
    known = {} if isinstance(known, str) else known
    said = letter_of(without_thoughts(text), known, multilingual=bool(options.get("multilingual")))
    return Score(float(bool(said) and said in [_right_letter(right, known) for right in right_answers(row)]))


def letter_of(text: str, options: Mapping[str, str], *, multilingual: bool = False) -> str:
    """The letter that a text chooses; empty if it chooses none of the options."""
    answer = final_answer(text)
    if answer is None and len(text.split()) <= 3:
        answer = text
    if answer is not None:
        answer = _WRAPPED.sub(r"\1", answer)
        found = _LETTER.match(unicodedata.normalize("NFKC", answer[:_HEAD]))
        if found and _allowed(found[1].upper(), options):
            return found[1].upper()
        letter = _of_text(answer, options)
        if letter:
            return letter
    if multilingual and (others := _ELSEWHERE.findall(text)):
        letter = unicodedata.normalize("NFKC", others[-1]).upper()
        letter = _OTHER_LETTERS.get(letter, letter)
        if _allowed(letter, options):
            return letter
    told = [letter for letter in _SAID.findall(text) if _allowed(letter, options)]
    return told[-1] if told and answer is None else ""


def options_of(row: Mapping[str, Any]) -> dict[str, str] | str:
    """A row's options by letter; empty where it names none, a text that says what is wrong with them."""
    given = row.get("options") if row.get("options") is not None else row.get("choices")
    if given is None:
        return {}
    if isinstance(given, Mapping) and isinstance(given.get("text"), list):  # as in ARC: {text: […], label: […]}
        labels = given.get("label") or list(LETTERS)
        return {as_text(label): as_text(text) for label, text in zip(labels, given["text"], strict=False)}
    if isinstance(given, Mapping):
        return {str(letter): as_text(text) for letter, text in given.items() if text is not None}
    if not isinstance(given, list) or not given or len(given) > len(LETTERS):
        return f"options is no list of 1 to {len(LETTERS)} options"
    if all(isinstance(one, Mapping) for one in given):
        return {str(letter): as_text(text) for one in given for letter, text in one.items() if text is not None}
    return dict(zip(LETTERS, map(as_text, given), strict=False))


def _allowed(letter: str, options: Mapping[str, str]) -> bool:
    return letter in (options or LETTERS)


def _right_letter(right: str, options: Mapping[str, str]) -> str:
    right = right.strip()
    found = final_answer(right) or right
    bare = found.strip("()[]. ")
    if len(bare) == 1 and _allowed(bare.upper(), options):
        return bare.upper()
    return _of_text(right, options)


def _of_text(text: str, options: Mapping[str, str]) -> str:
    """The letter of the one option with this text."""
    plain = " ".join(text.casefold().split()).strip(" .*")
    same = [letter for letter, option in options.items() if " ".join(option.casefold().split()).strip(" .*") == plain]
    return same[0] if len(same) == 1 else ""
