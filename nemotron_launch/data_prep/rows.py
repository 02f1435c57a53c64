"""A row of any source as a row of a target, in the shape that the steps read; or why it cannot be one.

What comes out, given in again, comes out the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from nemotron_launch.config.checks_rewards import ENVIRONMENTS
from nemotron_launch.data_prep.blend import Source
from nemotron_launch.trainer.data.messages import as_text, is_answered
from nemotron_launch.trainer.data.preference_rows import preference_format
from nemotron_launch.trainer.data.prompt_rows import (
    AGENTS,
    ANSWER_KEYS,
    GYM_KEY,
    PROMPT_KEYS,
    GymRows,
    asked,
    expected_answer,
    gym_fields,
    of_sharegpt,
    responses_params,
    tools_of,
)
from nemotron_launch.trainer.data.sft_rows import conversation, form_of
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.tokenizer import Message

Row = Mapping[str, Any]

TARGETS = ("dpo", "rlvr", "rlhf", "gym", "sft")
_PREFERENCES = preference_format({}, "data")
_CHAT = form_of({})
# Environments that verify by nothing that a row must have, or that only their servers can say.
_ASK_NOTHING = ("reward_model", "judge", "nemo_gym")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row of the target.

    data: the row itself. messages: what is asked. answers: the texts that follow it, if the row has any (chosen and
    rejected; the response; the right answer). trained: whether these are texts that training sees, so that they count
    for the row's length.
    """

    data: dict[str, Any]
    messages: list[Message]
    answers: tuple[str, ...]
    trained: bool = False

    @property
    def prompt(self) -> str:
        """What is asked, as one text; roles tell messages of several apart."""
        if len(self.messages) == 1:
            text: str = self.messages[0]["content"]
            return text
        return "\n".join(f"{message['role']}: {_said(message)}" for message in self.messages)

    @property
    def said(self) -> str:
        """The answers as one text; before each is something that is no white space: `1 2`, `3` are not `1`, `2 3`."""
        return "\n".join([f"\0{answer}" for answer in self.answers])

    @property
    def text(self) -> str:
        """The whole row as one text, by which it is compared with others."""
        return f"{self.prompt}\n{self.said}" if self.answers else self.prompt


def preparer(target: str, source: Source) -> Callable[[dict[str, Any]], Prepared]:
    """What makes a source's rows into the target's. It raises BadRow."""
    make = _MAKERS[target]
    fields = [(name, column, column.split(".")) for name, column in source.fields.items()]

    def prepare(row: dict[str, Any]) -> Prepared:
        if fields:
            row = _renamed(row, fields)
        return make(row, source)

    return prepare


def again(target: str) -> Callable[[dict[str, Any]], Prepared]:
    """What reads rows that `preparer` made."""
    return preparer(target, Source("", (), ""))


def _renamed(row: dict[str, Any], fields: list[tuple[str, str, list[str]]]) -> dict[str, Any]:
    values = {}
    for name, column, path in fields:
        value: Any = row.get(column)
        if value is None and len(path) > 1:
            value = value_at(row, path)
        if value is None:
            raise BadRow(f"missing key {column}")
        values[name] = value
    taken = {column for _, column, _ in fields}
    return {**{key: value for key, value in row.items() if key not in taken}, **values}


def value_at(value: Any, path: list[str]) -> Any:
    """What a path of keys and list indices leads to; None if nothing."""
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


# Each target --------------------------------------------------------------------------------------------------------


def _dpo(row: dict[str, Any], source: Source) -> Prepared:
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    plain = type(prompt) is str and type(chosen) is str and type(rejected) is str
    if plain and row.get("completions") is None and row.get("overall_preference") is None and not row.get("tools"):
        better: Message = {"role": "assistant", "content": chosen}
        worse: Message = {"role": "assistant", "content": rejected}
        context: list[Message] = [{"role": "user", "content": prompt}]
        tools = None
    else:
        answers = _PREFERENCES(row)
        context, better, worse, tools = answers.context, answers.chosen, answers.rejected, answers.tools
    context = _with_system(context, row)
    if not is_answered(better) or not is_answered(worse):
        raise BadRow("empty completion")
    if better == worse:
        raise BadRow("chosen equals rejected")
    data = {"prompt": _short(context), "chosen": _answer(better), "rejected": _answer(worse)}
    if tools:
        data["tools"] = tools
    return Prepared(data, context, (_said(better), _said(worse)), trained=True)


def _sft(row: dict[str, Any], source: Source) -> Prepared:
    if isinstance(row.get("messages"), list):
        row = {**row, "messages": [of_sharegpt(message) for message in row["messages"]]}
    messages = _with_system(conversation(row, _CHAT), row)
    context, answer = messages[:-1], messages[-1]
    if not context:
        raise BadRow("the conversation asks nothing")
    data: dict[str, Any]
    if len(context) == 1 and isinstance(prompt := _short(context), str) and isinstance(said := _answer(answer), str):
        data = {"prompt": prompt, "response": said}
    else:
        data = {"messages": messages}
    if row.get("tools"):
        data["tools"] = row["tools"]
    return Prepared(data, context, (_said(answer),), trained=True)


