"""Verifies constraints that a program can see: those of IFEval (Zhou et al. 2023, arXiv:2311.07911), by its names.

Row: `instruction_id_list`: names of constraints; `kwargs`: for each its parameters (an object, or null). The reward is
1 if all are kept; with `partial_reward`, the share that is.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import without_thoughts

Parameters = Mapping[str, Any]
Constraint = tuple[tuple[str, ...], Callable[[str, Parameters], bool]]

_RELATIONS = ("at least", "less than", "at most", "exactly")
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|Inc|Ltd|Jr|Sr|No)\.", re.IGNORECASE)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    try:
        constraints = _constraints(row)
    except ValueError as error:
        return str(error)
    for name, given in constraints:
        if name not in CONSTRAINTS:
            near = get_close_matches(name, CONSTRAINTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"instruction_id_list names {name}, which is not known{hint}"
        missing = [key for key in CONSTRAINTS[name][0] if given.get(key) is None]
        if missing:
            return f"kwargs of {name} lack {' and '.join(missing)}"
        relation = next((key for key in given if key.endswith("relation")), None)
        if relation and given[relation] not in (None, *_RELATIONS):
            return f"kwargs of {name}: {relation} is {given[relation]!r}, not one of {', '.join(_RELATIONS)}"
        if name == "language:response_language" and importlib.util.find_spec("langdetect") is None:
            return "language:response_language needs langdetect (pip install 'nemotron-launch[rewards]')"
    return ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 if all constraints are kept, or their share; components: each constraint, and the share."""
    said = without_thoughts(text).strip()
    kept = [(name, bool(said) and CONSTRAINTS[name][1](said, given)) for name, given in _constraints(row)]
    share = sum(ok for _, ok in kept) / len(kept)
    return Score(share if row.get("partial_reward") else float(share == 1.0), components={"kept": share})


