"""Runs tests on a program, inside the sandbox: a script of its own, beside `program.py`.

What to do comes as JSON on stdin; what was found goes to the stdout that this process began with, as JSON with the key
that came. What the program prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import sys
import types
import unittest
from typing import Any


def main() -> None:
    task = json.load(sys.stdin)
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nowhere, fd)
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    exec(compile(task["before"] + "\n" + source, "program.py", "exec"), module.__dict__)
    found = _calls(task, module) if task["function"] else _tests(task, module)
    os.write(verdict, json.dumps({"key": task["key"], "found": found}).encode())


def _calls(task: dict[str, Any], module: types.ModuleType) -> list[Any]:
    """What the function returns for each input: [value], or nothing where it raised."""
    owner = module if hasattr(module, task["function"]) else module.Solution()
    found: list[Any] = []
    for arguments in task["inputs"]:
        try:
            value = getattr(owner, task["function"])(*arguments)
            json.dumps(value)
            found.append([value])
        except Exception:
            found.append([])
    return found


def _tests(task: dict[str, Any], module: types.ModuleType) -> list[bool]:
    """Which tests pass."""
    return [_passes(test, task["entry_point"], module) for test in task["tests"]]


def _passes(test: str, entry_point: str, module: types.ModuleType) -> bool:
    """Whether a test's code runs without an exception, with the functions and classes of tests that it defines."""
    names = dict(module.__dict__)
    before = set(names)
    try:
        exec(compile(test, "test.py", "exec"), names)
        own = {name: value for name, value in names.items() if name not in before}
        if entry_point and callable(own.get("check")):
            own.pop("check")(names[entry_point])
        for name, value in own.items():
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                result = unittest.TestResult()
                unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
                if not result.wasSuccessful() or not result.testsRun:
                    return False
            elif name.startswith("test_") and isinstance(value, types.FunctionType):
                value()
    except BaseException:
        return False
    return True


if __name__ == "__main__":
    main()
