"""Puts a value into the place where it lands, the same bytes, or refuses it; every template's filters are these.

Each takes the value and the key that it came from, which the refusal names: `{{ job.workdir | sh("remote_job_dir") }}`.
"""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Callable, Iterable
from typing import Any

from nemotron_launch.errors import UserError

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@%+:,./-][A-Za-z0-9_@%+=:,./-]*")
_PLAIN_DIRECTIVE = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]&|()*!-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def sh(value: object, key: str = "") -> str:
    """One word of a POSIX shell: any text without NUL, in single quotes where it needs them."""
    text = _text(value, key)
    if _PLAIN_WORD.fullmatch(text):
        return text
    return "'" + text.replace("'", "'\"'\"'") + "'"


def sh_words(values: Iterable[object], key: str = "") -> str:
    """A command: its arguments as words of a POSIX shell, with a blank between them."""
    return " ".join(sh(value, f"{key}[{n}]" if key else "") for n, value in enumerate(values))


def sbatch(value: object, key: str = "") -> str:
    """What stands behind `--option=` in a line of `#SBATCH`: Slurm's own parser knows quotes, backslash and `#`."""
    text = _one_line(value, key, "a directive of sbatch is one line")
    if _PLAIN_DIRECTIVE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def slurm_path(value: object, key: str = "") -> str:
    """A path in an `--output` of sbatch or srun, not yet quoted: there `%` begins a pattern, `\\` forbids them all."""
    text = path(value, key)
    if found := [mark for mark in "%\\" if mark in text]:
        raise UserError(f"Slurm's log paths cannot carry {found[0]!r}: {text}", where=key or None)
    return text


def path(value: object, key: str = "") -> str:
    """An absolute path of one line, not yet quoted."""
    text = _one_line(value, key, "a path is one line")
    if not text.startswith("/"):
        raise UserError(f"{text!r} is not an absolute path", where=key or None)
    return text


def mount(value: object, key: str = "") -> str:
    """One side of `source:target` in a comma-separated list of mounts, not yet quoted."""
    text = path(value, key)
    if found := [mark for mark in ":," if mark in text]:
        hint = "use another path, or a symbolic link to it"
        raise UserError(f"a mount cannot carry {found[0]!r}: {text}", where=key or None, hint=hint)
    return text


def name(value: object, key: str = "") -> str:
    """The name of an environment variable."""
    text = _text(value, key)
    if not _NAME.fullmatch(text):
        hint = "letters, digits and _ only, no digit first"
        raise UserError(f"{text!r} is no name for an environment variable", where=key or None, hint=hint)
    return text


def json(value: Any, key: str = "") -> str:
    """JSON on one line, non-ASCII characters as escapes; no NaN and nothing that is not data."""
    try:
        text = json_module.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"JSON cannot carry it: {error}", where=key or None) from None
    if re.search(r"\\ud[89a-f]", text):
        _encodable(json_module.loads(text) if isinstance(value, str) else repr(value), key)
    return text


def _text(value: object, key: str) -> str:
    text = str(value)
    if "\x00" in text:
        raise UserError("a NUL character cannot be passed to a program", where=key or None)
    return _encodable(text, key)


def _encodable(text: str, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{text!r} is no text in UTF-8", where=key or None) from None
    return text


def _one_line(value: object, key: str, why: str) -> str:
    text = _text(value, key)
    if found := _CONTROL.search(text):
        raise UserError(f"{text!r} has the control character {found.group()!r}; {why}", where=key or None)
    return text


FILTERS: dict[str, Callable[..., str]] = {
    "sh": sh,
    "sh_words": sh_words,
    "sbatch": sbatch,
    "mount": mount,
    "json": json,
}
