"""The prompts of a run: read, held out, checked by what will score them, before anything is generated."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.agreement import on_rank_0, same_everywhere, together
from nemotron_launch.trainer.data.order import batch_indices
from nemotron_launch.trainer.data.prompts import GymRows, Prompt, load_prompts
from nemotron_launch.trainer.data.sources import BadRows, data_section
from nemotron_launch.trainer.environments import Rollout
from nemotron_launch.trainer.environments.router import Environments
from nemotron_launch.trainer.setup import Session, fingerprint

log = logging.getLogger(__name__)
# Rows with whose own right answers the reward is tried before the first rollout.
TRIED = 16
# Environments that need no server and no model, and answer at once.
QUICK = ("math", "exact", "multiple_choice")


@dataclass(frozen=True)
class Prompts:
    """Training and held-out prompts; fingerprint: of the training ones, with what they are scored by."""

    training: Sequence[Prompt]
    held_out: Sequence[Prompt]
    fingerprint: str


def load_data(session: Session, environments: Environments | None) -> Prompts:
    """All prompts, on every rank. environments: on rank 0, where the rows' verifier fields are looked at.

    Raises UserError for rows that cannot be used or scored (more of them than data.max_bad_rows allows), and for a
    reward that tells right from wrong on none of the rows tried.
    """
    data = session.config["data"]
    training, held_out = together(lambda: _read(session))
    training = _scorable(session, environments, training, key="data.train")
    if held_out:
        held_out = _scorable(session, environments, held_out, key="data.validation")
    share = data_section(data, data["train"], split="train").get("split_validation_size")
    if share:
        training, more = _held_out(training, share, session.config["grpo"]["seed"])
        held_out = [*held_out, *more]
    if not training:
        raise UserError("holds no usable row", where="data.train")
    on_rank_0(lambda: try_reward(environments, training) if environments is not None else None)
    found = same_everywhere(fingerprint(_content(training)), what="other rows", where="data.train")
    return Prompts(training, held_out, found)


def _read(session: Session) -> tuple[list[Prompt], list[Prompt]]:
    config = session.config
    data = config["data"]

    def load(section: Mapping[str, Any] | None, key: str, split: str) -> list[Prompt]:
        prompts, bad = load_prompts(
            data_section(data, section, split=split),
            tokenizer=session.tokenizer,
            max_length=_longest(config),
            gym=GymRows.of(config),
            step_dir=session.step_dir,
            max_bad_rows=data["max_bad_rows"],
            key=key,
        )
        if session.main_rank and (text := bad.summary()):
            log.warning("%s: %s", key, text)
        return prompts

    held_out = load(data["validation"], "data.validation", "validation") if data["validation"] is not None else []
    return load(data["train"], "data.train", "train"), held_out


def _longest(config: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt: one token of room for an answer must be left."""
    most: int = config["policy"]["max_total_sequence_length"] - 1
    return min(config["data"]["max_input_seq_length"] or most, most)


def _scorable(
    session: Session, environments: Environments | None, prompts: Sequence[Prompt], *, key: str
) -> list[Prompt]:
    """The prompts that can be scored; rank 0 looks, all leave out the same. UserError where too many cannot be."""

    def problems() -> list[str]:
        assert environments is not None
        rows, places = [prompt.row for prompt in prompts], [prompt.source for prompt in prompts]
        environments.check(rows, places)
        return environments.problems(rows)

    found = on_rank_0(problems)
    bad = BadRows()
    bad.total = len(prompts)
    for prompt, problem in zip(prompts, found, strict=True):
        if problem:
            bad.add(problem, prompt.source)
    if session.main_rank and bad.bad:
        log.warning("%s: %s", key, bad.summary())
    return [prompt for prompt, problem in zip(prompts, found, strict=True) if not problem]


def _held_out(prompts: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, validation) prompts, drawn by the seed; a row that is repeated goes one way with all its copies."""
    sources = list(dict.fromkeys(prompt.source for prompt in prompts))
    count = round(share * len(sources))
    order = batch_indices(
        len(sources), seed=seed, epoch=0, step_in_epoch=0, batch=len(sources), shuffle=True, drop_last=True
    )
    drawn = {sources[i] for i in order[:count]}
    once = {prompt.source: prompt for prompt in prompts if prompt.source in drawn}
    return [prompt for prompt in prompts if prompt.source not in drawn], list(once.values())


def try_reward(environments: Environments, prompts: Sequence[Prompt]) -> None:
    """Score the first rows' own right answers, and empty ones, before anything is generated.

    Raises UserError where no right answer scores above an empty one, or the verifier fails on all. Only where that is
    quick and the row says what a right answer reads like; of a user's own function it is not known what it rewards.
    """
    own = [prompt for prompt in prompts if _name(prompt).startswith("python:")][:TRIED]
    told = [prompt for prompt in prompts if _name(prompt) in QUICK]
    told = [prompt for prompt in told if isinstance(prompt.row.get("expected_answer"), str | int | float)][:TRIED]
    for tried in filter(None, (own, told)):
        groups = [[_answer(each, text) for text in (*_right_texts(each), "")] for each in tried]
        scores = environments.score(groups)
        first = scores[0][0]
        if all(score.error for group in scores for score in group):
            what, advice = f"the verifier fails on all {len(tried)} rows tried: {first.error}", "correct it"
        elif tried is told and not any(max(score.reward for score in right) > wrong.reward for *right, wrong in scores):
            what = f"the row's own right answer {str(tried[0].row['expected_answer'])[:60]!r} is rewarded with "
            what += f"{first.reward:g}, an empty one with {scores[0][-1].reward:g}"
            what += f" ({first.error})" if first.error else ""
            advice = f"so it is with all {len(tried)} rows tried: nothing could be learnt\n"
            advice += "name the column of the right answer with data.train.output_key, or another env_name"
        else:
            if len({score.reward for group in scores for score in group}) == 1:
                log.warning("%s rewards all that was tried with %g", _name(tried[0]), first.reward)
            continue
        raise UserError(f"{_name(tried[0])}: {what}", where=tried[0].source, hint=advice)


def _name(prompt: Prompt) -> str:
    return str(prompt.row.get("env_name") or "")


def _right_texts(prompt: Prompt) -> tuple[str, ...]:
    """The row's right answer as models put it."""
    right = str(prompt.row.get("expected_answer", ""))
    return right, f"The answer is {right}", f"\\boxed{{{right}}}"


def _answer(prompt: Prompt, text: str) -> Rollout:
    return Rollout(prompt.messages, text, prompt.row, where=prompt.source)


def _content(prompts: Sequence[Prompt]) -> Iterable[np.ndarray]:
    for prompt in prompts:
        yield prompt.ids
        yield np.frombuffer(json.dumps(prompt.row, sort_keys=True, default=str).encode(), np.uint8)
