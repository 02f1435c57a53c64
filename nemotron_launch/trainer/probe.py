"""What a reward says of rollouts before anything learns from it: a summary, in numbers and in plain words.

Pure functions of scored rollouts; `probe_run.py` makes them. Legend: P prompts, G rollouts of one prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_launch.trainer.grpo_rollouts import Rollouts

BINS = 20
SHOWN = 3  # samples at either end, to read
SLOWEST = 3
TEXT_LIMIT = 2000  # characters of a sample


@dataclass(frozen=True)
class Limits:
    """Where a finding begins. Shares of groups or rollouts; length_correlation as an absolute value."""

    groups_without_variance: float = 0.8
    verifier_errors: float = 0.5
    truncated: float = 0.5
    length_correlation: float = 0.6


@dataclass(frozen=True)
class Finding:
    """Something to know before training. fatal: nothing can be learned, or not what is meant."""

    name: str
    fatal: bool
    text: str
    advice: str


def summarise(rollouts: Rollouts, samples: int) -> dict[str, Any]:
    """Everything that a probe tells, as plain data. samples: rollouts of each prompt (G)."""
    rewards_PG = rollouts.rewards_B.numpy().reshape(-1, samples)
    known_PG = rollouts.known_B.numpy().reshape(-1, samples)
    lengths_PG = rollouts.lengths_B.double().numpy().reshape(-1, samples)
    known = rewards_PG[known_PG]
    within = [group[have].std(ddof=0) for group, have in zip(rewards_PG, known_PG, strict=True) if have.any()]
    means = [group[have].mean() for group, have in zip(rewards_PG, known_PG, strict=True) if have.any()]
    errors = [score.error for score in rollouts.scores if score.error]
    edges, counts = _histogram(known)
    return {
        "prompts": len(rewards_PG),
        "samples_per_prompt": samples,
        "reward": {
            "mean": _mean(known),
            "std": float(known.std(ddof=0)) if known.size else math.nan,
            "std_within_prompts": float(np.sqrt(np.mean(np.square(within)))) if within else math.nan,
            "std_between_prompts": float(np.std(means)) if means else math.nan,
            "min": float(known.min()) if known.size else math.nan,
            "max": float(known.max()) if known.size else math.nan,
            "histogram": {"edges": edges, "counts": counts},
        },
        "groups_without_variance": _mean([spread == 0 for spread in within]) if within else 1.0,
        "length": {
            "mean": _mean(lengths_PG),
            "min": float(lengths_PG.min()),
            "median": float(np.median(lengths_PG)),
            "max": float(lengths_PG.max()),
            "truncated": _mean(rollouts.truncated_B.numpy()),
            "correlation_with_reward": _correlation(lengths_PG, rewards_PG, known_PG),
        },
        "verifier": {
            "errors": len(errors),
            "lost": int((~known_PG).sum()),
            "commonest_errors": [{"error": text, "count": count} for text, count in Counter(errors).most_common(3)],
            "mean_seconds": _mean([score.seconds for score in rollouts.scores]),
            "slowest": [_timed(rollouts, i) for i in _slowest(rollouts)],
        },
        "components": _components(rollouts),
        "by_prompt": [
            {
                "source": rollouts.prompts[p * samples].source,
                "mean": _mean(rewards_PG[p][known_PG[p]]),
                "std": float(rewards_PG[p][known_PG[p]].std(ddof=0)) if known_PG[p].any() else math.nan,
            }
            for p in range(len(rewards_PG))
        ],
        "points": [
            {"tokens": int(tokens), "reward": float(reward)}
            for tokens, reward, have in zip(lengths_PG.flat, rewards_PG.flat, known_PG.flat, strict=True)
            if have
        ],
        **_extremes(rollouts),
        "seconds": {name: round(value, 3) for name, value in rollouts.seconds.items()},
    }


def findings(summary: dict[str, Any], limits: Limits) -> list[Finding]:
    """What a summary means, the worst first."""
    reward, length, verifier = summary["reward"], summary["length"], summary["verifier"]
    count = summary["prompts"] * summary["samples_per_prompt"]
    found = []
    if verifier["lost"] == count:
        found.append(_finding("no_rewards", True, "no rollout could be scored", _first_error(verifier)))
    failed = verifier["errors"] / count
    if failed > limits.verifier_errors and verifier["lost"] < count:
        found.append(
            _finding(
                "verifier_fails",
                True,
                f"the verifier failed on {_share(failed)} of the rollouts",
                _first_error(verifier),
            )
        )
    elif verifier["errors"]:
        found.append(
            _finding(
                "verifier_errors",
                False,
                f"the verifier failed on {verifier['errors']} rollouts",
                _first_error(verifier),
            )
        )
    flat = summary["groups_without_variance"]
    if flat == 1 and verifier["lost"] < count:
        level = f"{reward['mean']:g}" if reward["min"] == reward["max"] else "different from prompt to prompt"
        found.append(
            _finding(
                "all_groups_equal",
                True,
                f"in every group all rewards are equal ({level}): there is nothing to learn from",
                "easier or harder prompts, a warm start that is right now and then, a reward with steps in between, "
                "or a higher policy.generation.temperature",
            )
        )
    elif flat > limits.groups_without_variance:
        found.append(
            _finding(
                "few_groups_differ",
                False,
                f"in {_share(flat)} of the groups all rewards are equal",
                "raise grpo.num_generations_per_prompt, set grpo.use_dynamic_sampling=true, or choose prompts that "
                "are neither always right nor always wrong",
            )
        )
    if length["truncated"] > limits.truncated:
        found.append(
            _finding(
                "truncated",
                length["truncated"] == 1,
                f"{_share(length['truncated'])} of the answers are cut off at policy.generation.max_new_tokens",
                "raise it, or start from a model that ends its answers",
            )
        )
    correlation = length["correlation_with_reward"]
    if correlation is not None and abs(correlation) > limits.length_correlation:
        kind = "longer" if correlation > 0 else "shorter"
        found.append(
            _finding(
                "reward_follows_length",
                False,
                f"within a group, {kind} answers get the greater reward (correlation {correlation:.2f})",
                "look whether that is meant: the policy will learn it first (grpo.reward_shaping bounds length)",
            )
        )
    return sorted(found, key=lambda finding: not finding.fatal)


def _finding(name: str, fatal: bool, text: str, advice: str) -> Finding:
    return Finding(name, fatal, text, advice)


def _first_error(verifier: dict[str, Any]) -> str:
    common = verifier["commonest_errors"]
    return f"most often: {common[0]['error']}" if common else "no reason was given"


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


def _mean(values: Any) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else math.nan


def _histogram(known: np.ndarray) -> tuple[list[float], list[int]]:
    """Edges and counts; a bar for each value where there are few."""
    if not known.size:
        return [], []
    counts, edges = np.histogram(known, bins=BINS)
    return edges.tolist(), counts.tolist()


def _correlation(lengths_PG: np.ndarray, rewards_PG: np.ndarray, known_PG: np.ndarray) -> float | None:
    """Pearson's, of length and reward, each less its group's mean; None where one of them does not vary."""
    lengths, rewards = [], []
    for length, reward, have in zip(lengths_PG, rewards_PG, known_PG, strict=True):
        if have.sum() > 1:
            lengths.append(length[have] - length[have].mean())
            rewards.append(reward[have] - reward[have].mean())
    if not lengths:
        return None
    x, y = np.concatenate(lengths), np.concatenate(rewards)
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 1e-12 else None


def _components(rollouts: Rollouts) -> dict[str, float]:
    names = sorted({name for score in rollouts.scores for name in score.components})
    return {name: _mean([s.components[name] for s in rollouts.scores if name in s.components]) for name in names}


def _slowest(rollouts: Rollouts) -> Sequence[int]:
    order = sorted(range(len(rollouts)), key=lambda i: -rollouts.scores[i].seconds)
    return [i for i in order[:SLOWEST] if rollouts.scores[i].seconds > 0]


def _timed(rollouts: Rollouts, i: int) -> dict[str, Any]:
    return {"source": rollouts.prompts[i].source, "seconds": round(rollouts.scores[i].seconds, 4)}


def _extremes(rollouts: Rollouts) -> dict[str, list[dict[str, Any]]]:
    """The best and the worst rollouts, no two of the same prompt at one end."""
    if not rollouts.texts:
        return {"best": [], "worst": []}
    known = [i for i, score in enumerate(rollouts.scores) if not score.lost]
    ends = {}
    for name, sign in (("best", -1), ("worst", 1)):
        chosen: list[int] = []
        for i in sorted(known, key=lambda i: sign * rollouts.scores[i].reward):
            if all(rollouts.prompts[i] is not rollouts.prompts[j] for j in chosen):
                chosen.append(i)
            if len(chosen) == SHOWN:
                break
        ends[name] = [_sample(rollouts, i) for i in chosen]
    return ends


def _sample(rollouts: Rollouts, i: int) -> dict[str, Any]:
    score = rollouts.scores[i]
    return {
        "source": rollouts.prompts[i].source,
        "question": str(rollouts.prompts[i].messages[-1]["content"])[:TEXT_LIMIT],
        "answer": rollouts.texts[i][:TEXT_LIMIT],
        "reward": score.reward,
        "tokens": len(rollouts.completions[i].ids),
        "error": score.error,
    }
