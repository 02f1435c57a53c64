"""Tool calls as models write them: <tool_call> tags with JSON, fenced or bare JSON, Llama's function tags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_launch.trainer.environments.answers import without_thoughts

_TAGGED = re.compile(r"<(tool_call|TOOLCALL|function_call)>\s*(.*?)\s*</\1>", re.DOTALL)
_FUNCTION = re.compile(r"<function=([\w.\-]+)>\s*(.*?)\s*</function>", re.DOTALL)
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
    tagged = [found[2] for found in _TAGGED.finditer(text)]
    if tagged:
        return [call for content in tagged for call in _read(content)]
    functions = [(found[1], found[2]) for found in _FUNCTION.finditer(text)]
    if functions:
        return [ToolCall(name, _arguments(_json(content))) for name, content in functions]
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
    return _FUNCTION.sub("", _TAGGED.sub("", without_thoughts(text))).strip()


def calls_in(value: Any) -> list[ToolCall]:
    """The calls of parsed JSON: one, or a list. Raises NoCall."""
    return list(_calls(value))


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
