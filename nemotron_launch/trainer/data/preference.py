"""Preference pairs for DPO: rows of several formats to token ids of a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.trainer.data.messages import (
    FIRST_ROWS,
    Framing,
    TemplateBreaksPrefix,
    chunked,
    closed,
    is_answered,
    load_framing,
    opened,
    overlong_share,
    plain_text,
    refuse_template,
    render,
    rest_of,
)
from nemotron_launch.trainer.data.preference_rows import Answers, preference_format
from nemotron_launch.trainer.data.sources import BadRow, BadRows, Row, read_rows
from nemotron_launch.trainer.tokenizer import Tokenizer

#: Rows whose texts go to the tokenizer at once: enough to keep its threads busy, few enough to stay small in memory.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePair:
    """One prompt with two answers, as token ids (int32).

    chosen_ids and rejected_ids both begin with the same `prompt_len` tokens (at least 1: BOS and the template's
    assistant header count as prompt); the rest is the answer with its EOS, and is what the loss is about. overlong:
    one of them was longer than the limit, both are cut to a stub, and the pair counts in its batch but in no norm.
    source: file and line.
    """

    prompt_len: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    source: str
    overlong: bool = False

    @property
    def prompt_ids(self) -> np.ndarray:
        return self.chosen_ids[: self.prompt_len]

    @property
    def chosen_answer(self) -> np.ndarray:
        return self.chosen_ids[self.prompt_len :]

    @property
    def rejected_answer(self) -> np.ndarray:
        return self.rejected_ids[self.prompt_len :]


@dataclass(frozen=True, slots=True)
class _Texts:
    """A pair between the row and its ids. messages: how many each conversation has, for the cut of overlong ones."""

    source: str
    messages: int
    prompt: str
    chosen: str
    rejected: str


def load_preferences(
    section: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    max_length: int,
    step_dir: Path | None = None,
    max_bad_rows: float = 0.0,
    key: str = "data.train",
) -> tuple[list[PreferencePair], BadRows]:
    """All pairs of one data section, in file order, and what was left out.

    section: where the rows are (see `read_rows`), and their format: `dataset_name` PreferenceDataset (`context`,
    `completions` with ranks), BinaryPreferenceDataset (`prompt_key`, `chosen_key`, `rejected_key`), HelpSteer3,
    Tulu3Preference; without one, each row's columns tell. `system_prompt_file` and `prompt_file`: see `Framing`.
    max_length: tokens of the longest sequence. max_bad_rows: share (0 to 1) of unusable rows above which UserError is
    raised. A tie is a bad row, also in HelpSteer3, where NeMo-RL would train on two equal answers.

    Token maths as NeMo-RL's preference_preprocessor: trailing newlines of the answer are cut, BOS and EOS added where
    absent, overlong pairs cut to at most 4 tokens a message and taken out of the loss. Its loss also covers the
    assistant's header that the template writes; here the header is prompt, as in trl: it is the same for both answers
    and cancels in the preference loss.
    """
    parse = preference_format(section, key)
    framing = load_framing(section, tokenizer, step_dir, key)
    bad = BadRows()
    pairs: list[PreferencePair] = []
    rows = read_rows(section, step_dir=step_dir, key=key)
    for chunk in chunked(_texts(rows, parse, framing, tokenizer, bad), _ROWS_AT_ONCE):
        ids = tokenizer.encode_batch([text for texts in chunk for text in (texts.prompt, texts.chosen, texts.rejected)])
        for i, texts in enumerate(chunk):
            try:
                pairs.append(_pair(texts, *ids[3 * i : 3 * i + 3], tokenizer=tokenizer, max_length=max_length))
            except BadRow as problem:
                bad.add(str(problem), texts.source)
    bad.overlong = sum(pair.overlong for pair in pairs)
    bad.stop_if_too_many(max_bad_rows, key=key)
    return pairs, bad


def _texts(
    rows: Iterator[Row],
    parse: Callable[[Mapping[str, Any]], Answers],
    framing: Framing,
    tokenizer: Tokenizer,
    bad: BadRows,
) -> Iterator[_Texts]:
    for row in rows:
        bad.total += 1
        try:
            if row.data is None:
                raise BadRow(row.problem)
            yield _rendered(parse(row.data), framing, row.place, tokenizer)
        except TemplateBreaksPrefix as problem:
            if bad.total <= FIRST_ROWS:
                raise refuse_template(problem, row.place) from problem
            bad.add("the chat template does not extend its own prefix", row.place)
        except BadRow as problem:
            bad.add(str(problem), row.place)


def _rendered(answers: Answers, framing: Framing, place: str, tokenizer: Tokenizer) -> _Texts:
    """The texts that the tokenizer sees, prompt and answers apart."""
    context, chosen, rejected = framing.around(answers.context), answers.chosen, answers.rejected
    if not is_answered(chosen) or not is_answered(rejected):
        raise BadRow("empty completion")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    if not tokenizer.has_chat_template:
        texts = [plain_text(messages) for messages in (context, [chosen], [rejected])]
    else:
        prompt = render(tokenizer, context, add_generation_prompt=True, tools=answers.tools)
        texts = [prompt]
        for answer in (chosen, rejected):
            full = render(tokenizer, [*context, answer], add_generation_prompt=False, tools=answers.tools)
            texts.append(rest_of(full, prompt))
    return _Texts(place, len(context) + 1, texts[0], texts[1].rstrip("\n"), texts[2].rstrip("\n"))


def _pair(
    texts: _Texts,
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    tokenizer: Tokenizer,
    max_length: int,
) -> PreferencePair:
    prompt = opened(prompt, tokenizer.bos_id)
    chosen, rejected = closed(chosen, tokenizer.eos_id), closed(rejected, tokenizer.eos_id)
    if not prompt.size:
        raise BadRow("empty prompt, and the tokenizer has no BOS to begin with")
    if np.array_equal(chosen, rejected):
        raise BadRow("chosen equals rejected")
    if prompt.size > max_length:
        raise BadRow(f"prompt longer than the limit of {max_length} tokens")
    overlong = prompt.size + max(chosen.size, rejected.size) > max_length
    if overlong:
        share = overlong_share(texts.messages, max_length)
        # Where there are more messages than the limit has tokens, one token of prompt and one of answer remain.
        prompt = prompt[: min(max(share * (texts.messages - 1), 1), max_length - share)]
        chosen, rejected = chosen[:share], rejected[:share]
    return PreferencePair(
        prompt_len=int(prompt.size),
        chosen_ids=np.concatenate([prompt, chosen]),
        rejected_ids=np.concatenate([prompt, rejected]),
        source=texts.source,
        overlong=overlong,
    )
