"""The environment judge: a generative model behind an OpenAI-compatible server scores answers, alone or in pairs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.environments.judge_client import JudgeClient
from nemotron_launch.trainer.paths import resolve_path

KEY = "env.judge"
NAMES = {"pointwise": ("score",), "pairwise": ("score_1", "score_2", "ranking")}
_OBJECT = re.compile(r"\{[^{}]*\}")

POINTWISE = """\
You judge an assistant's answer.{% if principle %} What makes an answer good: {{ principle }}{% endif %}

<conversation>
{{ conversation }}
</conversation>

<answer>
{{ answer }}
</answer>

Think about how helpful, correct and clear the answer is. Then end with one line of JSON and nothing after it:
{"score": S}
S is a number from 1 (useless) to 5 (as good as can be).
"""
PAIRWISE = """\
You compare two answers of an assistant.{% if principle %} What makes an answer good: {{ principle }}{% endif %}

<conversation>
{{ conversation }}
</conversation>

<answer_1>
{{ answer_1 }}
</answer_1>

<answer_2>
{{ answer_2 }}
</answer_2>

Think about how helpful, correct and clear each of them is. Then end with one line of JSON and nothing after it:
{"score_1": A, "score_2": B, "ranking": R}
A and B are numbers from 1 (useless) to 5 (as good as can be). R is a whole number from 1 (answer 1 is much better)
to 6 (answer 2 is much better).
"""


@dataclass(frozen=True)
class Judgement:
    """What one reply says: a score of the answer, or of both, and, of a pair, the ranking."""

    scores: tuple[float, ...]
    ranking: float | None = None


class JudgeEnvironment:
    """Scores by a judge; section: `env.judge`. output_dir: where judgements are kept; rank tells processes apart."""

    name = "judge"

    def __init__(
        self, section: Mapping[str, Any], *, step_dir: Path | None, output_dir: Path | None, rank: int = 0
    ) -> None:
        self.section = section
        self.pairwise = section["mode"] == "pairwise"
        self.names = NAMES[section["mode"]]
        self.template = _template(section, step_dir)
        self.pattern = _pattern(section["score_pattern"], self.names)
        cache = output_dir / "judgements" / f"rank-{rank}.jsonl" if output_dir and section["cache"] else None
        self.client = JudgeClient(section, cache=cache)
        self.pool = ThreadPoolExecutor(section["concurrency"], thread_name_prefix="judge")

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Nothing is needed of a row but its prompt; the server must answer and have the model."""
        self.client.check_ready()

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """pointwise: the judgements' mean score. pairwise: the mean over an answer's comparisons, ties broken.

        Compared is what there is: an answer alone in its group gets default_score. Where no judgement of an answer can
        be read, it gets default_score and an error; where none came at all, it is lost.
        """
        asked = [(g, pair, self._prompt(group, pair)) for g, group in enumerate(groups) for pair in self._pairs(group)]
        judges = self.section["num_judges_per_comparison"]
        futures = [
            (g, pair, self.pool.submit(self.client.ask, prompt, number))
            for g, pair, prompt in asked
            for number in range(judges)
        ]
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        problems: dict[tuple[int, int], str] = {}
        unread: set[tuple[int, int]] = set()
        seconds: dict[tuple[int, int], float] = defaultdict(float)
        for g, pair, future in futures:
            reply = future.result()
            judgement = self._read(reply.text) if not reply.problem else None
            rewards = self._rewards(judgement) if judgement else ()
            for place, answer in enumerate(pair):
                seconds[g, answer] += reply.seconds
                if judgement:
                    found[g, answer].append(rewards[place])
                else:
                    problems[g, answer] = reply.problem or f"no {' and '.join(self.names)} in the judgement"
                    if not reply.problem:
                        unread.add((g, answer))
        return [
            [
                self._score(found[g, i], problems.get((g, i), ""), (g, i) in unread, seconds[g, i])
                for i in range(len(group))
            ]
            for g, group in enumerate(groups)
        ]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def _pairs(self, group: Sequence[Rollout]) -> Iterator[tuple[int, ...]]:
        """The answers, by number, that are put before the judge together."""
        size = len(group)
        if not self.pairwise:
            yield from ((i,) for i in range(size))
        elif size > 1 and self.section["comparison_strategy"] == "circular":
            yield from ((i, (i + 1) % size) for i in range(size))
        else:
            yield from combinations(range(size), 2)

    def _prompt(self, group: Sequence[Rollout], pair: Sequence[int]) -> str:
        messages = group[pair[0]].messages
        answers = [group[i].text for i in pair]
        named = {f"answer_{n}": text for n, text in enumerate(answers, 1)} if self.pairwise else {"answer": answers[0]}
        text: str = self.template.render(
            conversation="\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages),
            messages=[dict(message) for message in messages],
            principle=self.section["principle"],
            **named,
        )
        return text

    def _read(self, text: str) -> Judgement | None:
        """The last judgement in a reply: JSON with the names that the template asks for, or what the pattern finds."""
        for candidate in reversed(list((self.pattern or _OBJECT).finditer(text))):
            try:
                values = candidate.groups() if self.pattern else _named(candidate.group(), self.names)
                numbers = [float(value) for value in values]
            except (KeyError, TypeError, ValueError):
                continue
            if not self.pairwise:
                return Judgement((numbers[0],))
            return Judgement((numbers[0], numbers[1]), numbers[2] if len(numbers) > 2 else None)
        return None

    def _rewards(self, judgement: Judgement) -> tuple[float, ...]:
        """Scores, equal ones of a pair told apart by the ranking (NeMo Gym's simple_tiebreaker).

        A ranking below default_ranking (3.5) prefers the first answer: both scores move by the difference.
        """
        scores = judgement.scores
        if len(scores) == 1 or scores[0] != scores[1] or judgement.ranking is None:
            return scores
        lead = self.section["default_ranking"] - judgement.ranking
        return scores[0] + lead, scores[1] - lead

    def _score(self, rewards: Sequence[float], problem: str, unread: bool, seconds: float) -> Score:
        if rewards:
            return Score(sum(rewards) / len(rewards), seconds=seconds)
        default = float(self.section["default_score"])
        if not problem:  # nothing to compare with
            return Score(default)
        return Score(default, error=problem, lost=not unread, seconds=seconds)


