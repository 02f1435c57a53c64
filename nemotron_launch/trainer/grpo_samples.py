"""Answers to read: samples.jsonl, a line for each, because no average shows what a reward has come to stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_launch.trainer.file_errors import file_error
from nemotron_launch.trainer.grpo_rollouts import Rollouts
from nemotron_launch.trainer.metrics import cut_back

log = logging.getLogger(__name__)
FILE = "samples.jsonl"


class SampleLog:
    """Writes samples.jsonl on rank 0: step, kind (train or validation), source, question, answer, reward.

    resume_step: lines behind it are cut off first, as those of metrics.jsonl are.
    """

    def __init__(self, output_dir: Path, *, resume_step: int, enabled: bool) -> None:
        self.path = output_dir / FILE if enabled else None
        if self.path is not None:
            cut_back(self.path, resume_step)

    def write(self, step: int, kind: str, rollouts: Rollouts, places: Sequence[int], **more: Any) -> None:
        """Append the rollouts at `places`."""
        if self.path is None or not places:
            return
        lines = [{"step": step, "kind": kind, **_shown(rollouts, i), **more} for i in places]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except OSError as error:
            raise file_error(error, self.path) from error


def _shown(rollouts: Rollouts, i: int) -> Mapping[str, Any]:
    score, completion = rollouts.scores[i], rollouts.completions[i]
    line = {
        "source": rollouts.prompts[i].source,
        "question": _question(rollouts, i),
        "answer": rollouts.texts[i],
        "reward": score.reward,
        "tokens": len(completion.ids),
        "truncated": not completion.stopped,
    }
    return {**line, **({"error": score.error} if score.error else {}), **({"lost": True} if score.lost else {})}


def _question(rollouts: Rollouts, i: int) -> str:
    """What was asked last."""
    return str(rollouts.prompts[i].messages[-1]["content"])


def best_and_worst(rollouts: Rollouts) -> list[int]:
    """The best and the worst rollout that have a reward; one where all are equal."""
    known = [i for i, score in enumerate(rollouts.scores) if not score.lost]
    if not known:
        return []
    best = max(known, key=lambda i: rollouts.scores[i].reward)
    worst = min(known, key=lambda i: rollouts.scores[i].reward)
    return list(dict.fromkeys([best, worst]))


def say(rollouts: Rollouts, places: Sequence[int]) -> None:
    """The rollouts at `places` in train.log and on the terminal."""
    for i in places:
        score = rollouts.scores[i]
        log.info("reward %g: %s → %s", score.reward, _short(_question(rollouts, i)), _short(rollouts.texts[i]))


def _short(text: str) -> str:
    """One line of it."""
    line = repr(text.strip())[1:-1]
    return line if len(line) <= 160 else f"{line[:100]} … {line[-57:]}"
