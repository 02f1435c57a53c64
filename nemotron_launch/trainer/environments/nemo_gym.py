"""The environment nemo_gym: answers are verified by NeMo Gym's resource servers, over HTTP.

The trainer samples the answers itself; each then goes to its agent's resource server as the Responses API has it:
`/seed_session` with the row, `/verify` with the row and the response. Whatever a server does, it costs its rows only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.environments.answers import without_thoughts
from nemotron_launch.trainer.environments.bad_rows import refuse_bad_rows
from nemotron_launch.trainer.environments.gym_servers import Failed, Servers
from nemotron_launch.trainer.environments.tool_calls import NoCall, calls_of, words_beside

_PARAMS = "responses_create_params"
# What a request for a response may hold; a server answers 422 to anything else.
_KNOWN_PARAMS = frozenset(
    ("background", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "model")
    + ("parallel_tool_calls", "previous_response_id", "prompt", "reasoning", "service_tier", "store", "temperature")
    + ("text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user", "stream")
)
#: Rows of different fields that are tried on the servers before the first rollout.
_TRIED = 32

Post = Callable[[str, Any], Any]


class NemoGymEnvironment:
    """Scores by resource servers; section: `env.nemo_gym`."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._servers = Servers(section)
        self._threads = section["concurrency"]
        self._known: set[str] = set()

    def problems(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """For each row why it cannot be scored; empty if it can. Waits for the servers. Raises UserError without them.

        The first rows of each kind are verified with an empty answer, to see whether the server can read them.
        """
        found = [_problem(row) for row in rows]
        agents = {_agent(row) for row, problem in zip(rows, found, strict=True) if not problem}
        self._await(agents)
        tried: dict[tuple[str, ...], str] = {}
        for i, row in enumerate(rows):
            if found[i]:
                continue
            if self._servers.find(_agent(row)) is None:
                found[i] = self._unknown(_agent(row))
                continue
            kind = (_agent(row), *sorted(key for key, value in row.items() if value is not None))
            if kind not in tried and len(tried) < _TRIED:
                tried[kind] = self._try(row)
            found[i] = tried.get(kind, "")
        return found

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Raise UserError for rows that cannot be scored, and where a server is not ready."""
        refuse_bad_rows(self.problems(rows), wheres)

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """The scores. Where a server brings no reward, in time and after all tries, the rollout is lost."""
        rollouts = [rollout for group in groups for rollout in group]
        self._servers.go_on()
        agents = {_agent(rollout.row) for rollout in rollouts} - self._known - {""}
        if agents:  # rows that nobody checked
            self._await(agents)
        with ThreadPoolExecutor(max(1, min(self._threads, len(rollouts))), "nemo_gym") as threads:
            try:
                scores = iter(list(threads.map(self._score, rollouts)))
            except BaseException:  # a signal's handler may have raised
                self._servers.stop()
                threads.shutdown(cancel_futures=True)
                raise
        return [[next(scores) for _ in group] for group in groups]

    def close(self) -> None:
        """Give up what still waits. Servers that the run's services started end with the run."""
        self._servers.close()

    def _await(self, agents: set[str]) -> None:
        self._servers.await_ready(sorted(agents))
        self._known |= agents

    def _score(self, rollout: Rollout) -> Score:
        started = time.perf_counter()
        try:
            score = self._verify(rollout)
        except Failed as problem:
            score = Score(0.0, error=f"{_agent(rollout.row)}: {problem}", lost=True)
        return replace(score, seconds=time.perf_counter() - started)

    def _verify(self, rollout: Rollout) -> Score:
        if problem := _problem(rollout.row):
            raise Failed(problem, final=True)
        server = self._servers.find(_agent(rollout.row))
        if server is None:
            raise Failed(self._unknown(_agent(rollout.row)), final=True)
        # Nulls elsewhere may mean something; among the parameters they are the columns of other rows.
        request = {**rollout.row, _PARAMS: _without_nulls(rollout.row[_PARAMS])}
        request.pop("env_name", None)

        def visit(post: Post) -> Score:
            post("/seed_session", request)
            return _reading(post("/verify", {**request, "response": response_of(rollout)}))

        score: Score = self._servers.ask(server, visit, seed=repr(rollout.key))
        return score

    def _try(self, row: Mapping[str, Any]) -> str:
        """What a server says against a row's fields."""
        try:
            self._verify(Rollout((), "", row, key=(0,)))
        except Failed as problem:
            return str(problem) if " 422" in str(problem) else ""
        return ""

    def _unknown(self, agent: str) -> str:
        names = self._servers.names()
        near = get_close_matches(agent, names, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
        return f"agent_ref.name is {agent}, which no server is for; {known}"


def response_of(rollout: Rollout) -> dict[str, Any]:
    """An answer as a response of the Responses API: reasoning, message, and function calls where tools were given."""
    name = "_".join(str(part) for part in rollout.key) or "0"
    text = without_thoughts(rollout.text)
    status = "incomplete" if rollout.truncated else "completed"
    params = rollout.row[_PARAMS]
    output: list[dict[str, Any]] = []
    if text != rollout.text:
        thought = rollout.text.removesuffix(text).strip().removeprefix("<think>").removesuffix("</think>").strip()
        summary = [{"type": "summary_text", "text": thought}]
        output.append({"type": "reasoning", "id": f"rs_{name}", "summary": summary, "status": "completed"})
    calls = []
    if params.get("tools"):
        try:
            calls = calls_of(rollout.text)
        except NoCall:  # then it is text, and the server will not like it
            calls = []
    words = words_beside(rollout.text) if calls else text
    if words or not calls:
        content = [{"type": "output_text", "text": words, "annotations": []}]
        output.append(
            {"type": "message", "id": f"msg_{name}", "role": "assistant", "status": status, "content": content}
        )
    for number, call in enumerate(calls):
        arguments = json.dumps(call.arguments)
        names = {"id": f"fc_{name}_{number}", "call_id": f"call_{name}_{number}", "name": call.name}
        output.append({"type": "function_call", **names, "arguments": arguments, "status": "completed"})
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": 0,
        "model": "policy",
        "output": output,
        "parallel_tool_calls": params.get("parallel_tool_calls", True),
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
        "incomplete_details": {"reason": "max_output_tokens"} if rollout.truncated else None,
    }


def _reading(reply: Any) -> Score:
    """The reward in a reply to /verify. Raises Failed for a reply without one."""
    reward: Any = reply.get("reward") if isinstance(reply, Mapping) else None
    if not _is_number(reward):
        raise Failed(f"/verify answers without a reward that is a number ({str(reward)[:40]})")
    parts = reply.get("reward_components")
    named: Mapping[str, Any] = parts if isinstance(parts, Mapping) else {}
    components = {name: float(value) for name, value in named.items() if _is_number(value)}
    if reply.get("mask_sample"):
        return Score(0.0, error="the server says that the sample does not count", lost=True)
    return Score(float(reward), components=components)


def _without_nulls(value: Any) -> Any:
    """A cell without the keys that only other rows of its table have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _problem(row: Mapping[str, Any]) -> str:
    """What is wrong with a row's shape."""
    params = row.get(_PARAMS)
    if params is None:
        return f"missing key {_PARAMS}"
    if not isinstance(params, Mapping):
        return f"{_PARAMS} is not an object"
    asked = params.get("input")
    if asked is None or asked in ("", []):
        return f"missing key {_PARAMS}.input"
    if not isinstance(asked, str) and not (
        isinstance(asked, list) and all(isinstance(item, Mapping) for item in asked)
    ):
        return f"{_PARAMS}.input is neither text nor a list of messages"
    unknown = sorted(key for key, value in params.items() if value is not None and key not in _KNOWN_PARAMS)
    if unknown:
        near = get_close_matches(unknown[0], _KNOWN_PARAMS, n=1)
        return f"unknown key {_PARAMS}.{unknown[0]}" + (f"; did you mean {near[0]}?" if near else "")
    return "" if _agent(row) else "missing key agent_ref.name"


def _agent(row: Mapping[str, Any]) -> str:
    agent = row.get("agent_ref")
    name = agent.get("name") if isinstance(agent, Mapping) else agent
    return name if isinstance(name, str) else ""
