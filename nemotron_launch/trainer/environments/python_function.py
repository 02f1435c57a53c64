"""The user's own verifier: `python:module.function`, called in a worker.

The function takes the answer's text and the row, and, where it names them, `messages`, `truncated` and `tokens`. It
returns a number, or parts by name: their sum is the reward unless one is called `reward`. `function.fields` may list
the row's fields that it needs. Modules are found in the working directory and where the trainer finds its own.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.environments.bad_rows import refuse_bad_rows
from nemotron_launch.trainer.environments.worker import load_function
from nemotron_launch.trainer.environments.workers import Call, WorkerPool

_EXTRAS = ("messages", "truncated", "tokens")


class PythonEnvironment:
    """Scores by a function; name: `module.function`."""

    def __init__(self, name: str, pool: WorkerPool) -> None:
        module, _, function = name.rpartition(".")
        self._function = f"{module}:{function}"
        self._pool = pool
        self._fields: tuple[str, ...] = ()
        self._unusable: str | None = None

    def problem(self, row: Mapping[str, Any]) -> str:
        """Why a row cannot be scored, or nothing by this function; empty if it can."""
        if self._unusable is None:
            (answer,) = self._pool.run([Call(f"{__name__}:look", (self._function,))])
            self._fields, self._unusable = tuple(answer.value or ()), answer.error
        if self._unusable:
            name = f"python:{self._function.replace(':', '.')}"
            return f"{name} cannot be used where the trainer runs: {self._unusable}"
        missing = [field for field in self._fields if row.get(field) is None]
        return f"missing key {' and '.join(missing)}" if missing else ""

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Raise UserError for rows that cannot be scored."""
        refuse_bad_rows([self.problem(row) for row in rows], wheres)

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """The scores. An answer at which the function throws, or takes too long, is worth 0 and has an error."""
        rollouts = [rollout for group in groups for rollout in group]
        calls = [Call(f"{__name__}:call", (self._function, one.text, dict(one.row), _extras(one))) for one in rollouts]
        answers = iter(self._pool.run(calls))
        scores = (
            replace(Score(0.0, error=answer.error) if answer.error else answer.value, seconds=answer.seconds)
            for answer in answers
        )
        return [[next(scores) for _ in group] for group in groups]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def look(name: str) -> list[str]:
    """In a worker: the fields that a function needs. Raises what its import raises; TypeError for wrong parameters."""
    function = load_function(name)
    try:
        inspect.signature(function).bind("text", {}, **_wanted(function, dict.fromkeys(_EXTRAS)))
    except TypeError as error:
        raise TypeError(f"it must take (text, row), and may take {', '.join(_EXTRAS)} ({error})") from None
    return [str(field) for field in getattr(function, "fields", ())]


def call(name: str, text: str, row: Mapping[str, Any], extras: Mapping[str, Any]) -> Score:
    """In a worker: the score by a function. Raises what it raises."""
    function = load_function(name)
    return score_of(function(text, row, **_wanted(function, extras)))


def score_of(value: Any) -> Score:
    """A score from what a function returned: a number, or numbers by name. Raises TypeError, ValueError."""
    if isinstance(value, Score):
        return value
    parts = {str(key): _number(part) for key, part in value.items()} if isinstance(value, Mapping) else {}
    reward = _number(value) if not isinstance(value, Mapping) else parts.pop("reward", sum(parts.values()))
    return Score(reward, components=parts)


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"it returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"it returned {value}")
    return float(value)


def _wanted(function: Any, extras: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    everything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return {name: value for name, value in extras.items() if everything or name in parameters}


def _extras(rollout: Rollout) -> dict[str, Any]:
    messages = [dict(message) for message in rollout.messages]
    return {"messages": messages, "truncated": rollout.truncated, "tokens": rollout.tokens}
