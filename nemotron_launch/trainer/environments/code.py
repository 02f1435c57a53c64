"""Runs the row's unit tests on the program that an answer holds, in the sandbox.

Row: `tests` (or `unit_tests`, `test_list`, `test`, `test_cases`, `verifier_metadata.unit_tests`), one of
- `{"inputs": […], "outputs": […]}`: texts that the program reads and must write; with `fn_name`, lists of arguments and
  what the function must return; also as a list of `{"input": …, "output": …}`;
- Python code with asserts, `check(candidate)` for the row's `entry_point`, functions test_… or unittest classes, or a
  list of such.
`setup_code` runs before the program. The reward is 1 if all tests pass; with `partial_reward`, the share that does.

The inputs-and-outputs kinds compare out here, where a program cannot reach. Asserts run in the program's own process:
they are good against wrong programs, and against those that end early, not against one made to forge the verdict.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.environments.answers import without_thoughts
from nemotron_launch.trainer.environments.bad_rows import refuse_bad_rows
from nemotron_launch.trainer.environments.sandbox import (
    Finished,
    Limits,
    NoIsolation,
    Program,
    python,
    run_programs,
)

TEST_KEYS = ("tests", "unit_tests", "test_list", "test", "test_cases")
_HARNESS = (Path(__file__).parent / "code_harness.py").read_text(encoding="utf-8")
_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class Tests:
    """A row's tests: asserts, or inputs with the outputs that are right; function: what is called with the inputs."""

    asserts: tuple[str, ...] = ()
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    function: str = ""


class CodeEnvironment:
    """Scores programs by tests; section: `env.code`. Programs of several answers run at the same time."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._limits = Limits(
            seconds=section["timeout"],
            memory_mib=section["memory_mib"],
            processes=section["max_processes"],
            output_kib=section["max_output_kib"],
        )
        self._allow_unisolated = section["allow_unisolated"]
        self._threads = max(1, min(section["num_workers"], len(os.sched_getaffinity(0))))
        self._tried = False
        self._stop = threading.Event()

    def problem(self, row: Mapping[str, Any]) -> str:
        """Why a row cannot be scored; empty if it can. Raises UserError where nothing can be run safely."""
        self._limits = self._tried_limits()
        if str(row.get("language") or "python").lower() not in ("python", "python3", "py"):
            return f"language is {row['language']}; only Python is run"
        try:
            tests_of(row)
        except ValueError as error:
            return str(error)
        return ""

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Raise UserError for rows that cannot be scored."""
        refuse_bad_rows([self.problem(row) for row in rows], wheres)

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """The scores; components: the share of tests that passed, and whether a limit ended the program."""
        self._limits = self._tried_limits()
        rollouts = [rollout for group in groups for rollout in group]
        with ThreadPoolExecutor(self._threads, "code") as threads:
            try:
                scores = iter(list(threads.map(self._score, rollouts)))
            except BaseException:  # a signal's handler may have raised
                self._stop.set()
                threads.shutdown(cancel_futures=True)
                self._stop.clear()
                raise
        return [[next(scores) for _ in group] for group in groups]

    def close(self) -> None:
        """End the programs that still run."""
        self._stop.set()

    def _score(self, rollout: Rollout) -> Score:
        started = time.perf_counter()
        try:
            tests = tests_of(rollout.row)
        except ValueError as error:
            return Score(0.0, error=str(error))
        program = program_of(rollout.text)
        if not program:
            return Score(0.0, components={"tests_passed": 0.0, "stopped": 0.0})
        before = str(rollout.row.get("setup_code") or rollout.row.get("test_setup_code") or "")
        entry_point = str(rollout.row.get("entry_point") or "")
        try:
            passed, stopped = self._passed(program, tests, before, entry_point)
        except NoIsolation as error:
            return Score(0.0, error=f"the sandbox did not start: {error}")
        share = sum(passed) / len(passed)
        reward = share if rollout.row.get("partial_reward") else float(all(passed))
        components = {"tests_passed": share, "stopped": float(stopped)}
        return Score(reward, components=components, seconds=time.perf_counter() - started)

    def _passed(self, program: str, tests: Tests, before: str, entry_point: str) -> tuple[list[bool], bool]:
        """Which tests pass, and whether a limit ended the program. Raises NoIsolation."""
        if not tests.asserts and not tests.function:
            files = {"program.py": f"{before}\n{program}" if before else program}
            programs = [Program(python("program.py"), stdin=text) for text in tests.inputs]
            finished = run_programs(files, programs, self._limits, stop=self._stop)
            ends = [*finished, *[Finished(None)] * (len(programs) - len(finished))]
            passed = [
                end.code == 0 and _same_text(end.stdout, right) for end, right in zip(ends, tests.outputs, strict=True)
            ]
            return passed, any(end.problem for end in finished)
        key = secrets.token_hex(16)
        task = {"key": key, "before": before, "function": tests.function, "entry_point": entry_point}
        given = json.dumps({**task, "inputs": tests.inputs, "tests": tests.asserts})
        files = {"program.py": program, "harness.py": _HARNESS}
        run = [Program(python("harness.py"), stdin=given)]
        (end,) = run_programs(files, run, self._limits, stop=self._stop)
        found = None if end.problem else _found(end.stdout, key, len(tests.asserts or tests.inputs))
        if tests.asserts:
            return found or [False] * len(tests.asserts), bool(end.problem)
        values = found or [[]] * len(tests.inputs)
        right = [
            bool(value) and same_value(value[0], output) for value, output in zip(values, tests.outputs, strict=True)
        ]
        return right, bool(end.problem)

    def _tried_limits(self) -> Limits:
        """The limits with which programs can be run here, found out once. Raises UserError."""
        if self._tried:
            return self._limits
        self._tried = True
        limits, why = self._limits, ""
        # Without namespaces a user that nobody is may not even reach this Python; then it is as this user.
        for isolated, own_user in ((True, True), (False, True), (False, False))[: 3 if self._allow_unisolated else 1]:
            allowed = replace(limits, isolated=isolated, own_user=own_user)
            tried = replace(allowed, seconds=60.0, memory_mib=max(limits.memory_mib, 256), output_kib=64)
            try:
                (end,) = run_programs({"program.py": "print('ready')"}, [Program(python("program.py"))], tried)
                if end.stdout == "ready\n":
                    return allowed
                why = why or (end.stderr.strip().splitlines() or [end.problem or f"exit code {end.code}"])[-1]
            except NoIsolation as error:
                why = why or str(error)
        raise UserError(
            f"programs cannot be isolated on this machine ({why})",
            where="env.code",
            hint="run where user namespaces are allowed (unshare -U works), or as root with CAP_SYS_ADMIN\n"
            "env.code.allow_unisolated=true runs them with limits only, among your own processes and files",
            exit_code=1,
        )