def _constraints(row: Mapping[str, Any]) -> list[tuple[str, Parameters]]:
    """The row's constraints with their parameters. Raises ValueError, in words for the user."""
    names, kwargs = _read(row, "instruction_id_list"), _read(row, "kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("missing key instruction_id_list (a list of names)")
    kwargs = [{}] * len(names) if kwargs is None else kwargs
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise ValueError(f"kwargs is not a list of {len(names)} objects, one for each of instruction_id_list")
    if not all(given is None or isinstance(given, Mapping) for given in kwargs):
        raise ValueError("kwargs holds something else than objects")
    return [(name, given or {}) for name, given in zip(names, kwargs, strict=True)]


def _read(row: Mapping[str, Any], key: str) -> Any:
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(f"{key} is not valid JSON") from None


def _compare(count: int, relation: Any, wanted: Any) -> bool:
    wanted = int(wanted)
    relation = relation or "at least"
    if relation == "exactly":
        return count == wanted
    if relation == "at most":
        return count <= wanted
    return count < wanted if relation == "less than" else count >= wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _times(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _listed(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _sentences(text: str) -> int:
    plain = _ABBREVIATED.sub(lambda found: found[0].replace(".", ""), text)
    plain = re.sub(r"(?<=\d)\.(?=\d)", "", plain)
    return len([part for part in re.split(r"[.!?…]+(?=[\s\"'”’)\]]|$)|\n{2,}", plain) if re.search(r"\w", part)])


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _nth_paragraph(text: str, given: Parameters) -> bool:
    paragraphs = _paragraphs(text, r"\n\s*\n")
    nth = int(given["nth_paragraph"])
    if len(paragraphs) != int(given["num_paragraphs"]) or not 0 < nth <= len(paragraphs):
        return False
    words = _words(paragraphs[nth - 1])
    return bool(words) and words[0].casefold() == str(given["first_word"]).casefold()


def _number_of_paragraphs(text: str, given: Parameters) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1] if len(parts) > 2 else []
    return all(part.strip() for part in inner) and len(_paragraphs(text, r"\*\*\*")) == int(given["num_paragraphs"])


def _is_json(text: str) -> bool:
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.strip().removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _highlights(text: str) -> int:
    once = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    twice = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found.strip("*").strip()]
    return len(once) + len(twice)


def _sections(text: str, given: Parameters) -> bool:
    splitter = re.escape(str(given["section_spliter"]))
    return len(re.findall(rf"\s?{splitter}\s?\d+\s?", text)) >= int(given["num_sections"])


def _two_responses(text: str, given: Parameters) -> bool:
    parts = text.split("******")
    inner = [part.strip() for part in parts if part.strip()]
    empty_inside = any(not part.strip() for part in parts[1:-1])
    return not empty_inside and len(inner) == 2 and inner[0] != inner[1]


def _postscript(text: str, given: Parameters) -> bool:
    marker = str(given["postscript_marker"])
    spaced = r"\s*".join(re.escape(letter) for letter in marker if not letter.isspace())
    return re.search(rf"^\s*{spaced}.*$", text, re.IGNORECASE | re.MULTILINE) is not None


def _in_language(text: str, given: Parameters) -> bool:
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return bool(langdetect.detect(text) == given["language"])
    except langdetect.LangDetectException:
        return False


def _is_english(text: str) -> bool:
    """Whether the letters are those that English is written in; which language they make is not looked at."""
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and sum(letter.isascii() for letter in letters) >= 0.9 * len(letters)


def _letter_frequency(text: str, given: Parameters) -> bool:
    count = text.casefold().count(str(given["letter"]).casefold())
    return _compare(count, given.get("let_relation"), given["let_frequency"])


CONSTRAINTS: Mapping[str, Constraint] = {
    "keywords:existence": (("keywords",), lambda t, g: all(_times(word, t) for word in _listed(g["keywords"]))),
    "keywords:frequency": (
        ("keyword", "frequency"),
        lambda t, g: _compare(_times(str(g["keyword"]), t), g.get("relation"), g["frequency"]),
    ),
    "keywords:forbidden_words": (
        ("forbidden_words",),
        lambda t, g: not any(_times(word, t) for word in _listed(g["forbidden_words"])),
    ),
    "keywords:letter_frequency": (("letter", "let_frequency"), _letter_frequency),
    "language:response_language": (("language",), _in_language),
    "length_constraints:number_sentences": (
        ("num_sentences",),
        lambda t, g: _compare(_sentences(t), g.get("relation"), g["num_sentences"]),
    ),
    "length_constraints:number_paragraphs": (("num_paragraphs",), _number_of_paragraphs),
    "length_constraints:number_words": (
        ("num_words",),
        lambda t, g: _compare(len(_words(t)), g.get("relation"), g["num_words"]),
    ),
    "length_constraints:nth_paragraph_first_word": (("num_paragraphs", "nth_paragraph", "first_word"), _nth_paragraph),
    "detectable_content:number_placeholders": (
        ("num_placeholders",),
        lambda t, g: len(re.findall(r"\[[^\[\]]*\]", t)) >= int(g["num_placeholders"]),
    ),
    "detectable_content:postscript": (("postscript_marker",), _postscript),
    "detectable_format:number_bullet_lists": (
        ("num_bullets",),
        lambda t, g: len(re.findall(r"^\s*(?:\*[^*\n]|-\s?\S)", t, re.MULTILINE)) == int(g["num_bullets"]),
    ),
    "detectable_format:constrained_response": ((), lambda t, g: any(option in t for option in _OPTIONS)),
    "detectable_format:number_highlighted_sections": (
        ("num_highlights",),
        lambda t, g: _highlights(t) >= int(g["num_highlights"]),
    ),
    "detectable_format:multiple_sections": (("section_spliter", "num_sections"), _sections),
    "detectable_format:json_format": ((), lambda t, g: _is_json(t)),
    "detectable_format:title": ((), lambda t, g: re.search(r"<<\s*[^\s<>][^<>\n]*>>", t) is not None),
    "combination:two_responses": ((), _two_responses),
    "combination:repeat_prompt": (
        ("prompt_to_repeat",),
        lambda t, g: t.casefold().startswith(str(g["prompt_to_repeat"]).strip().casefold()),
    ),
    "startend:end_checker": (
        ("end_phrase",),
        lambda t, g: t.strip('"').casefold().rstrip().endswith(str(g["end_phrase"]).strip().casefold()),
    ),
    "startend:quotation": ((), lambda t, g: len(t) > 1 and t.startswith('"') and t.endswith('"')),
    "change_case:capital_word_frequency": (
        ("capital_frequency",),
        lambda t, g: _compare(
            sum(word.isupper() for word in _words(t)), g.get("capital_relation"), g["capital_frequency"]
        ),
    ),
    "change_case:english_capital": ((), lambda t, g: t.isupper() and _is_english(t)),
    "change_case:english_lowercase": ((), lambda t, g: t.islower() and _is_english(t)),
    "punctuation:no_comma": ((), lambda t, g: "," not in t),
}
