"""Which of a run's metrics are drawn together, in what order, and what a reader should see in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from nemotron_launch.frozen import frozen


@frozen
class Line:
    """One curve of a plot: a metric, under a short name. band: metrics of its lower and upper edge."""

    metric: str
    label: str
    band: tuple[str, str] | None = None


@frozen
class Figure:
    """A plot. help: what it shows and what to look for. unit: of its axis. stacked: the curves are parts of a whole."""

    key: str
    section: str
    title: str
    help: str
    lines: tuple[Line, ...]
    unit: str = ""
    stacked: bool = False

    def as_data(self) -> dict[str, Any]:
        lines = [
            {"metric": one.metric, "label": one.label, "band": list(one.band) if one.band else None}
            for one in self.lines
        ]
        return {**vars(self), "lines": lines}


# Sections in their order; a run's metrics decide which of them it has.
REWARD, LOSS, PREFERENCE, POLICY, LENGTH, VALIDATION, ENGINE, SPEED, OTHER = (
    "Reward", "Loss", "Preferences", "Policy", "Length", "Validation", "Generator and trainer", "Speed and memory",
    "Other metrics",
)  # fmt: skip
SECTIONS = (REWARD, LOSS, PREFERENCE, POLICY, LENGTH, VALIDATION, ENGINE, SPEED, OTHER)

_VALIDATION = r"validation(?:-(?P<set>[^/]+))?/"
# Figure: key, section, title, unit, help, and its metrics as patterns with their labels; {set} is a validation set.
_FIGURES: tuple[tuple[str, str, str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("reward", REWARD, "Reward", "",
     "Mean reward of a step's rollouts as the environment scored them; the band reaches from the least to the "
     "greatest. It should rise; where it stays, look at the spread within groups.",
     (("train/reward", "train"), ("train/shaped_reward", "shaped"))),
    ("reward-spread", REWARD, "Spread of the reward", "",
     "Standard deviation within the groups of one prompt, which is what a step learns from, and between prompts. "
     "Near 0 within groups: the prompts are too easy, too hard, or the reward is always the same.",
     (("train/reward_std_within_groups", "within groups"), ("train/reward_std_between_groups", "between groups"))),
    ("dull-groups", REWARD, "Groups that teach nothing", "share of groups",
     "Groups whose answers all have the same reward; of these, those that are all as good, or as bad, as the batch's "
     "extremes. Above 0.7 most of the generation is wasted.",
     (("train/groups_without_variance", "all alike"), ("train/all_best_groups", "all best"),
      ("train/all_worst_groups", "all worst"))),
    ("reward-parts", REWARD, "Parts of the reward", "",
     "Where the environment scores in parts, their means.", ((r"train/reward/(?P<label>.+)", ""),)),
    ("advantages", REWARD, "Advantages", "",
     "Mean over the tokens that count. Clearly below 0: the long answers are the bad ones.",
     (("train/advantages/mean", "mean"),)),
    ("scoring", REWARD, "Scoring that went wrong", "rollouts",
     "Answers on which the verifier failed, and rollouts that were lost. They should be 0.",
     (("train/verifier_errors", "verifier errors"), ("train/lost_rollouts", "lost rollouts"))),
    ("loss", LOSS, "Loss", "",
     "What is minimised. For SFT, DPO and reward models it should fall; where the validation's rises while training's "
     "falls, the run learns by heart. For GRPO it says little: it is near minus the mean advantage.",
     (("train/loss", "train"), (_VALIDATION + "loss", "validation {set}"))),
    ("loss-parts", LOSS, "Parts of the loss", "",
     "What the loss is made of.",
     (("train/preference_loss", "preference"), ("train/sft_loss", "SFT"), ("train/actor_loss", "actor"),
      ("train/positive_nll_loss", "positive NLL"))),
    ("grad-norm", LOSS, "Gradient norm", "",
     "Before clipping. Spikes that come back are a sign of bad rows or of too high a learning rate.",
     (("train/grad_norm", "gradient norm"),)),
    ("lr", LOSS, "Learning rate", "", "As the schedule sets it.", (("train/lr", "learning rate"),)),
    ("accuracy", PREFERENCE, "Accuracy", "share of pairs",
     "Pairs whose chosen answer is preferred. One half is guessing.",
     (("train/accuracy", "train"), (_VALIDATION + "accuracy", "validation {set}"))),
    ("chosen-rejected", PREFERENCE, "Rewards of chosen and rejected", "nats",
     "They should part. Where both fall, the policy gives up the chosen answers too; where both are far from 0, it has "
     "left its reference.",
     (("train/rewards_chosen_mean", "chosen"), ("train/rewards_rejected_mean", "rejected"))),
    ("kl", POLICY, "KL to the reference", "nats a token",
     "How far the policy has gone from where it began. A reward that rises while it runs away is being gamed.",
     (("train/reference_kl", "measured"), ("train/kl_penalty", "in the loss"),
      (_VALIDATION + "kl_to_reference", "validation {set}"))),
    ("entropy", POLICY, "Entropy", "nats a token",
     "How undecided the policy is. Falling fast: it collapses to a few answers.",
     (("train/approx_entropy", "entropy"),)),
    ("clip", POLICY, "Clip share", "share of tokens",
     "Tokens whose gradient a clip stops, at the low and at the high end. Above 0.2: lower the learning rate, or take "
     "fewer optimizer steps for each step's rollouts.",
     (("train/clip_high_share", "high"), ("train/clip_low_share", "low"))),
    ("ratio", POLICY, "Probability ratio", "",
     "Of the policy to itself before the step; the band reaches from the least to the greatest. 1 in a step's first "
     "update.",
     (("train/probs_ratio", "ratio"),)),
    ("length", LENGTH, "Length of the answers", "tokens",
     "Growing together with the reward: the reward may pay for length.",
     (("train/mean_gen_tokens_per_sample", "mean"), ("train/max_gen_tokens_per_sample", "longest"),
      ("train/response_length_mean", "train"), ("train/chosen_length_mean", "chosen"),
      ("train/rejected_length_mean", "rejected"), (_VALIDATION + "(?:avg_length|response_length_mean)",
                                                   "validation {set}"))),
    ("truncation", LENGTH, "Truncated answers", "share of answers",
     "Answers that were cut off at the longest length. Rising: give them more room, or shape the reward by length.",
     (("train/truncation_rate", "train"), (_VALIDATION + "truncation_rate", "validation {set}"))),
    ("prompt-length", LENGTH, "Length of the prompts", "tokens", "Mean of the step's prompts.",
     (("train/mean_prompt_length", "prompts"),)),
    ("val-accuracy", VALIDATION, "Held-out reward", "",
     "Mean reward on prompts that are not trained on, of sampled and of greedy answers; the share of answers that are "
     "exactly right.",
     (("validation/accuracy", "sampled"), ("validation/greedy_accuracy", "greedy"),
      (_VALIDATION + "exact_match", "exact match {set}"))),
    ("pass-at", VALIDATION, "Pass@k", "share of prompts",
     "The chance that one of k answers is right. Where pass@1 rises and the others do not, the policy gets surer, not "
     "better.",
     ((r"validation/pass_at_(?P<label>\d+)", "pass@{label}"),)),
    ("engine-error", ENGINE, "Probability error", "",
     "Mean of exp|generator − trainer| over tokens: 1 where they compute the same. Above 1.05 the rollouts are of "
     "another policy than the one that is trained.",
     (("train/token_mult_prob_error", "tokens"), ("train/max_seq_mult_prob_error", "worst sequence"))),
    ("engine-kl", ENGINE, "Divergence of generator and trainer", "nats",
     "0 where both compute the same.",
     (("train/gen_kl_error", "KL(generator ‖ policy)"), ("train/policy_kl_error", "KL(policy ‖ generator)"),
      ("train/js_divergence_error", "Jensen-Shannon"))),
    ("engine-weights", ENGINE, "Correction for the generator", "",
     "The mean weight after its limits, which should be near 1, and the share that was outside of them.",
     (("train/sampling_importance_ratio", "mean weight"), ("train/is_oob_ratio", "outside limits"))),
    ("tokens", SPEED, "Tokens a second", "tokens/s",
     "Prompts and answers that are trained on, over the whole step; answers over the time of generation.",
     (("timing/train/tokens_per_sec", "trained"), ("timing/train/generation_tokens_per_sec", "generated"),
      ("timing/train/valid_tokens_per_sec_per_gpu", "in the loss, each process"))),
    ("step-time", SPEED, "Time of a step", "seconds", "Without validation and checkpoints.",
     (("timing/train/total_step_time", "step"),)),
    ("memory", SPEED, "Memory", "GiB", "The most that rank 0 has held so far: on its GPU, and as a process.",
     (("train/gpu_memory_gib", "GPU"), ("memory/process_peak_gib", "process"))),
)  # fmt: skip
_BANDS = {
    "train/reward": ("train/reward_min", "train/reward_max"),
    "train/probs_ratio": ("train/probs_ratio_min", "train/probs_ratio_max"),
}
_PREFERENCE_STEPS = ("train/rewards_chosen_mean", "validation-default/rewards_chosen_mean")
# Parts of a step's time, in the order in which they happen.
_PARTS = ("generation", "reward", "logprobs", "policy_training")
_NOT_DRAWN = {"time", "epoch", "total_steps", "train/wd", "validation/pass_k"}  # pass_k is pass@k again


def figures_of(names: Iterable[str]) -> list[Figure]:
    """The plots for these metrics: the known ones in their order, then one for each metric that is in none of them."""
    there = list(dict.fromkeys(names))
    pairs = any(name in there for name in _PREFERENCE_STEPS)
    used: set[str] = set(_NOT_DRAWN)
    found: list[Figure] = []
    for key, section, title, unit, text, patterns in _FIGURES:
        if key == "accuracy" and not pairs:
            continue  # of prompts and rewards, it is the held-out reward
        lines = tuple(line for pattern, label in patterns for line in _lines(pattern, label, there))
        if lines:
            found.append(Figure(key, section, title, text, lines, unit=unit))
            used.update(name for line in lines for name in (line.metric, *(line.band or ())))
    if stack := _stack(there):
        found.insert(next(i for i, one in enumerate(found + [stack]) if one.section in (SPEED, OTHER)), stack)
        used.update(line.metric for line in stack.lines)
    for name in there:
        if name not in used:
            found.append(Figure(f"metric:{name}", OTHER, name, "", (Line(name, name.rpartition("/")[2]),)))
    return sorted(found, key=lambda one: SECTIONS.index(one.section))


def time_parts(names: Iterable[str]) -> list[tuple[str, str]]:
    """The metrics that are parts of a step's time, with their names; of any trainer that writes `timing/train/`."""
    there = [name.removeprefix("timing/train/") for name in names if name.startswith("timing/train/")]
    parts = [name for name in there if name != "total_step_time" and "per_sec" not in name and "/" not in name]
    parts.sort(key=lambda name: _PARTS.index(name) if name in _PARTS else len(_PARTS))
    return [(f"timing/train/{name}", name.replace("_", " ")) for name in parts]


def _stack(names: Sequence[str]) -> Figure | None:
    parts = time_parts(names)
    if len(parts) < 2:
        return None
    text = "Where the time of a step goes, one part above the other."
    lines = tuple(Line(metric, label) for metric, label in parts)
    return Figure("step-parts", SPEED, "Parts of a step", text, lines, unit="seconds", stacked=True)


def _lines(pattern: str, label: str, names: Sequence[str]) -> list[Line]:
    if pattern in names:
        band = _BANDS.get(pattern)
        return [Line(pattern, label, band if band and all(edge in names for edge in band) else None)]
    if "(" not in pattern:
        return []
    found = []
    for name in names:
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict()
            which = groups.get("set") or ""
            text = label.format(set="" if which == "default" else which, label=groups.get("label"))
            found.append(Line(name, text.strip() or str(groups.get("label"))))
    return found
