"""Prompts for rollouts: rows in NeMo-RL's, NeMo Gym's or a public dataset's shape, as token ids and what scores them.

Which of a row's columns is the prompt, and which the right answer, is told by their names; what an environment
verifies by stays in the row as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.trainer.data.messages import (
    Framing,
    chunked,
    load_framing,
    opened,
    plain_text,
    render,
)
from nemotron_launch.trainer.data.prompt_rows import GymRows, asked, expected_answer, gym_fields, tools_of
from nemotron_launch.trainer.data.sources import BadRow, BadRows, Row, read_rows
from nemotron_launch.trainer.tokenizer import Message, Tokenizer

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt, and what its answers are scored by.

    ids: token ids (int32), up to where the answer begins. messages: the same as a conversation. row: the dataset's row
    with `env_name`, `expected_answer` and, for NeMo Gym, `responses_create_params` and `agent_ref` filled in where they
    could be had. source: file and line.
    """

    ids: np.ndarray
    messages: Sequence[Message]
    row: Mapping[str, Any]
    source: str


def load_prompts(
    section: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    max_length: int,
    gym: GymRows | None = None,
    step_dir: Path | None = None,
    max_bad_rows: float = 0.0,
    key: str = "data.train",
) -> tuple[list[Prompt], BadRows]:
    """All prompts of one data section in file order, `repeat` times each in a row, and what was left out.

    section: where the rows are (see `read_rows`) and `input_key`, `output_key`, `env_name`, `prompt_file`,
    `system_prompt_file`, `repeat`. max_length: tokens of the longest prompt; longer ones are left out as bad rows.
    max_bad_rows: share (0 to 1) of unusable rows above which UserError is raised. A row's own `env_name` wins over the
    section's. Whether a row has what its environment verifies by is for `Environment.check` to say.
    """
    framing = load_framing(section, tokenizer, step_dir, key)
    bad = BadRows()
    prompts: list[Prompt] = []
    rows = read_rows(section, step_dir=step_dir, key=key)
    for chunk in chunked(_conversations(rows, section, framing, tokenizer, gym, bad), _ROWS_AT_ONCE):
        encoded = tokenizer.encode_batch([text for text, _ in chunk])
        for ids, (_, prompt) in zip(encoded, chunk, strict=True):
            ids = opened(ids, tokenizer.bos_id)
            if not len(ids):
                bad.add("the prompt is empty", prompt.source)
            elif len(ids) > max_length:
                bad.add(f"the prompt is longer than {max_length} tokens (data.max_input_seq_length)", prompt.source)
            else:
                prompts.append(replace(prompt, ids=ids))
    bad.stop_if_too_many(max_bad_rows, key=key)
    return [prompt for prompt in prompts for _ in range(section.get("repeat") or 1)], bad


def _conversations(
    rows: Iterator[Row],
    section: Mapping[str, Any],
    framing: Framing,
    tokenizer: Tokenizer,
    gym: GymRows | None,
    bad: BadRows,
) -> Iterator[tuple[str, Prompt]]:
    """Each usable row's text, and its prompt still without ids."""
    for row in rows:
        bad.total += 1
        try:
            if row.data is None:
                raise BadRow(row.problem)
            prompt = _prompt(row.data, row.place, section, framing, gym)
            tools = tools_of(prompt.row)
            text = (
                render(tokenizer, prompt.messages, add_generation_prompt=True, tools=tools)
                if tokenizer.has_chat_template
                else plain_text(prompt.messages)
            )
        except BadRow as problem:
            bad.add(str(problem), row.place)
            continue
        yield text, prompt


def _prompt(
    data: Mapping[str, Any], place: str, section: Mapping[str, Any], framing: Framing, gym: GymRows | None
) -> Prompt:
    messages, answer = asked(data, section)
    messages = framing.around(messages)
    row = dict(data)
    if (expected := expected_answer(data, section)) is None:
        expected = answer
    if expected is not None:
        row["expected_answer"] = expected
    name = data.get("env_name") or section.get("env_name")
    if gym is not None:
        row |= gym_fields(data, messages, gym)
        name = name or "nemo_gym"
    if name is not None:
        row["env_name"] = name
    return Prompt(np.empty(0, np.int32), messages, row, place)
