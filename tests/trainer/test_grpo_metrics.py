"""What GRPO logs, against numbers worked by hand.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from nemotron_launch.trainer.grpo_metrics import (
    Means,
    advantage_metrics,
    engine_metrics,
    length_metrics,
    ratio_metrics,
    reward_metrics,
    sequence_error_metrics,
    sequence_errors,
)

LN2 = math.log(2)
MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
MEANS = Means(MASK, torch.ones(2), torch.tensor(3.0), torch.tensor(2.0))


def test_means_of_tokens_and_of_sequences():
    values = torch.tensor([[1.0, 3.0], [6.0, 99.0]])
    assert MEANS.tokens(values).item() == pytest.approx(10 / 3)
    assert MEANS.sequences(values).item() == pytest.approx((2 + 6) / 2)
    assert MEANS.each_sequence(values).item() == pytest.approx((1 + 6) / 2)


def test_sums_of_many_tokens_keep_their_digits():
    """A million times 0.1, which is 0.100000001490116 in fp32, where sums would drift."""
    values = torch.full((1, 1_000_000), 0.1)
    means = Means(torch.ones_like(values), torch.ones(1), torch.tensor(1.0), torch.tensor(1.0))
    assert means.tokens(values).item() == pytest.approx(100_000.001490116, rel=2e-8)


def test_engine_metrics_by_hand():
    """The trainer finds tokens 2, 1/2 and 1 times as probable as the engine; probabilities 1/4 and 1/8, and so on.

    k3 of gen against prev, d = prev - gen: 1 - ln 2, ln 2 - 1/2, 0; the other way round the same two, exchanged.
    """
    prev = torch.tensor([[1 / 4, 1 / 8], [1 / 2, 1 / 2]]).log()
    gen = torch.tensor([[1 / 8, 1 / 4], [1 / 2, 1 / 16]]).log()
    got = {name: value.item() for name, value in engine_metrics(prev, gen, MEANS, kind="k3").items()}
    assert got["token_mult_prob_error"] == pytest.approx((2 + 2 + 1) / 3)
    assert got["gen_kl_error"] == pytest.approx((1 - LN2 + LN2 - 0.5) / 3, abs=1e-7)
    assert got["policy_kl_error"] == pytest.approx((LN2 - 0.5 + 1 - LN2) / 3, abs=1e-7)
    # The mixture of 1/4 and 1/8 is 3/16: ratios 4/3 and 2/3 to it.
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in (4 / 3, 2 / 3)) / 2
    assert got["js_divergence_error"] == pytest.approx(2 * k3 / 3, abs=1e-7)


def test_engines_that_agree_have_error_1_and_no_divergence():
    logps = torch.tensor([[-1.0, -70.0], [-3.0, 0.0]])
    got = {name: value.item() for name, value in engine_metrics(logps, logps, MEANS, kind="k3").items()}
    assert got.pop("token_mult_prob_error") == pytest.approx(1)
    assert list(got.values()) == pytest.approx([0, 0, 0], abs=1e-7)


def test_engine_metrics_of_hopeless_tokens_are_numbers():
    """e^-200 is 0 in fp32; the mixture's logarithm must not be that of 0."""
    prev, gen = torch.tensor([[-200.0, -200.0], [-1.0, 0.0]]), torch.tensor([[-210.0, -200.0], [-1.0, 0.0]])
    got = engine_metrics(prev, gen, MEANS, kind="k3")
    assert all(math.isfinite(value.item()) for value in got.values())


def test_clip_shares_count_where_the_gradient_stops():
    """Too high with a positive advantage, too low with a negative one; of CISPO every ratio that is cut."""
    ratios, clipped = torch.tensor([[1.5, 0.5], [1.5, 9.0]]), torch.tensor([[1.2, 0.8], [1.2, 1.2]])
    positive = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    got = ratio_metrics(ratios, clipped, positive, MEANS, cispo=False)
    assert (got["clip_high_share"].item(), got["clip_low_share"].item()) == (pytest.approx(1 / 3), 0)
    got = ratio_metrics(ratios, clipped, -positive, MEANS, cispo=False)
    assert (got["clip_high_share"].item(), got["clip_low_share"].item()) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    got = ratio_metrics(ratios, clipped, positive, MEANS, cispo=True)
    assert (got["clip_high_share"].item(), got["clip_low_share"].item()) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (got["probs_ratio_min"].item(), got["probs_ratio_max"].item()) == (0.5, 1.5)