def program_of(text: str) -> str:
    """The program in an answer: its last fenced block, or what is in the last <code> tags; all of it without either."""
    text = without_thoughts(text)
    fenced = _FENCED.findall(text)
    if fenced:
        return str(fenced[-1]).strip("\n")
    end = text.rfind("</code>")
    begin = text.rfind("<code>", 0, max(end, 0))
    if begin >= 0:
        return text[begin + len("<code>") : end].strip("\n")
    return "" if "```" in text else text.strip("\n")


def tests_of(row: Mapping[str, Any]) -> Tests:
    """A row's tests. Raises ValueError, in words for the user."""
    key = next((key for key in TEST_KEYS if row.get(key)), "")
    value = row.get(key) if key else None
    metadata = row.get("verifier_metadata")
    if value is None and isinstance(metadata, Mapping) and metadata.get("unit_tests"):
        key, value = "verifier_metadata.unit_tests", metadata["unit_tests"]
    if value is None:
        raise ValueError(f"missing key {' or '.join(TEST_KEYS)}")
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # Python may begin so too
            value = json.loads(value)
    if isinstance(value, str):
        return Tests(asserts=(_code(value, key),))
    function = str(row.get("fn_name") or "")
    if isinstance(value, Mapping):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
            raise ValueError(f"{key} has no list of inputs and of outputs")
        if len(inputs) != len(outputs):
            raise ValueError(f"{key} has {len(inputs)} inputs and {len(outputs)} outputs")
        return _cases(inputs, outputs, str(value.get("fn_name") or function), key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is neither code, nor a list, nor inputs and outputs")
    if all(isinstance(test, str) for test in value):
        return Tests(asserts=tuple(_code(test, key) for test in value))
    if not all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in value):
        raise ValueError(f"{key} is a list of neither code nor objects with input and output")
    return _cases([test["input"] for test in value], [test["output"] for test in value], function, key)


def same_value(said: Any, right: Any) -> bool:
    """Whether a returned value is the right one; floats up to 1e-6 of their size, tuples as lists."""
    if isinstance(said, list) and isinstance(right, list):
        return len(said) == len(right) and all(map(same_value, said, right))
    if isinstance(said, dict) and isinstance(right, dict):
        return said.keys() == right.keys() and all(same_value(said[key], right[key]) for key in said)
    if isinstance(said, bool) or isinstance(right, bool):
        return said is right
    if isinstance(said, float | int) and isinstance(right, float | int):
        exact = isinstance(said, int) and isinstance(right, int)
        return said == right if exact else math.isclose(said, right, rel_tol=1e-6, abs_tol=1e-9)
    return bool(said == right)


def _cases(inputs: list[Any], outputs: list[Any], function: str, key: str) -> Tests:
    if not function:
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise ValueError(f"{key} has inputs or outputs that are no text, and no fn_name to call")
        return Tests(inputs=tuple(inputs), outputs=tuple(outputs))
    if not function.isidentifier():
        raise ValueError(f"fn_name is {function!r}, no name of a function")
    return Tests(
        inputs=tuple(_arguments(value, key) for value in inputs),
        outputs=tuple(_json(value) for value in outputs),
        function=function,
    )


def _arguments(value: Any, key: str) -> list[Any]:
    """The arguments of a call: a list, or a text with one JSON value a line."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{key} has an input that is neither a list of arguments nor text")
    try:
        return [json.loads(line) for line in value.splitlines() if line.strip()]
    except ValueError:
        raise ValueError(f"{key} has an input that is not one JSON value a line") from None


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _code(text: str, key: str) -> str:
    try:
        compile(text, key, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key} is not Python ({error})") from None
    return text


def _same_text(said: str, right: str) -> bool:
    """Whether two outputs are the same but for spaces at the ends of lines and empty lines at the end."""
    return _lines(said) == _lines(right)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _found(text: str, key: str, size: int) -> list[Any] | None:
    """What the harness found of each test; None if it did not get to the end."""
    try:
        verdict = json.loads(text)
    except ValueError:
        return None
    found = verdict.get("found") if isinstance(verdict, dict) and verdict.get("key") == key else None
    return found if isinstance(found, list) and len(found) == size else None
