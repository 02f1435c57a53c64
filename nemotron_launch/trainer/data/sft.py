"""Examples for supervised fine-tuning: conversations or prompt and response, as token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.messages import (
    FIRST_ROWS,
    Framing,
    TemplateBreaksPrefix,
    chunked,
    closed,
    load_framing,
    opened,
    overlong_share,
    plain_text,
    refuse_template,
    render,
    rest_of,
)
from nemotron_launch.trainer.data.sft_rows import Form, conversation, form_of
from nemotron_launch.trainer.data.sources import BadRow, BadRows, Row, read_rows
from nemotron_launch.trainer.tokenizer import Message, Tokenizer

_FORMATS = ("ResponseDataset", "openai_format")

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SFTExample:
    """One conversation as token ids (int32) and a 0/1 mask (uint8) of the same length over the tokens of the loss.

    prompt_len: tokens before the last assistant turn's answer, its header included (what a generator is given).
    overlong: longer than the limit, cut to a stub whose mask is 0; it counts in its batch but in no norm.
    source: file and line.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    prompt_len: int
    source: str
    overlong: bool = False


@dataclass(frozen=True, slots=True)
class _Texts:
    """A conversation cut into pieces that are tokenised apart; the last one is the last assistant turn's answer."""

    source: str
    messages: int
    pieces: tuple[str, ...]
    in_loss: tuple[bool, ...]


def load_sft(
    section: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    max_length: int,
    step_dir: Path | None = None,
    max_bad_rows: float = 0.0,
    add_bos: bool = True,
    add_eos: bool = True,
    add_generation_prompt: bool = False,
    key: str = "data.train",
) -> tuple[list[SFTExample], BadRows]:
    """All examples of one data section, in file order, and what was left out.

    section: where the rows are (see `read_rows`), and their keys: `chat_key` (default messages) with `tool_key`
    (default tools), or `input_key` and `output_key` (default prompt and response, else input and output);
    `system_key` names a column with the system message; `system_prompt` (or `system_prompt_file`) is one for rows
    without, `prompt_file` a text around the first user message, see `Framing`.
    max_length: tokens of the longest sequence. max_bad_rows: share (0 to 1) of unusable rows above which UserError is
    raised. add_bos, add_eos: put BOS first and EOS last where absent.

    Every assistant turn is in the loss, closing token and EOS included, nothing else (NeMo-RL's roles_to_train_on
    [assistant]). As there, the assistant's header that the template writes is in the loss too, unless
    add_generation_prompt makes it part of what was asked. Overlong examples keep at most 4 tokens a message, out of
    the loss.
    """
    name = section.get("dataset_name")
    if name and name not in _FORMATS:
        raise UserError(
            f"no SFT format is called {name}", where=f"{key}.dataset_name", hint=f"known are {', '.join(_FORMATS)}"
        )
    form = form_of(section)
    framing = load_framing(section, tokenizer, step_dir, key)
    bad = BadRows()
    examples: list[SFTExample] = []
    rows = read_rows(section, step_dir=step_dir, key=key)
    for chunk in chunked(_texts(rows, form, framing, tokenizer, not add_generation_prompt, bad), _ROWS_AT_ONCE):
        ids = iter(tokenizer.encode_batch([piece for texts in chunk for piece in texts.pieces]))
        for texts in chunk:
            pieces = [next(ids) for _ in texts.pieces]
            try:
                examples.append(_example(texts, pieces, tokenizer, max_length, add_bos=add_bos, add_eos=add_eos))
            except BadRow as problem:
                bad.add(str(problem), texts.source)
    bad.overlong = sum(example.overlong for example in examples)
    bad.stop_if_too_many(max_bad_rows, key=key)
    return examples, bad


def _texts(
    rows: Iterator[Row], form: Form, framing: Framing, tokenizer: Tokenizer, header_in_loss: bool, bad: BadRows
) -> Iterator[_Texts]:
    for row in rows:
        bad.total += 1
        try:
            if row.data is None:
                raise BadRow(row.problem)
            messages = framing.around(conversation(row.data, form))
            if tokenizer.has_chat_template:
                tools = row.data.get(form.tool_key) if form.tool_key else None
                yield _templated(messages, tools, tokenizer, header_in_loss, row.place)
            else:
                prompt, answer = plain_text(messages[:-1]), plain_text(messages[-1:])
                yield _Texts(row.place, len(messages), (prompt, answer.rstrip("\n")), (False, True))
        except TemplateBreaksPrefix as problem:
            if bad.total <= FIRST_ROWS:
                raise refuse_template(problem, row.place) from problem
            bad.add("the chat template does not extend its own prefix", row.place)
        except BadRow as problem:
            bad.add(str(problem), row.place)


def _templated(messages: list[Message], tools: Any, tokenizer: Tokenizer, header_in_loss: bool, place: str) -> _Texts:
    """Pieces at the bounds of each assistant turn: what came before, the turn's header, the turn."""
    full = render(tokenizer, messages, add_generation_prompt=False, tools=tools)
    pieces: list[str] = []
    in_loss: list[bool] = []
    done = ""

    def cut(prefix: str, loss: bool) -> None:
        nonlocal done
        rest_of(full, prefix)
        pieces.append(rest_of(prefix, done))
        in_loss.append(loss)
        done = prefix

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i:
            cut(render(tokenizer, messages[:i], add_generation_prompt=False, tools=tools), False)
            cut(render(tokenizer, messages[:i], add_generation_prompt=True, tools=tools), header_in_loss)
        last = i == len(messages) - 1
        cut(full if last else render(tokenizer, messages[: i + 1], add_generation_prompt=False, tools=tools), True)
    pieces[-1] = pieces[-1].rstrip("\n")
    return _Texts(place, len(messages), tuple(pieces), tuple(in_loss))


def _example(
    texts: _Texts, pieces: list[np.ndarray], tokenizer: Tokenizer, max_length: int, *, add_bos: bool, add_eos: bool
) -> SFTExample:
    if add_bos:
        pieces[0] = opened(pieces[0], tokenizer.bos_id)
    if add_eos:
        pieces[-1] = closed(pieces[-1], tokenizer.eos_id)
    ids = np.concatenate(pieces)
    mask = np.repeat(np.array(texts.in_loss, np.uint8), [piece.size for piece in pieces])
    prompt_len = int(ids.size - pieces[-1].size)
    if prompt_len > max_length:
        raise BadRow(f"prompt longer than the limit of {max_length} tokens")
    if mask[1:].sum() == 0:
        raise BadRow("no token for the loss")
    if ids.size <= max_length:
        return SFTExample(ids, mask, prompt_len, texts.source)
    kept = min(overlong_share(texts.messages, max_length) * texts.messages, max_length)
    stub = ids[:kept].copy()
    return SFTExample(stub, np.zeros(stub.size, np.uint8), min(prompt_len, stub.size), texts.source, overlong=True)
