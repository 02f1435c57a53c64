"""Rows of preference pairs, whatever their format: the conversation so far, the better answer and the worse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.messages import as_messages, as_text
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.tokenizer import Message


@dataclass(frozen=True, slots=True)
class Answers:
    """A row, whatever its format: the conversation so far and two assistant messages."""

    context: list[Message]
    chosen: Message
    rejected: Message
    tools: Any = None


def preference_format(section: Mapping[str, Any], key: str) -> Callable[[Mapping[str, Any]], Answers]:
    """What reads a row of a section's format: `dataset_name`, or each row's columns tell. It raises BadRow.

    Raises UserError for a format that nobody knows; `key` is the section's.
    """
    keys = [str(section.get(f"{name}_key") or name) for name in ("prompt", "chosen", "rejected")]

    def binary(row: Mapping[str, Any]) -> Answers:
        return _binary(row, *keys)

    def either(row: Mapping[str, Any]) -> Answers:
        if row.get("completions") is not None:
            return _ranked(row)
        return _help_steer_3(row) if row.get("overall_preference") is not None else binary(row)

    formats = {
        "PreferenceDataset": _ranked,
        "BinaryPreferenceDataset": binary,
        "HelpSteer3": _help_steer_3,
        "Tulu3Preference": _tulu_3,
    }
    name = section.get("dataset_name")
    if name and name not in formats:
        raise UserError(
            f"no preference format is called {name}",
            where=f"{key}.dataset_name",
            hint=f"known are {', '.join(formats)}",
        )
    return formats[name] if name else either


def _binary(row: Mapping[str, Any], prompt_key: str, chosen_key: str, rejected_key: str) -> Answers:
    """{prompt, chosen, rejected}: texts or messages; answers may also be whole conversations."""
    chosen, rejected = _answer(row, chosen_key), _answer(row, rejected_key)
    prompt = row.get(prompt_key)
    context = None if prompt is None else _context(prompt, prompt_key)
    if not _is_conversation(chosen) and not _is_conversation(rejected):
        if context is None:
            raise BadRow(f"missing key {prompt_key}")
        return _shared(context, chosen, rejected, row)
    if context is not None and chosen[-1 - len(context) : -1] != context:
        raise BadRow(f"{prompt_key} is not what the conversation in {chosen_key} answers")
    return _shared([], chosen, rejected, row)


def _ranked(row: Mapping[str, Any]) -> Answers:
    """{context, completions: [{rank, completion}, {rank, completion}]}: the lower rank is chosen."""
    completions = row.get("completions")
    if completions is None:
        raise BadRow("missing key completions")
    if not isinstance(completions, list) or not all(isinstance(one, Mapping) for one in completions):
        raise BadRow("completions is not a list of objects")
    if len(completions) != 2:
        raise BadRow(f"{len(completions)} completions, not two")
    ranks = [one.get("rank") for one in completions]
    if not all(isinstance(rank, int | float) for rank in ranks):
        raise BadRow("a completion has no rank")
    if ranks[0] == ranks[1]:
        raise BadRow("tie")
    if row.get("context") is None:
        raise BadRow("missing key context")
    chosen, rejected = sorted(completions, key=lambda one: one["rank"])
    context = _context(row["context"], "context")
    return _shared(context, _answer(chosen, "completion"), _answer(rejected, "completion"), row)


def _help_steer_3(row: Mapping[str, Any]) -> Answers:
    """{context, response1, response2, overall_preference}: below 0 the first is chosen, above 0 the second."""
    preference = row.get("overall_preference")
    if not isinstance(preference, int | float):
        raise BadRow("overall_preference is missing or no number")
    if preference == 0:
        raise BadRow("tie")
    if row.get("context") is None:
        raise BadRow("missing key context")
    first, second = _answer(row, "response1"), _answer(row, "response2")
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    return _shared(_context(row["context"], "context"), chosen, rejected, row)


def _tulu_3(row: Mapping[str, Any]) -> Answers:
    """{chosen, rejected}: whole conversations; the prompt column, a single text, is not read."""
    return _shared([], _answer(row, "chosen"), _answer(row, "rejected"), row)


def _context(value: Any, key: str) -> list[Message]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else as_messages(value, key)


def _answer(row: Mapping[str, Any], key: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, list):
        return as_messages(value, key)
    return [{"role": "assistant", "content": as_text(row, key)}]


def _is_conversation(messages: list[Message]) -> bool:
    return len(messages) > 1 and messages[0]["role"] != "assistant"


def _shared(context: list[Message], chosen: list[Message], rejected: list[Message], row: Mapping[str, Any]) -> Answers:
    """The pair behind what both answers begin with; each must then be one message of the assistant's."""
    if not chosen or not rejected:
        raise BadRow("empty completion")
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    context, chosen, rejected = [*context, *chosen[:same]], chosen[same:], rejected[same:]
    if len(chosen) > 1 or len(rejected) > 1:
        raise BadRow("chosen and rejected differ before their last message")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise BadRow("an answer is not the assistant's")
    if not context:
        raise BadRow("no prompt before the answers")
    return Answers(context, chosen[0], rejected[0], row.get("tools"))
