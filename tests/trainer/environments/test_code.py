"""The environment code: which tests a row may have, what counts as the program, what the verdict is."""

from __future__ import annotations

import pytest

from nemotron_launch.trainer.environments import code
from nemotron_launch.trainer.environments.code import program_of, same_value

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
SUBTRACT = ADD.replace("a + b", "a - b")
ENDS_EARLY = "```python\nimport os\nos._exit(0)\n```"
PRINTS = "```python\nprint(sum(map(int, input().split())))\n```"
CALLS = {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}

ROWS = {
    "asserts": {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
    "one text": {"test": "assert add(1, 2) == 3\nassert add(0, 0) == 0"},
    "HumanEval": {"test": "def check(candidate):\n    assert candidate(1, 1) == 2", "entry_point": "add"},
    "MBPP": {"test_list": ["assert add(one, 2) == 3"], "test_setup_code": "one = 1"},
    "unittest": {
        "tests": "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(add(1, 1), 2)"
    },
    "functions": {"tests": "from program import add\ndef test_it():\n    assert add(1, 1) == 2"},
    "calls": {"tests": CALLS},
    "calls as text": {"unit_tests": '{"inputs": ["1\\n2"], "outputs": ["3"]}', "fn_name": "add"},
    "NeMo Gym": {"verifier_metadata": {"unit_tests": CALLS}},
}


@pytest.fixture(scope="module")
def environment(defaults):
    from nemotron_launch.trainer.environments import open_environments

    config = {**defaults, "env": {**defaults["env"], "code": {**defaults["env"]["code"], "timeout": 60}}}
    with open_environments(config) as environments:
        yield environments


def rewards(environment, row, *texts):
    from nemotron_launch.trainer.environments import Rollout

    scores = environment.score([[Rollout([], text, {**row, "env_name": "code"}) for text in texts]])[0]
    assert not any(score.error for score in scores)
    return [score.reward for score in scores]


@pytest.mark.parametrize("kind", ROWS)
def test_right_programs_pass_and_wrong_ones_do_not(environment, kind):
    assert rewards(environment, ROWS[kind], ADD, SUBTRACT, ENDS_EARLY) == [1, 0, 0]


def test_programs_that_read_and_write_are_compared_out_here(environment):
    row = {"tests": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7\n\n"]}}
    assert rewards(environment, row, PRINTS, "print(3)", "```python\nraise SystemExit\n```", "```") == [1, 0, 0, 0]
    assert rewards(environment, {**row, "partial_reward": True}, "print(3)") == [0.5]


def test_a_verdict_cannot_be_printed(environment):
    forged = '```python\nimport os\nos.write(1, b\'{"key": "", "found": [true, true]}\')\nos._exit(0)\n```'
    assert rewards(environment, ROWS["asserts"], forged) == [0]


def test_right_values_are_not_in_the_sandbox(environment):
    row = {"tests": {"inputs": [[1]], "outputs": ["xyzzy"], "fn_name": "look"}}
    looks = """```python
def look(n):
    import os, gc
    seen = [open(name).read() for name in os.listdir(".")]
    seen += [str(one) for one in gc.get_objects() if type(one) in (dict, list)]
    return "xy" + "zzy" if any("xy" + "zzy" in text for text in seen) else "nothing"
```"""
    assert rewards(environment, row, looks) == [0]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("<code>x = 1</code>", "x = 1"),
        ("<think>```python\nx = 1\n```</think>x = 2", "x = 2"),
        ("```python\nx = 1", ""),
    ],
)
def test_the_program_is_the_last_fenced_block(text, program):
    assert program_of(text) == program


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "missing key tests or unit_tests"),
        ({"tests": "assert ("}, "tests is not Python"),
        ({"tests": {"inputs": [1], "outputs": [2]}}, "no text, and no fn_name"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"tests": {"inputs": [], "outputs": []}}, "no list of inputs"),
        ({"tests": {"inputs": ["x"], "outputs": [1], "fn_name": "f"}}, "not one JSON value a line"),
        ({"tests": [1]}, "neither code nor objects"),
        ({"tests": {"inputs": [[1]], "outputs": [1], "fn_name": "f g"}}, "no name of a function"),
    ],
)
def test_rows_without_usable_tests_are_named(row, problem):
    with pytest.raises(ValueError, match=problem):
        code.tests_of(row)


def test_values_are_the_same_up_to_the_end_of_floats():
    assert same_value([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}])
    assert same_value(1, 1.0)
    assert not same_value(True, 1)
    assert not same_value([1], [1, 1])
    assert not same_value("1", 1)
