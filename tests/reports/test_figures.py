"""Which metrics are drawn together: the names that the trainer writes, and any that it does not know."""

from __future__ import annotations

import re

from nemotron_launch.reports.figures import SECTIONS, figures_of, time_parts
from nemotron_launch.resources import root

GRPO = [
    "train/loss",
    "train/actor_loss",
    "train/kl_penalty",
    "train/reference_kl",
    "train/clip_low_share",
    "train/clip_high_share",
    "train/approx_entropy",
    "train/lr",
    "train/wd",
    "train/grad_norm",
    "train/reward",
    "train/reward_min",
    "train/reward_max",
    "train/reward_std_within_groups",
    "train/reward_std_between_groups",
    "train/groups_without_variance",
    "train/mean_gen_tokens_per_sample",
    "train/truncation_rate",
    "timing/train/logprobs",
    "timing/train/policy_training",
    "timing/train/generation",
    "timing/train/reward",
    "timing/train/total_step_time",
    "timing/train/tokens_per_sec",
    "timing/train/generation_tokens_per_sec",
    "validation/accuracy",
    "validation/pass_at_1",
    "validation/pass_at_4",
    "validation/pass_k",
    "validation/truncation_rate",
    "train/gpu_memory_gib",
    "memory/process_peak_gib",
    "train/token_mult_prob_error",
]
DPO = [
    "train/loss",
    "train/preference_loss",
    "train/accuracy",
    "train/rewards_chosen_mean",
    "train/rewards_rejected_mean",
    "validation-default/loss",
    "validation-default/accuracy",
    "validation-default/kl_to_reference",
    "validation-hard/loss",
    "validation-default/exact_match",
    "timing/train/total_step_time",
]


def drawn(names: list[str]) -> dict[str, list[str]]:
    return {figure.title: [line.metric for line in figure.lines] for figure in figures_of(names)}


def test_a_grpo_run_has_every_plot_that_its_reader_needs() -> None:
    plots = drawn(GRPO)
    for title, metric in {
        "Loss": "train/loss",
        "Reward": "train/reward",
        "Spread of the reward": "train/reward_std_within_groups",
        "KL to the reference": "train/reference_kl",
        "Length of the answers": "train/mean_gen_tokens_per_sample",
        "Truncated answers": "train/truncation_rate",
        "Entropy": "train/approx_entropy",
        "Clip share": "train/clip_high_share",
        "Held-out reward": "validation/accuracy",
        "Tokens a second": "timing/train/tokens_per_sec",
        "Memory": "train/gpu_memory_gib",
        "Parts of a step": "timing/train/generation",
    }.items():
        assert metric in plots[title]
    assert "Accuracy" not in plots, "of prompts with rewards it is the held-out reward"


def test_the_reward_has_a_band_of_its_extremes() -> None:
    reward = next(figure for figure in figures_of(GRPO) if figure.key == "reward")
    assert reward.lines[0].band == ("train/reward_min", "train/reward_max")
    assert figures_of(["train/reward"])[0].lines[0].band is None


def test_validation_sets_are_curves_of_one_plot_with_their_names() -> None:
    figures = {figure.key: figure for figure in figures_of(DPO)}
    labels = [(line.label, line.metric) for line in figures["loss"].lines]
    assert labels == [
        ("train", "train/loss"),
        ("validation", "validation-default/loss"),
        ("validation hard", "validation-hard/loss"),
    ]
    assert [line.metric for line in figures["accuracy"].lines] == ["train/accuracy", "validation-default/accuracy"]


def test_every_metric_is_drawn_once_and_in_the_order_of_the_sections() -> None:
    names = [*GRPO, "train/new_thing", "a b/<c>", "validation/new"]
    figures = figures_of(names)
    metrics = [name for figure in figures for line in figure.lines for name in (line.metric, *(line.band or ()))]
    assert sorted(metrics) == sorted(set(names) - {"train/wd", "validation/pass_k"})
    order = [SECTIONS.index(figure.section) for figure in figures]
    assert order == sorted(order)
    assert len({figure.key for figure in figures}) == len(figures)


def test_nothing_is_drawn_of_nothing() -> None:
    assert figures_of([]) == []
    assert figures_of(["time", "epoch"]) == []


def test_parts_of_a_step_come_in_the_order_in_which_they_happen() -> None:
    assert [label for _, label in time_parts(GRPO)] == ["generation", "reward", "logprobs", "policy training"]
    assert "Parts of a step" not in drawn(DPO), "one part is the whole"


def test_the_docs_explain_every_plot() -> None:
    text = (root() / "docs" / "reports.md").read_text()
    titles = [figure.title for figure in figures_of([*GRPO, *DPO])]
    assert [title for title in titles if not re.search(rf"^\| {re.escape(title)} \|", text, re.M)] == []