def _rlvr(row: dict[str, Any], source: Source) -> Prepared:
    prepared = _prompt(row, source)
    problem = _checker(str(prepared.data.get("env_name") or ""))(prepared.data)
    if problem:
        raise BadRow(problem)
    return prepared


def _rlhf(row: dict[str, Any], source: Source) -> Prepared:
    prepared = _prompt(row, source)
    for name in ANSWER_KEYS:
        prepared.data.pop(name, None)
    return Prepared(prepared.data, prepared.messages, ())


def _gym(row: dict[str, Any], source: Source) -> Prepared:
    if row.get("agent_ref") is None:
        if source.agent is None:
            raise BadRow("missing key agent_ref, and the source names no agent")
        row = {**row, "agent_ref": {"type": AGENTS, "name": source.agent}}
    messages, answer, _ = _asked(row)
    # What is asked is among the parameters now; a server may verify by any other column.
    asked_in = ("prompt", "messages", "system", "tools")
    data = {key: value for key, value in row.items() if value is not None and key not in asked_in}
    if (expected := expected_answer(row, {})) is not None:
        answer = expected
    if answer is not None:
        data["expected_answer"] = answer
    given = responses_params(row)
    data |= gym_fields({**row, GYM_KEY: given}, messages, GymRows())
    if isinstance(extra := data.get("extra_env_info"), Mapping) and GYM_KEY in extra:
        data["extra_env_info"] = {key: value for key, value in extra.items() if key != GYM_KEY}
    return Prepared(data, messages, () if answer is None else (_plain(answer),))


def _prompt(row: dict[str, Any], source: Source) -> Prepared:
    messages, answer, used = _asked(row)
    dropped = {used, "prompt", "messages", "system", GYM_KEY}
    data = {key: value for key, value in row.items() if value is not None and key not in dropped}
    tools = tools_of(row)
    answer = _take_answer(row, data, answer)
    data = {"prompt": _short(messages), **data}
    if tools:
        data["tools"] = tools
    if source.environment and not data.get("env_name"):
        data["env_name"] = source.environment
    return Prepared(data, messages, () if answer is None else (_plain(answer),))


def _asked(row: dict[str, Any]) -> tuple[list[Message], Any, str]:
    """What is asked, an answer that the conversation ended with, and the column that this was taken from."""
    messages, answer = asked(row, {})
    is_gym = (GYM_KEY in row or "extra_env_info" in row) and responses_params(row) is not None
    used = "" if is_gym else next((name for name in PROMPT_KEYS if row.get(name) is not None), "")
    return _with_system(messages, row), answer, used


def _take_answer(row: Row, data: dict[str, Any], ended_with: Any) -> Any:
    """The right answer, now in `data` as expected_answer, and no more under the name that it had."""
    expected = expected_answer(row, {})
    if expected is None:
        expected = ended_with
    if expected is None:
        return None
    name = next((name for name in ANSWER_KEYS if row.get(name) is not None), None)
    if name:
        data.pop(name, None)
    data["expected_answer"] = expected
    return expected


def _with_system(messages: list[Message], row: Row) -> list[Message]:
    """The column `system`, which a source's fields may name, as the first message."""
    if row.get("system") is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": as_text(row, "system")}, *messages]


# Pieces -------------------------------------------------------------------------------------------------------------


@cache
def _checker(environment: str) -> Callable[[Row], str]:
    """Why an environment cannot score a row; empty if it can."""
    if not environment:
        return _has_answer
    if environment.startswith("python:") or environment in _ASK_NOTHING:
        return lambda row: ""
    if environment not in ENVIRONMENTS:
        return lambda row: f"there is no environment {environment}"
    module = import_module(f"nemotron_launch.trainer.environments.{environment}")
    if environment == "code":

        def has_tests(row: Row) -> str:
            try:
                module.tests_of(row)
            except ValueError as error:
                return str(error)
            return ""

        return has_tests
    problem: Callable[[Row], str] = module.problem
    return lambda row: f"{said} (environment {environment})" if (said := problem(row)) else ""


def _has_answer(row: Row) -> str:
    """For rows of no environment: which one scores them is for the config of the step to say."""
    return "" if row.get("expected_answer") is not None else f"missing key {' or '.join(ANSWER_KEYS)}"


def _short(messages: list[Message]) -> Any:
    """One message of the user's as its text, others as they are."""
    only = messages[0]
    if len(messages) == 1 and only["role"] == "user" and len(only) == 2:
        return only["content"]
    return messages


def _answer(message: Message) -> Any:
    return message["content"] if len(message) == 2 else [message]


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    text: str = message["content"]
    return f"{text}\n{_plain(calls)}" if calls else text


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


_MAKERS: Mapping[str, Callable[[dict[str, Any], Source], Prepared]] = {
    "dpo": _dpo,
    "rlvr": _rlvr,
    "rlhf": _rlhf,
    "gym": _gym,
    "sft": _sft,
}