def _named(text: str, names: Sequence[str]) -> list[Any]:
    values = json.loads(text)
    return [values[name] for name in names]


def _template(section: Mapping[str, Any], step_dir: Path | None) -> Any:
    """The judge's prompt as a template; sandboxed, since it comes with a config."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text, where = (PAIRWISE if section["mode"] == "pairwise" else POINTWISE), f"{KEY}.prompt_file"
    if section["prompt_file"]:
        path = resolve_path(section["prompt_file"], step_dir, where)
        if not path.is_file():
            raise UserError(f"no such file: {path}", where=where)
        text = path.read_text(encoding="utf-8")
    samples = {"answer": "b"} if section["mode"] == "pointwise" else {"answer_1": "b", "answer_2": "c"}
    try:
        template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
        template.render(conversation="user: a", messages=[{"role": "user", "content": "a"}], principle=None, **samples)
    except TemplateError as error:
        known = ", ".join(["conversation", "messages", "principle", *samples])
        raise UserError(f"does not work: {error.message}", where=where, hint=f"it sees {known}") from error
    return template


def _pattern(text: str | None, names: Sequence[str]) -> re.Pattern[str] | None:
    if text is None:
        return None
    where, needed = f"{KEY}.score_pattern", (1,) if len(names) == 1 else (2, 3)
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"is no regular expression: {error}", where=where) from error
    if pattern.groups not in needed:
        wanted = f"one for each of {', '.join(names)}" + (" (the ranking may be left out)" if len(names) > 1 else "")
        raise UserError(f"has {pattern.groups} groups", where=where, hint=wanted)
    return pattern
