"""OmegaConf's interpolations: `${a.b}`, `${.x}`, `${oc.env:VAR,default}`, `${mul:2,${a}}`, resolved over a config tree.

The grammar and the results are OmegaConf's (a test compares them); it is read here because importing OmegaConf costs
more than a whole dry run, and because a message can then name the line that holds the interpolation.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from nemotron_launch.config.overrides import interpolation_end, parse_arguments, parse_value
from nemotron_launch.config.schema import suggest
from nemotron_launch.config.tree import Node, Path, child
from nemotron_launch.config.validation import Problem
from nemotron_launch.errors import UserError

_CALL = re.compile(r"\s*([A-Za-z_][\w.]*)\s*:(.*)\Z", re.DOTALL)
_REFERENCE = re.compile(r"(\.*)((?:[^.\[\]{}:]+|\[[^\[\]]+\])(?:\.[^.\[\]{}:]+|\[[^\[\]]+\])*)?\Z")
_KEY = re.compile(r"[^.\[\]]+")
UNRESOLVED: Any = type("Unresolved", (), {"__repr__": lambda self: "<unresolved>"})()


class _Unresolvable(Exception):
    """Why an interpolation has no value; `message` is empty when the cause has been reported elsewhere."""

    def __init__(self, message: str = "", hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def resolve(root: Node, env: Mapping[str, str]) -> tuple[Any, list[Problem]]:
    """The whole tree as plain data, every interpolation resolved, and what could not be.

    A key with a problem has the value UNRESOLVED.
    """
    resolver = _Resolver(root, env)
    return resolver.value(root, ()), resolver.problems


def resolve_at(root: Node, path: Path, env: Mapping[str, str]) -> Any:
    """The resolved value of one key, UNRESOLVED if it has none."""
    resolver = _Resolver(root, env)
    try:
        return resolver.lookup(path)
    except _Unresolvable:
        return UNRESOLVED


@functools.lru_cache(maxsize=4096)
def _pieces(text: str) -> tuple[tuple[bool, str], ...]:
    """Cut text into (is an interpolation, what is between its braces or the literal text). `\\${` is a literal `${`."""
    pieces: list[tuple[bool, str]] = []
    literal: list[str] = []
    at = 0
    while True:
        start = text.find("${", at)
        if start < 0:
            literal.append(text[at:])
            break
        slashes = len(text[at:start]) - len(text[at:start].rstrip("\\"))
        literal.append(text[at : start - slashes] + "\\" * (slashes // 2))
        if slashes % 2:
            literal.append("${")
            at = start + 2
            continue
        end = interpolation_end(text, start)
        if end < 0:
            raise _Unresolvable("a '}' is missing after ${")
        if any(literal):
            pieces.append((False, "".join(literal)))
        literal = []
        pieces.append((True, text[start + 2 : end - 1]))
        at = end
    if any(literal):
        pieces.append((False, "".join(literal)))
    return tuple(pieces)


class _Resolver:
    def __init__(self, root: Node, env: Mapping[str, str]) -> None:
        self.root = root
        self.env = env
        self.known: dict[Path, Any] = {}
        self.open: dict[Path, None] = {}
        self.problems: list[Problem] = []

    def value(self, node: Node, path: Path) -> Any:
        """The plain value of a node, problems noted."""
        value = node.value
        if isinstance(value, dict):
            return {key: self.value(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, (*path, str(index))) for index, item in enumerate(value)]
        if not isinstance(value, str) or ("${" not in value and value != "???"):
            return value
        if path not in self.known:
            try:
                self.known[path] = self._scalar(value, path)
            except _Unresolvable as error:
                self.known[path] = UNRESOLVED
                if error.message:
                    self.problems.append(Problem(path, f"{'.'.join(path)}: {error.message}", error.hint))
        return self.known[path]

    def _scalar(self, text: str, path: Path) -> Any:
        if text == "???":
            name = ".".join(path)
            self.problems.append(Problem(path, f"{name} has no value yet", f"give it: {name}=…"))
            raise _Unresolvable
        if path in self.open:
            chain = [".".join(p) for p in self.open]
            circle = " → ".join([*chain[chain.index(".".join(path)) :], ".".join(path)])
            raise _Unresolvable(f"interpolations in a circle: {circle}")
        self.open[path] = None
        try:
            return self.text(text, path)
        except RecursionError:
            raise _Unresolvable("interpolations nested too deeply") from None
        finally:
            del self.open[path]

    def text(self, text: str, path: Path) -> Any:
        """Resolve the interpolations in a text at `path`. A text that is one interpolation keeps its value's type."""
        pieces = _pieces(text)
        if len(pieces) == 1 and pieces[0][0]:
            return self.inner(pieces[0][1], path)
        return "".join(str(self.inner(piece, path)) if is_one else piece for is_one, piece in pieces)

    def inner(self, inside: str, path: Path) -> Any:
        call = _CALL.match(inside)
        if call:
            return self._call(call[1], call[2], path)
        flat = str(self.text(inside, path)) if "${" in inside else inside
        match = _REFERENCE.match(flat.strip())
        if not match or not flat.strip():
            raise _Unresolvable(f"${{{inside}}} is not an interpolation", "write ${key.name} or ${resolver:arguments}")
        dots, keys = len(match[1]), tuple(_KEY.findall(match[2] or ""))
        if dots > len(path):
            raise _Unresolvable(f"${{{inside}}} leads above the top of the config")
        target = (path[: len(path) - dots] if dots else ()) + keys
        try:
            return self.lookup(target)
        except KeyError:
            hint = suggest([".".join(p) for p in _paths(self.root)], ".".join(target))
            raise _Unresolvable(f"${{{inside}}} names no key", hint) from None

    def lookup(self, target: Path) -> Any:
        """The resolved value at an absolute path. KeyError: there is none."""
        node = self.root
        for depth, segment in enumerate(target):
            if isinstance(node.value, str) and "${" in node.value:
                reached = self._good(self.value_in_use(node, target[:depth]))
                for rest in target[depth:]:
                    reached = reached[int(rest)] if isinstance(reached, list) and rest.isdigit() else reached[rest]
                return reached
            below = child(node, segment)
            if below is None:
                raise KeyError(segment)
            node = below
        return self._good(self.value_in_use(node, target))

    def value_in_use(self, node: Node, path: Path) -> Any:
        if path in self.open:  # a circle: let the one who closes it say so
            return self._scalar(node.value, path)
        inside = [p for p in self.open if p[: len(path)] == path and len(path) < len(p)]
        if inside and isinstance(node.value, dict | list):
            circle = f"{'.'.join(inside[0])} → {'.'.join(path) or 'the config'}"
            raise _Unresolvable(f"interpolations in a circle: {circle}")
        return self.value(node, path)

    def _good(self, value: Any) -> Any:
        if value is UNRESOLVED or (isinstance(value, dict | list) and _has_unresolved(value)):
            raise _Unresolvable
        return value

    def _call(self, name: str, text: str, path: Path) -> Any:
        try:
            arguments = [self._argument(value, path) for value in parse_arguments(text)]
        except UserError as error:
            raise _Unresolvable(f"${{{name}:…}}: {error.message}", error.hint) from None
        if name == "oc.env":
            return self._env(arguments)
        if name == "oc.select":
            return self._select(arguments, path)
        function = RESOLVERS.get(name)
        if function is None:
            known = ", ".join(sorted([*RESOLVERS, "oc.env", "oc.select"]))
            raise _Unresolvable(f"there is no resolver {name}", f"there are: {known}")
        try:
            return function(*arguments)
        except (TypeError, ValueError, ArithmeticError, UserError) as error:
            reason = error.message if isinstance(error, UserError) else str(error)
            reason = reason.replace("<lambda>()", name)
            shown = ", ".join(repr(argument) for argument in arguments)
            raise _Unresolvable(f"{name}({shown}) has no value: {reason}") from None

    def _argument(self, value: Any, path: Path) -> Any:
        if isinstance(value, str) and "${" in value:
            return self.text(value, path)
        if isinstance(value, list):
            return [self._argument(item, path) for item in value]
        if isinstance(value, dict):
            return {key: self._argument(item, path) for key, item in value.items()}
        return value

    def _env(self, arguments: list[Any]) -> str | None:
        if not 1 <= len(arguments) <= 2:
            raise _Unresolvable("oc.env takes a name and perhaps a default: ${oc.env:NAME,default}")
        name = str(arguments[0])
        if name in self.env:
            return self.env[name]
        if len(arguments) == 1:
            raise _Unresolvable(
                f"the environment variable {name} is not set", f"export {name}=…, or write ${{oc.env:{name},a default}}"
            )
        return None if arguments[1] is None else str(arguments[1])

    def _select(self, arguments: list[Any], path: Path) -> Any:
        if not 1 <= len(arguments) <= 2:
            raise _Unresolvable("oc.select takes a key and perhaps a default: ${oc.select:a.b,default}")
        key = str(arguments[0])
        dots = len(key) - len(key.lstrip("."))
        target = (path[: len(path) - dots] if dots else ()) + tuple(_KEY.findall(key))
        try:
            return self.lookup(target)
        except (KeyError, IndexError, TypeError):
            return arguments[1] if len(arguments) == 2 else None


def _paths(node: Node, path: Path = ()) -> list[Path]:
    if not isinstance(node.value, dict):
        return [path]
    return [path] * bool(path) + [p for key, item in node.value.items() for p in _paths(item, (*path, key))]


def _has_unresolved(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_unresolved(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_unresolved(item) for item in value)
    return value is UNRESOLVED


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


def _div(a: Any, b: Any) -> int | float:
    """Whole where it comes out whole: batch sizes and steps must stay integers."""
    a, b = _number(a), _number(b)
    if isinstance(a, int) and isinstance(b, int) and b and a % b == 0:
        return a // b
    return a / b


RESOLVERS: dict[str, Callable[..., Any]] = {
    "mul": lambda *factors: math.prod(_number(f) for f in factors),
    "add": lambda *terms: sum(_number(t) for t in terms),
    "sub": lambda a, b: _number(a) - _number(b),
    "div": _div,
    "max": lambda *values: max(_number(v) for v in values),
    "min": lambda *values: min(_number(v) for v in values),
    "int": lambda value: int(value),
    "oc.decode": lambda value: value if value is None else parse_value(str(value)),
}
