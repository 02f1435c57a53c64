"""Hydra's override grammar: `a.b=1`, `+a.b=1`, `++a.b=1`, `~a.b`, with numbers, text, lists and mappings as values.

Written here because importing hydra-core costs more time than everything else that a dry run does. What Hydra's sweeps
and functions (`a=1,2`, `choice(1,2)`) would mean is refused rather than read as text; sweep_values reads it.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NoReturn

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen

_INT = re.compile(r"[+-]?(?:0|[1-9](?:_?[0-9])*)\Z")
_FLOAT = re.compile(
    r"[+-]?(?:(?:[0-9](?:_?[0-9])*)?\.[0-9](?:_?[0-9])*(?:[eE][+-]?[0-9](?:_?[0-9])*)?"
    r"|[0-9](?:_?[0-9])*\.?(?:[eE][+-]?[0-9](?:_?[0-9])*)|[0-9](?:_?[0-9])*\.|[iI][nN][fF]|[nN][aA][nN])\Z"
)
_SEGMENT = re.compile(r"[A-Za-z0-9_$][\w$-]*")
_ESCAPABLE = "\\()[]{}:=, \t'\""
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}

Operation = Literal["set", "add", "force", "delete"]
_MARK: dict[Operation, str] = {"set": "", "add": "+", "force": "++", "delete": "~"}


@frozen
class Override:
    """One override. `path` has one entry per key or list index, as text. `has_value` is false for a bare `~a.b`."""

    operation: Operation
    path: tuple[str, ...]
    value: Any
    has_value: bool
    text: str

    @property
    def key(self) -> str:
        return ".".join(self.path)


def parse_override(text: str) -> Override:
    """Read one override, or raise a UserError that shows the position and what was expected there."""
    operation: Operation = "set"
    rest = text
    for name, mark in (("force", "++"), ("add", "+"), ("delete", "~")):
        if text.startswith(mark):
            operation, rest = name, text[len(mark) :]  # type: ignore[assignment]
            break
    at = len(text) - len(rest)
    key, equals, raw = rest.partition("=")
    path = parse_key(text, key, at)
    if not equals:
        if operation != "delete":
            fail(text, at + len(key), "'=' and a value")
        return Override(operation, path, None, False, text)
    return Override(operation, path, Reader(text, at + len(key) + 1).whole(), True, text)


def parse_value(text: str) -> Any:
    """Read one value: a number, true/false/null, text (bare or quoted), a list or a mapping.

    `${…}` stays in the text, to be resolved in its place.
    """
    return Reader(text, 0).whole()


def parse_arguments(text: str) -> list[Any]:
    """Read comma-separated values, as between the `:` and the `}` of `${name:…}`. No text: no arguments."""
    return Reader(text, 0).arguments() if text.strip() else []


def dump_value(value: Any) -> str:
    """Write a value so that `parse_value` reads the same one back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | int):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(dump_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{dump_value(key)}:{dump_value(item)}" for key, item in value.items()) + "}"
    return value if _is_bare(value) else _quote(value)


def _is_bare(text: str) -> bool:
    plain = re.fullmatch(r"[\w./@%+*?$|-]+(?: [\w./@%+*?$|-]+)*", text) is not None
    return plain and "${" not in text and isinstance(_scalar(text), str)


def _quote(text: str) -> str:
    # A backslash is special only in a run that ends at a quote or at the end.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def parse_key(text: str, key: str, at: int) -> tuple[str, ...]:
    """The path of a dotted key, which begins at position `at` of the whole text."""
    path: list[str] = []
    i = 0
    while True:
        match = _SEGMENT.match(key, i)
        if not match:
            if key[i : i + 1] in ("/", "@"):
                fail(text, at + i, "a key with dots: a.b=1 (Hydra's config groups do not exist here)")
            fail(text, at + i, "a key: letters, digits, '_' or '-', joined by dots")
        path.append(match[0])
        i = match.end()
        while key[i : i + 1] == "[":
            close = key.find("]", i)
            if close < 0 or not key[i + 1 : close].isdigit():
                fail(text, at + i + 1, "a list index and ']'")
            path.append(key[i + 1 : close])
            i = close + 1
        if i == len(key):
            return tuple(path)
        if key[i] in "/@":
            fail(text, at + i, "a key with dots: a.b=1 (Hydra's config groups do not exist here)")
        if key[i] != ".":
            fail(text, at + i, "'.' or '='")
        i += 1


def _scalar(text: str) -> Any:
    """The value of an unquoted word: the first of null, true/false, integer, float that fits, else text."""
    low = text.lower()
    if low in _WORDS:
        return _WORDS[low]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text


def fail(text: str, at: int, expected: str) -> NoReturn:
    """Raise the UserError that shows a position of the text, and what was expected there."""
    shown = text.replace("\n", " ").replace("\t", " ")
    start = max(0, at - 60)
    end = "" if len(shown) <= at + 20 else "…"
    head = "…" if start else ""
    window = head + shown[start : at + 20] + end
    raise UserError(
        f"cannot read the override: expected {expected}",
        where="command line",
        hint=f"{window}\n{' ' * (len(head) + at - start)}^ position {at + 1}",
    )


