"""Conversations: rows' values checked and made plain, and their text cut into what is given and what is answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.paths import resolve_path
from nemotron_launch.trainer.tokenizer import Message, Tokenizer

T = TypeVar("T")

#: A template that breaks its own prefix in one of so many rows at the start is refused; later ones count as bad rows.
FIRST_ROWS = 8

#: Tokens of a message that an overlong sequence keeps, as in NeMo-RL: the batch keeps its shape, the loss ignores them.
OVERLONG_TOKENS = 4


class TemplateBreaksPrefix(BadRow):
    """The chat template writes a conversation's beginning differently once more follows."""


def as_text(row: Mapping[str, Any], key: str) -> str:
    """The text under a key. Raises BadRow."""
    value = row.get(key)
    if value is None:
        raise BadRow(f"missing key {key}")
    if not isinstance(value, str):
        raise BadRow(f"{key} is {_kind(value)}, not text")
    return value


def as_messages(value: Any, key: str) -> list[Message]:
    """A list of messages, each with a role and text. Keys whose value is None (columns of other rows) are dropped.

    Content in parts (`[{"type": "text", "text": …}]`) becomes one text. Raises BadRow.
    """
    if not isinstance(value, list):
        raise BadRow(f"{key} is {_kind(value)}, not a list of messages")
    return [_as_message(message, key) for message in value]


def _as_message(message: Any, key: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(f"{key} holds {_kind(message)}, not a message")
    plain = {name: value for name, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise BadRow(f"a message of {key} has no role")
    content = plain.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise BadRow(f"a message of {key} holds more than text")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None and plain.get("tool_calls"):
        plain["content"] = ""
    elif not isinstance(content, str):
        raise BadRow(f"a message of {key} has no text")
    return plain


def is_answered(message: Message) -> bool:
    """Whether a message says anything: text that is not blank, or tool calls."""
    return bool(message["content"].strip() or message.get("tool_calls"))


@dataclass(frozen=True)
class Framing:
    """What a data section puts around every conversation. question: a text in which {} is the first user message."""

    system: str | None = None
    question: str | None = None

    def around(self, messages: list[Message]) -> list[Message]:
        """The messages with the question filled in, and the system message in front where there is none."""
        if self.question is not None:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is not None:
                asked = {**messages[first], "content": self.question.format(messages[first]["content"])}
                messages = [*messages[:first], asked, *messages[first + 1 :]]
        if self.system and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages


def load_framing(section: Mapping[str, Any], tokenizer: Tokenizer, step_dir: Path | None, key: str) -> Framing:
    """A section's `system_prompt` (or `system_prompt_file`) and `prompt_file`. Raises UserError for unusable ones."""

    def text(name: str) -> str | None:
        if not section.get(name):
            return None
        path = resolve_path(section[name], step_dir, f"{key}.{name}")
        if not path.is_file():
            raise UserError(f"no such file: {path}", where=f"{key}.{name}")
        return path.read_text(encoding="utf-8")

    question = text("prompt_file")
    if question is not None:
        try:
            question.format("")
        except (IndexError, KeyError, ValueError) as error:
            raise UserError(
                f"{section['prompt_file']} is no prompt template ({type(error).__name__}: {error})",
                where=f"{key}.prompt_file",
                hint="{} stands for the prompt; write other braces twice",
            ) from error
    system = section.get("system_prompt") or text("system_prompt_file")
    if (system or section.get("system_key")) and not tokenizer.has_chat_template:
        raise UserError(
            "a system prompt needs a chat template",
            where=key,
            hint="set policy.tokenizer.chat_template, or leave the system prompt out",
        )
    return Framing(system, question)


def plain_text(messages: Sequence[Message]) -> str:
    """The text of one message, for a tokenizer without a chat template. Raises BadRow for several messages."""
    if len(messages) > 1:
        raise BadRow("several messages, but the tokenizer has no chat template")
    return "".join(message["content"] for message in messages)


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
    """The chat template's text. Raises BadRow where the template refuses the messages."""
    from jinja2 import TemplateError

    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadRow(f"the chat template refuses the messages ({first[:100]})") from error


def rest_of(full: str, prefix: str) -> str:
    """What `full` adds to `prefix`. Raises TemplateBreaksPrefix if it does not begin with it."""
    if full.startswith(prefix):
        return full[len(prefix) :]
    at = next((i for i, (a, b) in enumerate(zip(full, prefix, strict=False)) if a != b), min(len(full), len(prefix)))
    raise TemplateBreaksPrefix(
        f"the chat template does not extend its own prefix: {prefix[at - 20 if at > 20 else 0 : at + 20]!r} "
        f"becomes {full[at - 20 if at > 20 else 0 : at + 20]!r}"
    )


def refuse_template(problem: TemplateBreaksPrefix, place: str) -> UserError:
    return UserError(
        str(problem),
        where="policy.tokenizer.chat_template",
        hint=f"first seen at {place}; an answer's tokens cannot be told from its prompt's with this template",
    )


def closed(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Ids ending in EOS: appended unless it is there."""
    return ids if ids.size and ids[-1] == eos_id else np.append(ids, np.int32(eos_id))


def opened(ids: np.ndarray, bos_id: int | None) -> np.ndarray:
    """Ids beginning with BOS, where the tokenizer has one: put in front unless it is there."""
    return ids if bos_id is None or (ids.size and ids[0] == bos_id) else np.insert(ids, 0, np.int32(bos_id))


def overlong_share(messages: int, max_length: int) -> int:
    """Tokens that each of so many messages keeps in an overlong sequence; at least 1, so that no sequence is empty."""
    return max(1, min(OVERLONG_TOKENS, max_length // max(messages, 1)))


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__) if value is not None else "null"
