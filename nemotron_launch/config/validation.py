"""Checking a resolved config against its schema: everything that is wrong, in our words, each with its key."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from nemotron_launch.config import tree
from nemotron_launch.config.overrides import parse_value
from nemotron_launch.config.schema import Schema, known_paths, suggest
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen

_KIND = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


@frozen
class Problem:
    """One thing that is wrong with a config. `path` is the key; for a missing key, the mapping that lacks it."""

    path: tree.Path
    message: str
    hint: str | None = None


def check(schema: Schema, data: Any) -> list[Problem]:
    """Everything that is wrong with resolved plain data, in the order of the data."""
    problems: list[Problem] = []
    _check(schema, schema.tree, data, (), problems)
    return problems


def _check(schema: Schema, part: Any, value: Any, path: tree.Path, out: list[Problem]) -> None:
    if part is True:
        return
    if part is False:
        out.append(Problem(path, f"{_dotted(path)} may not be set"))
        return
    name = _dotted(path)
    if "const" in part and not _same(value, part["const"]):
        out.append(_not_the_constant(part, value, path))
        return
    if "type" in part:
        wanted = part["type"] if isinstance(part["type"], list) else [part["type"]]
        if not any(_is(kind, value) for kind in wanted):
            text = f"{name} must be {_either([_KIND[kind] for kind in wanted])}, got {_got(value)}"
            out.append(Problem(path, text, _type_hint(wanted, value, name)))
            return
    if "enum" in part and not any(_same(value, choice) for choice in part["enum"]):
        out.append(_not_a_choice(part["enum"], value, path))
        return
    for keyword in ("anyOf", "oneOf"):
        if keyword in part:
            _check_branches(schema, part[keyword], keyword == "oneOf", value, path, out)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        _check_number(part, value, path, out)
    elif isinstance(value, str):
        _check_text(part, value, path, out)
    elif isinstance(value, list):
        if len(value) < part.get("minItems", 0):
            out.append(Problem(path, f"{name} needs at least {part['minItems']} entries, got {len(value)}"))
        if len(value) > part.get("maxItems", math.inf):
            out.append(Problem(path, f"{name} takes at most {part['maxItems']} entries, got {len(value)}"))
        if part.get("uniqueItems") and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
            out.append(Problem(path, f"{name} has the same entry twice"))
        if "items" in part:
            for index, item in enumerate(value):
                _check(schema, part["items"], item, (*path, str(index)), out)
    elif isinstance(value, dict):
        _check_mapping(schema, part, value, path, out)


def _check_mapping(
    schema: Schema, part: dict[str, Any], value: dict[str, Any], path: tree.Path, out: list[Problem]
) -> None:
    name = _dotted(path)
    properties = part.get("properties", {})
    extra = part.get("additionalProperties", True)
    for key in part.get("required", ()):
        if key not in value:
            out.append(Problem(path, f"{_dotted((*path, key))} is missing"))
    if len(value) < part.get("minProperties", 0):
        out.append(Problem(path, f"{name} needs at least {part['minProperties']} keys, got {len(value)}"))
    if len(value) > part.get("maxProperties", math.inf):
        out.append(Problem(path, f"{name} takes at most {part['maxProperties']} keys, got {len(value)}"))
    for key, item in value.items():
        below = (*path, key)
        if "propertyNames" in part:
            named: list[Problem] = []
            _check(schema, part["propertyNames"], key, below, named)
            out.extend(Problem(below, f"the key {_dotted(below)} is not allowed: {p.message}") for p in named[:1])
        if key in properties:
            _check(schema, properties[key], item, below, out)
        elif extra is False:
            known = [_dotted(path) for path, _ in known_paths(schema)]
            out.append(Problem(below, f"unknown key {_dotted(below)}", suggest(known, _dotted(below))))
        else:
            _check(schema, extra, item, below, out)


def _check_branches(
    schema: Schema, branches: list[Any], only_one: bool, value: Any, path: tree.Path, out: list[Problem]
) -> None:
    tried: list[tuple[Any, list[Problem]]] = []
    for branch in branches:
        found: list[Problem] = []
        _check(schema, branch, value, path, found)
        tried.append((branch, found))
    fitting = sum(not found for _, found in tried)
    if fitting > 1 and only_one:
        out.append(Problem(path, f"{_dotted(path)} fits several of the forms that exclude each other"))
    if fitting:
        return
    # The branch that the value was meant for is the one whose complaint is not about the value's own type.
    meant = [found for branch, found in tried if _fits_type(branch, value)]
    if len(meant) == 1:
        out.extend(meant[0])
        return
    if all(isinstance(branch, dict) and "type" in branch for branch in branches) and not meant:
        kinds = [kind for b in branches for kind in (b["type"] if isinstance(b["type"], list) else [b["type"]])]
        words = _either([_KIND[kind] for kind in dict.fromkeys(kinds)])
        out.append(Problem(path, f"{_dotted(path)} must be {words}, got {_got(value)}"))
        return
    out.extend(min(tried, key=lambda pair: len(pair[1]))[1])


def _fits_type(branch: Any, value: Any) -> bool:
    if not isinstance(branch, dict) or "type" not in branch:
        return not (isinstance(branch, dict) and ("const" in branch or "enum" in branch))
    kinds = branch["type"] if isinstance(branch["type"], list) else [branch["type"]]
    return any(_is(kind, value) for kind in kinds)


def _check_number(part: dict[str, Any], value: int | float, path: tree.Path, out: list[Problem]) -> None:
    name = _dotted(path)
    limits = (
        ("minimum", "at least", lambda limit: value >= limit),
        ("exclusiveMinimum", "greater than", lambda limit: value > limit),
        ("maximum", "at most", lambda limit: value <= limit),
        ("exclusiveMaximum", "less than", lambda limit: value < limit),
    )
    for keyword, words, holds in limits:
        if keyword in part and not holds(part[keyword]):
            out.append(Problem(path, f"{name} must be {words} {part[keyword]}, got {value}"))
    if "multipleOf" in part and (not math.isfinite(value) or value % part["multipleOf"]):
        out.append(Problem(path, f"{name} must be a multiple of {part['multipleOf']}, got {value}"))


def _check_text(part: dict[str, Any], value: str, path: tree.Path, out: list[Problem]) -> None:
    name = _dotted(path)
    if len(value) < part.get("minLength", 0):
        least = part["minLength"]
        short = "may not be empty" if least == 1 else f"needs at least {least} characters, got {value!r}"
        out.append(Problem(path, f"{name} {short}"))
        return
    if len(value) > part.get("maxLength", math.inf):
        out.append(Problem(path, f"{name} takes at most {part['maxLength']} characters, got {len(value)}"))
    if "pattern" in part and not re.search(part["pattern"], value):
        out.append(Problem(path, f"{name} must match {part['pattern']}, got {value!r}"))


def _not_the_constant(part: dict[str, Any], value: Any, path: tree.Path) -> Problem:
    name, shown, constant = _dotted(path), _show(value), _show(part["const"])
    if "x-unsupported" in part:
        return Problem(path, f"{name}={shown} is not implemented: {part['x-unsupported']}", f"leave it {constant}")
    return Problem(path, f"{name} must be {constant}, got {_got(value)}")


def _not_a_choice(choices: list[Any], value: Any, path: tree.Path) -> Problem:
    from difflib import get_close_matches

    shown = ", ".join(_show(choice) for choice in choices)
    near = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else None
    return Problem(path, f"{_dotted(path)} must be one of {shown}; got {_show(value)}", hint)


def _is(kind: str, value: Any) -> bool:
    if kind == "integer":
        # 3.0 is not taken for 3: it would reach the trainer as a float.
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "null":
        return value is None
    return isinstance(value, {"string": str, "boolean": bool, "array": list, "object": dict}[kind])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _dotted(path: tree.Path) -> str:
    return ".".join(path) or "the config"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str) and (not value or value != value.strip()):
        text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _got(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return _show(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_show(value)!r}" if value.strip() == value and value else f"the text {_show(value)}"
    return f"{_KIND['array' if isinstance(value, list) else 'object']} {_show(value)}"


def _type_hint(wanted: list[str], value: Any, name: str) -> str | None:
    if "integer" in wanted and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if "string" in wanted and isinstance(value, int | float | bool):
        return "quotes make it text: " + f"'{_show(value)}'"
    if isinstance(value, str) and wanted[0] in ("integer", "number", "boolean") and _reads_as(wanted[0], value):
        return "it is text; leave out the quotes (of an environment variable: ${oc.decode:${oc.env:NAME}})"
    return None


def _reads_as(kind: str, text: str) -> bool:
    try:
        return _is(kind, parse_value(text))
    except UserError:
        return False
