"""Rows of prompts in NeMo-RL's, NeMo Gym's or a public dataset's shape: what is asked, and the right answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_launch.trainer.data.messages import as_messages
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.tokenizer import Message

#: Columns of the prompt and of the right answer, the first that a row has, where the section names none.
PROMPT_KEYS = ("messages", "prompt", "question", "problem", "input")
ANSWER_KEYS = ("expected_answer", "answer", "ground_truth", "output")
GYM_KEY = "responses_create_params"
AGENTS = "responses_api_agents"

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True)
class GymRows:
    """How rows become NeMo Gym's. default_agent: of rows that name none, `{type, name}`."""

    default_agent: Mapping[str, str] | None = None

    @staticmethod
    def of(config: Mapping[str, Any]) -> GymRows | None:
        """As a composed config says; None where NeMo Gym does not score."""
        if not config["env"]["should_use_nemo_gym"]:
            return None
        default = config["data"].get("default_agent_ref")
        return GymRows({"type": AGENTS, "name": default} if isinstance(default, str) else default)


def asked(data: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """The prompt as messages, and the answer that a conversation ended with, which is not part of it."""
    params = responses_params(data)
    if params is not None:
        key, value = f"{GYM_KEY}.input", params.get("input")
    else:
        named = section.get("input_key")
        key = named or next((name for name in PROMPT_KEYS if data.get(name) is not None), "")
        if not key or data.get(key) is None:
            raise BadRow(f"missing key {named or ' or '.join(PROMPT_KEYS)}")
        value = data[key]
    if isinstance(value, str):
        messages: list[Message] = [{"role": "user", "content": value}]
    else:
        messages = as_messages([of_sharegpt(item) for item in value] if isinstance(value, list) else value, key)
    if params is not None and isinstance(params.get("instructions"), str):
        messages = [{"role": "system", "content": params["instructions"]}, *messages]
    answer = None
    while messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if not messages or not any(message["content"].strip() for message in messages):
        raise BadRow(f"{key} asks nothing")
    return messages, answer


def of_sharegpt(message: Any) -> Any:
    """A message of the form {from, value} as {role, content}; others as they are."""
    if not isinstance(message, Mapping) or not isinstance(message.get("from"), str) or message.get("role"):
        return message
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {**rest, "role": _ROLES.get(message["from"], message["from"]), "content": message.get("value")}


def expected_answer(data: Mapping[str, Any], section: Mapping[str, Any]) -> Any:
    """The right answer, from the column that is named, or from where it usually is."""
    named = section.get("output_key")
    if named:
        if data.get(named) is None:
            raise BadRow(f"missing key {named}")
        return data[named]
    for name in ANSWER_KEYS:
        if data.get(name) is not None:
            return data[name]
    for outer in ("extra_env_info", "reward_model"):
        inner = data.get(outer)
        if isinstance(inner, Mapping) and inner.get("ground_truth") is not None:
            return inner["ground_truth"]
    return None


def responses_params(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's own `responses_create_params`, wherever NeMo Gym's tools put them."""
    params = data.get(GYM_KEY)
    if params is None and isinstance(data.get("extra_env_info"), Mapping):
        params = data["extra_env_info"].get(GYM_KEY)
    if isinstance(params, str):
        try:
            params = json.loads(params)
        except ValueError as error:
            raise BadRow(f"{GYM_KEY} is not valid JSON") from error
    if params is not None and not isinstance(params, Mapping):
        raise BadRow(f"{GYM_KEY} is not an object")
    if params is not None and params.get("input") is None:
        raise BadRow(f"missing key {GYM_KEY}.input")
    return params


def gym_fields(data: Mapping[str, Any], messages: Sequence[Message], gym: GymRows) -> dict[str, Any]:
    """What NeMo Gym needs in a row: the request for an answer, and the agent that scores it."""
    params = dict(responses_params(data) or {})
    # What was asked in truth, with the section's system message and template.
    params["input"] = [dict(message) for message in messages]
    params.pop("instructions", None)
    if data.get("tools") is not None:
        params.setdefault("tools", data["tools"])
    agent = data.get("agent_ref")
    if isinstance(agent, str):
        agent = {"type": AGENTS, "name": agent}
    agent = agent if agent is not None else gym.default_agent
    if agent is None:
        raise BadRow("missing key agent_ref, and data.default_agent_ref is not set")
    if not isinstance(agent, Mapping) or not isinstance(agent.get("name"), str):
        raise BadRow("agent_ref has no name")
    return {GYM_KEY: params, "agent_ref": {"type": AGENTS, **agent}}


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools that the model is told of, as chat templates want them: {type, function: {name, …}}."""
    params = row.get(GYM_KEY)
    tools = row.get("tools") or (params.get("tools") if isinstance(params, Mapping) else None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow("tools is not valid JSON") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools is not a list of objects")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": _without_type(tool)}
        for tool in tools
    ]


def _without_type(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tool.items() if name not in ("type", "strict") and value is not None}
