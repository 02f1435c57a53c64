"""Rows of conversations to imitate: messages, or a prompt with its response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_launch.trainer.data.messages import as_messages, as_text, is_answered
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.tokenizer import Message

#: Keys of a prompt and its response, ours and NeMo-RL's: either is read where a section names no others.
_PROMPT_KEYS = (("prompt", "response"), ("input", "output"))


@dataclass(frozen=True, slots=True)
class Form:
    """How the rows of a section are read; the fields are the section's keys, see `load_sft`."""

    chat_key: str
    input_key: str
    output_key: str
    system_key: str | None
    tool_key: str | None


def form_of(section: Mapping[str, Any]) -> Form:
    return Form(
        chat_key=section.get("chat_key") or "messages",
        input_key=section.get("input_key") or "prompt",
        output_key=section.get("output_key") or "response",
        system_key=section.get("system_key"),
        tool_key=section.get("tool_key", "tools"),
    )


def conversation(row: Mapping[str, Any], form: Form) -> list[Message]:
    """The row's messages, the last one the assistant's. Raises BadRow."""
    if row.get(form.chat_key) is not None:
        messages = as_messages(row[form.chat_key], form.chat_key)
    else:
        named = (form.input_key, form.output_key)
        known = _PROMPT_KEYS if named in _PROMPT_KEYS else (named,)
        prompt_key, answer_key = next((keys for keys in known if row.get(keys[0]) is not None), named)
        if row.get(prompt_key) is None:
            raise BadRow(f"missing key {form.chat_key} or {prompt_key}")
        prompt = row[prompt_key]
        asked = as_messages(prompt, prompt_key) if isinstance(prompt, list) else None
        asked = asked or [{"role": "user", "content": as_text(row, prompt_key)}]
        messages = [*asked, {"role": "assistant", "content": as_text(row, answer_key)}]
    if form.system_key and row.get(form.system_key) is not None:
        messages = [{"role": "system", "content": as_text(row, form.system_key)}, *messages]
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's")
    if not is_answered(messages[-1]):
        raise BadRow("empty completion")
    return messages