def test_sequence_errors_are_means_over_their_own_tokens():
    prev = torch.tensor([[0.0, 0.0], [0.0, math.nan]])
    gen = torch.tensor([[LN2, -LN2], [0.0, 0.0]])
    assert sequence_errors(prev, gen, MASK).tolist() == pytest.approx([2, 1])
    assert sequence_errors(prev, gen, torch.zeros(2, 2)).tolist() == [0, 0]


def test_what_the_error_threshold_did_is_told():
    errors, rewards = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    before = torch.tensor([1.0, 1.0, 1.0, 0.0])
    got = sequence_error_metrics(errors, before, before * (errors <= 1.5), rewards)
    assert got == {
        "num_masked_seqs_by_logprob_error": 2,
        "masked_correct_pct": 0.5,
        "max_seq_mult_prob_error": 3,
        "mean_seq_mult_prob_error": 2,
        "min_seq_mult_prob_error": 1,
        "max_seq_mult_prob_error_after_mask": 1,
        "mean_seq_mult_prob_error_after_mask": 1,
        "min_seq_mult_prob_error_after_mask": 1,
    }


def test_reward_metrics_by_hand():
    """Groups (1, 0), (1, 1), (0, 0), (0.5): variances 0.5, 0, 0; means 0.5, 1, 0, 0.5."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.0])
    groups = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    got = reward_metrics(rewards, groups)
    assert got == pytest.approx(
        {
            "reward": 0.5,
            "reward_min": 0,
            "reward_max": 1,
            "reward_std": math.sqrt(1.5 / 6),  # six are 0.5 from the mean
            "reward_std_within_groups": math.sqrt(0.5 / 3),
            "reward_std_between_groups": math.sqrt(0.5 / 3),
            "groups_without_variance": 3 / 4,  # the single one too
            "all_best_groups": 1 / 4,
            "all_worst_groups": 1 / 4,
        }
    )


def test_rewards_that_are_all_equal_are_neither_best_nor_worst():
    got = reward_metrics(torch.full((4,), 0.3), torch.tensor([0, 0, 1, 1]))
    assert (got["groups_without_variance"], got["all_best_groups"], got["all_worst_groups"]) == (1, 0, 0)
    assert got["reward_std"] == got["reward_std_within_groups"] == got["reward_std_between_groups"] == 0


def test_one_rollout_has_no_spread():
    got = reward_metrics(torch.tensor([0.7]), torch.tensor([3]))
    assert got["reward"] == pytest.approx(0.7)
    assert got["reward_std"] == got["reward_std_within_groups"] == got["reward_std_between_groups"] == 0


def test_length_metrics_by_hand():
    got = length_metrics(torch.tensor([3, 5]), torch.tensor([10, 20]), torch.tensor([False, True]))
    assert got == {
        "mean_prompt_length": 15,
        "mean_gen_tokens_per_sample": 4,
        "max_gen_tokens_per_sample": 5,
        "total_num_tokens": 38,
        "truncation_rate": 0.5,
    }


def test_advantage_metrics_weigh_tokens_and_leave_masked_samples_out():
    advantages, lengths = torch.tensor([1.0, -2.0, 50.0]), torch.tensor([3, 1, 7])
    got = advantage_metrics(advantages, lengths, torch.tensor([1.0, 1.0, 0.0]))
    assert got == {"advantages/mean": pytest.approx(1 / 4), "advantages/min": -2, "advantages/max": 1}
    assert set(advantage_metrics(advantages, lengths, torch.zeros(3)).values()) == {0.0}
