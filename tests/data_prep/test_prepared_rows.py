"""Rows of any shape become rows of the target, the steps read them, and what cannot be one says why."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron_launch.data_prep.blend import Source
from nemotron_launch.data_prep.rows import again, preparer
from nemotron_launch.trainer.data.sources import BadRow

SOURCE = Source("a", (), "b")
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TURNS = [USER, ANSWER, {"role": "user", "content": "and"}]
TOOL = {"type": "function", "name": "f"}


def source(**named: Any) -> Source:
    return Source("a", (), "b", **named)


GOOD: list[tuple[str, Source, dict[str, Any], dict[str, Any]]] = [
    (
        "dpo",
        SOURCE,
        {"prompt": "p", "chosen": "a", "rejected": "b", "id": 1},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        "dpo",
        source(fields={"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.1.text"}),
        {"q": "p", "answers": [{"text": "a"}, {"text": "b"}]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        "dpo",
        SOURCE,
        {"context": TURNS, "response1": "a", "response2": "b", "overall_preference": 2},
        {"prompt": TURNS, "chosen": "b", "rejected": "a"},
    ),
    (
        "dpo",
        SOURCE,
        {"context": [USER], "completions": [{"rank": 1, "completion": [ANSWER]}, {"rank": 0, "completion": "b"}]},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
    ),
    (
        "dpo",
        source(fields={"system": "sys"}),
        {"sys": "be brief", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "system", "content": "be brief"}, USER], "chosen": "a", "rejected": "b"},
    ),
    ("sft", SOURCE, {"input": "q", "output": "a"}, {"prompt": "q", "response": "a"}),
    ("sft", SOURCE, {"messages": [USER, ANSWER]}, {"prompt": "q", "response": "a"}),
    ("sft", SOURCE, {"messages": [*TURNS, ANSWER], "tools": [TOOL]}, {"messages": [*TURNS, ANSWER], "tools": [TOOL]}),
    (
        "sft",
        source(fields={"messages": "conversations"}),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "response": "a"},
    ),
    (
        "rlvr",
        source(environment="math"),
        {"question": "1+1", "answer": "#### 2", "level": 3, "none": None},
        {"prompt": "1+1", "level": 3, "expected_answer": "#### 2", "env_name": "math"},
    ),
    (
        "rlvr",
        source(environment="math"),
        {"prompt": [USER], "reward_model": {"ground_truth": "2"}, "env_name": "exact"},
        {"prompt": "q", "reward_model": {"ground_truth": "2"}, "env_name": "exact", "expected_answer": "2"},
    ),
    ("rlvr", SOURCE, {"messages": [USER, ANSWER]}, {"prompt": "q", "expected_answer": "a"}),
    ("rlhf", SOURCE, {"messages": [*TURNS, ANSWER], "answer": "x"}, {"prompt": TURNS}),
    (
        "gym",
        source(agent="math_agent"),
        {"question": "1+1", "answer": "2"},
        {
            "question": "1+1",
            "answer": "2",
            "expected_answer": "2",
            "responses_create_params": {"input": [{"role": "user", "content": "1+1"}]},
            "agent_ref": {"type": "responses_api_agents", "name": "math_agent"},
        },
    ),
    (
        "gym",
        SOURCE,
        {
            "responses_create_params": {"input": "q", "tools": [TOOL], "max_output_tokens": 9},
            "agent_ref": {"name": "a"},
        },
        {
            "responses_create_params": {"input": [USER], "tools": [TOOL], "max_output_tokens": 9},
            "agent_ref": {"type": "responses_api_agents", "name": "a"},
        },
    ),
]


@pytest.mark.parametrize(("target", "given", "row", "expected"), GOOD)
def test_row_becomes_the_target_s_and_stays_it(
    target: str, given: Source, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = preparer(target, given)(row)
    assert made.data == expected
    second = again(target)(dict(made.data))
    assert (second.data, second.text) == (made.data, made.text)


BAD: list[tuple[str, Source, dict[str, Any], str]] = [
    ("dpo", SOURCE, {"prompt": "p", "chosen": "a"}, "missing key rejected"),
    ("dpo", SOURCE, {"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ("dpo", SOURCE, {"prompt": "p", "chosen": " ", "rejected": "a"}, "empty completion"),
    ("dpo", SOURCE, {"context": "p", "response1": "a", "response2": "b", "overall_preference": 0}, "tie"),
    ("dpo", source(fields={"prompt": "q"}), {"prompt": "p", "chosen": "a", "rejected": "b"}, "missing key q"),
    ("sft", SOURCE, {"messages": [USER]}, "the last message is not the assistant's"),
    ("sft", SOURCE, {"messages": [ANSWER]}, "the conversation asks nothing"),
    ("rlvr", SOURCE, {"question": "q"}, "missing key expected_answer or answer or ground_truth or output"),
    ("rlvr", source(environment="math"), {"question": "q"}, "(environment math)"),
    ("rlvr", source(environment="code"), {"question": "q", "answer": "a"}, "unit_tests"),
    ("rlvr", SOURCE, {"question": "q", "answer": "a", "env_name": "mth"}, "there is no environment mth"),
    ("rlhf", SOURCE, {"answer": "q"}, "missing key messages or prompt or question or problem or input"),
    ("gym", SOURCE, {"question": "q"}, "missing key agent_ref, and the source names no agent"),
    ("gym", SOURCE, {"responses_create_params": "{", "agent_ref": "a"}, "responses_create_params is not valid JSON"),
]


@pytest.mark.parametrize(("target", "given", "row", "reason"), BAD)
def test_row_that_cannot_be_one_says_why(target: str, given: Source, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as problem:
        preparer(target, given)(row)
    assert reason in str(problem.value)