class Reader:
    """A cursor over one override's text."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def whole(self) -> Any:
        try:
            value = self._value("")
        except RecursionError:
            fail(self.text, self.at, "less nesting")
        if self.at < len(self.text):
            found = self.text[self.at]
            if found == ",":
                hint = "a list is [1,2]; text with a comma needs quotes: 'a,b'; a run for each: --sweep"
                fail(self.text, self.at, f"one value ({hint})")
            fail(self.text, self.at, f"the end, found {found!r} (text with {found} in it needs quotes)")
        return value

    def arguments(self) -> list[Any]:
        values = [self._value(",")]
        while self.at < len(self.text):
            self.expect(",")
            values.append(self._value(","))
        return values

    def _value(self, stop: str) -> Any:
        """Read one value up to the end or a character of `stop`, blanks around it dropped."""
        self.blanks()
        start = self.text[self.at : self.at + 1]
        if start and start in "'\"":
            value: Any = self._quoted(start)
        elif start == "[":
            value = self._list()
        elif start == "{":
            value = self._mapping()
        else:
            return self._bare(stop)
        self.blanks()
        return value

    def blanks(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t", "\n"):
            self.at += 1

    def expect(self, char: str) -> None:
        if self.text[self.at : self.at + 1] != char:
            fail(self.text, self.at, f"{char!r}")
        self.at += 1

    def _list(self) -> list[Any]:
        self.expect("[")
        items: list[Any] = []
        self.blanks()
        while self.text[self.at : self.at + 1] != "]":
            if items:
                if self.text[self.at : self.at + 1] != ",":
                    fail(self.text, self.at, "',' or ']'")
                self.at += 1
            items.append(self.item(",]"))
        self.at += 1
        return items

    def item(self, stop: str) -> Any:
        """Read one value up to the end or a character of `stop`; an empty one is refused."""
        self.blanks()
        if self.text[self.at : self.at + 1] in stop:
            fail(self.text, self.at, "a value ('' for empty text)")
        return self._value(stop)

    def _mapping(self) -> dict[str, Any]:
        self.expect("{")
        items: dict[str, Any] = {}
        self.blanks()
        while self.text[self.at : self.at + 1] != "}":
            if items:
                if self.text[self.at : self.at + 1] != ",":
                    fail(self.text, self.at, "',' or '}'")
                self.at += 1
            self.blanks()
            start = self.at
            key = self._value(":,}")
            if key is None or isinstance(key, bool):
                key = self.text[start : self.at].strip()  # `on: …` style keys stay text
            if not isinstance(key, str | int | float) or key == "":
                fail(self.text, start, "a key")
            if str(key) in items:
                fail(self.text, start, f"a key that is not there yet, found {key} again")
            if self.text[self.at : self.at + 1] != ":":
                fail(self.text, self.at, "':' and a value")
            self.at += 1
            items[str(key)] = self.item(",}")
        self.at += 1
        return items

    def _quoted(self, quote: str) -> str:
        opened = self.at
        self.at += 1
        parts: list[str] = []
        while True:
            if self.at >= len(self.text):
                fail(self.text, opened, f"a closing {quote} for this one")
            char = self.text[self.at]
            if char == quote:
                self.at += 1
                return "".join(parts)
            if char == "\\":
                end = self.at
                while self.text[end : end + 1] == "\\":
                    end += 1
                run = end - self.at
                self.at = end
                if self.text[end : end + 1] == quote:
                    parts.append("\\" * (run // 2))
                    if run % 2:
                        parts.append(quote)
                        self.at += 1
                else:
                    parts.append("\\" * run)
            elif self.text.startswith("${", self.at):
                parts.append(self._interpolation())
            else:
                parts.append(char)
                self.at += 1

    def _bare(self, stop: str) -> Any:
        parts: list[str] = []
        solid = 0  # how much of the text must survive the trimming of blanks at the end
        literal = False  # an escape or an interpolation makes it text whatever it looks like
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in stop:
                break
            if self.text.startswith("${", self.at):
                parts.append(self._interpolation())
                solid, literal = len(parts), True
            elif char == "\\" and self.text[self.at + 1 : self.at + 2] and self.text[self.at + 1] in _ESCAPABLE:
                parts.append(self.text[self.at + 1])
                self.at += 2
                solid, literal = len(parts), True
            elif char in "()[]{}'\"" or (char == "," and stop == ""):
                break
            else:
                parts.append(char)
                self.at += 1
        if self.at < len(self.text) and self.text[self.at] not in stop and self.text[self.at] != ",":
            found = self.text[self.at]
            if found == "(":
                fail(self.text, self.at, "no '(' (Hydra's functions do not exist here; text with ( needs quotes)")
            fail(self.text, self.at, f"the end of the value, found {found!r} (text with {found} in it needs quotes)")
        while len(parts) > solid and parts[-1] in " \t\n":
            parts.pop()
        text = "".join(parts)
        return text if literal else _scalar(text)

    def _interpolation(self) -> str:
        end = interpolation_end(self.text, self.at)
        if end < 0:
            fail(self.text, self.at, "a '}' that closes this ${")
        found = self.text[self.at : end]
        self.at = end
        return found


def interpolation_end(text: str, start: int) -> int:
    """The position after the `}` that closes the `${` at `start`, or -1. Quotes and nested braces are respected."""
    depth = 0
    i = start
    quote = ""
    while i < len(text):
        char = text[i]
        if quote:
            if char == "\\":
                i += 1
            elif char == quote:
                quote = ""
        elif char in "'\"" and depth:
            quote = char
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return i + 1
        i += 1
    return -1
