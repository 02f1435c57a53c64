"""Tool calls as models write them: <tool_call> tags with JSON, fenced or bare JSON, Llama's function tags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_launch.trainer.environments.answers import without_thoughts

_TAG = re.compile(r"<(tool_call|TOOLCALL|function_call)>")
_FUNCTION = re.compile(r"<function=([\w.\-]+)>")
_FENCED = re.compile(r"```(?:json|tool_call)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


class NoCall(Exception):
    """What was meant as a call is none."""


def calls_of(text: str) -> list[ToolCall]:
    """The calls in an answer, in their order; empty if there are none. Raises NoCall for ones that cannot be read."""
    text = without_thoughts(text)
    tagged = _enclosed(text, _TAG)
    if tagged:
        return [call for one in tagged for call in _read(one.content)]
    functions = _enclosed(text, _FUNCTION)
    if functions:
        return [ToolCall(one.name, _arguments(_json(one.content))) for one in functions]
    bare = text.strip().removeprefix("<|python_tag|>").strip()
    fenced = [found[1] for found in _FENCED.finditer(text)]
    for content in (bare, *fenced[-1:]):
        if content.strip()[:1] in ("{", "["):
            try:
                return _read(content)
            except NoCall:
                if content is not bare:
                    raise
    return []


def words_beside(text: str) -> str:
    """What an answer says beside its calls."""
    text = without_thoughts(text)
    for pattern in (_TAG, _FUNCTION):
        for one in reversed(_enclosed(text, pattern)):
            text = text[: one.begin] + text[one.end :]
    return text.strip()


def calls_in(value: Any) -> list[ToolCall]:
    """The calls of parsed JSON: one, or a list. Raises NoCall."""
    return list(_calls(value))


@dataclass(frozen=True)
class _Enclosed:
    """What is between a tag and its end; begin, end: of both together."""

    name: str
    content: str
    begin: int
    end: int


def _enclosed(text: str, tag: re.Pattern[str]) -> list[_Enclosed]:
    """What tags enclose, in one pass; a tag that is never closed encloses nothing."""
    found: list[_Enclosed] = []
    for opening in tag.finditer(text):
        closing = "</function>" if tag is _FUNCTION else f"</{opening[1]}>"
        if found and opening.start() < found[-1].end:
            continue
        end = text.find(closing, opening.end())
        if end < 0:
            break
        content = text[opening.end() : end]
        found.append(_Enclosed(opening[1], content.strip(), opening.start(), end + len(closing)))
    return found


def _read(content: str) -> list[ToolCall]:
    return calls_in(_json(content))


def _calls(value: Any) -> Iterator[ToolCall]:
    if isinstance(value, list):
        for one in value:
            yield from _calls(one)
        return
    if not isinstance(value, dict):
        raise NoCall("a call is no object")
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name") if isinstance(value.get("name"), str) else inner
    if not isinstance(name, str) or not name:
        raise NoCall("a call has no name")
    given: Any = next((value[key] for key in ("arguments", "parameters", "args", "input") if key in value), {})
    yield ToolCall(name, _arguments(given))


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json(value) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise NoCall("arguments are no object")
    return value


def _json(content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise NoCall("not valid JSON") from None
