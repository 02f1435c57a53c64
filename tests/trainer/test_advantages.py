"""From rewards to advantages, against numbers worked by hand and against NeMo-RL's formulas in float64 numpy.

Legend: B sequences.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_launch.trainer.advantages import (
    RewardScaling,
    RewardShaping,
    advantages,
    clip_advantages,
    group_ids,
    group_statistics,
    not_truncated,
    scale_rewards,
    set_advantages,
    shape_rewards,
    varied,
)


def of_group(rewards: list[float], *, others: bool, normalize: bool = True) -> list[float]:
    """Advantages of one group, against the others' mean or the group's."""
    values = torch.tensor(rewards)
    baselines, stds = group_statistics(values, torch.zeros(len(rewards), dtype=torch.int64), leave_one_out=others)
    return advantages(values, baselines, stds, normalize=normalize).tolist()


# -- groups ------------------------------------------------------------------------------------------------------------


def test_identical_prompts_are_one_group_wherever_they_stand():
    prompts = [np.array(ids, dtype) for ids, dtype in (([1, 2], "i8"), ([1], "i4"), ([1, 2], "i4"), ([2, 1], "i8"))]
    assert group_ids(prompts).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("rewards", "others", "expected"),
    [
        # Two: the other's deviation is 0, so nothing is divided; of both it is 1/√2, and ±0.5 / 0.7071 = ±0.7071.
        ([1, 0], True, [1, -1]),
        ([1, 0], False, [0.70711, -0.70711]),
        # One of four right. Of the wrong ones' others: mean 1/3, deviation 0.57735; of all: mean 1/4, deviation 0.5.
        ([1, 0, 0, 0], True, [1, -0.57735, -0.57735, -0.57735]),
        ([1, 0, 0, 0], False, [1.5, -0.5, -0.5, -0.5]),
        # Two of four: means of others 1/3 and 2/3, deviation 0.57735; of all 1/2 and 0.57735.
        ([1, 1, 0, 0], True, [1.1547, 1.1547, -1.1547, -1.1547]),
        ([1, 1, 0, 0], False, [0.86603, 0.86603, -0.86603, -0.86603]),
        # One of sixteen: others' mean 1/15, deviation √(1/15) = 0.2582; of all 1/16 and 0.25.
        ([1] + [0] * 15, True, [1] + [-0.2582] * 15),
        ([1] + [0] * 15, False, [3.75] + [-0.25] * 15),
        ([0.5, 0.5, 0.5], True, [0, 0, 0]),
        ([0.5, 0.5, 0.5], False, [0, 0, 0]),
        ([7.0], True, [0]),
        ([7.0], False, [0]),
    ],
)
def test_normalised_advantages_by_hand(rewards, others, expected):
    """Divided by deviation + 1e-6, which shows in the sixth digit."""
    assert of_group(rewards, others=others) == pytest.approx(expected, abs=2e-5)


def test_advantages_that_are_not_normalised_are_differences():
    assert of_group([1, 0, 0, 0], others=True, normalize=False) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert of_group([1, 0, 0, 0], others=False, normalize=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_the_deviation_and_its_1e_6_are_those_of_nemo_rl():
    """Deviation of (0, 2e-6) is √2·1e-6, and ±1e-6 / (1.41421e-6 + 1e-6) = ±0.41421."""
    assert of_group([0, 2e-6], others=False) == pytest.approx([-0.41421, 0.41421], abs=1e-5)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("size", [3, 5, 7, 10, 16, 33])
def test_equal_rewards_have_no_deviation_however_their_mean_rounds(value, size):
    """A deviation of 1e-17 in place of 0 would turn the difference of the odd one out into an advantage of -1e5."""
    for others in (True, False):
        assert of_group([value] * size, others=others) == [0.0] * size
    odd = of_group([value - 0.5] + [value] * (size - 1), others=True)
    assert odd[0] == pytest.approx(-0.5, rel=1e-5, abs=1e-6 * abs(value))


def test_groups_do_not_touch_one_another():
    """Interleaved, of different size, numbered at will; each as if it were alone."""
    groups = torch.tensor([9, 2, 9, 2, 9, 5])
    rewards = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0, 4.0])
    baselines, stds = group_statistics(rewards, groups, leave_one_out=False)
    got = advantages(rewards, baselines, stds, normalize=True)
    for group in (9, 2, 5):
        there = groups == group
        assert got[there].tolist() == pytest.approx(of_group(rewards[there].tolist(), others=False))


def test_samples_whose_reward_is_not_known_do_not_vote():
    """The last of (1, 0, 0.5, lost): as a group of three; the lost one's own advantage is masked elsewhere."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 99.0]), torch.zeros(4, dtype=torch.int64)
    votes = torch.tensor([1, 1, 1, 0])
    for others in (True, False):
        baselines, stds = group_statistics(rewards, groups, leave_one_out=others, votes_B=votes)
        got = advantages(rewards, baselines, stds, normalize=True)
        assert got[:3].tolist() == pytest.approx(of_group([1, 0, 0.5], others=others))
        assert math.isfinite(got[3])


def test_a_group_of_which_one_is_known_learns_nothing():
    rewards, groups = torch.tensor([1.0, 0.0, 5.0]), torch.zeros(3, dtype=torch.int64)
    for others in (True, False):
        baselines, stds = group_statistics(rewards, groups, leave_one_out=others, votes_B=torch.tensor([0, 0, 1]))
        assert advantages(rewards, baselines, stds, normalize=True).tolist() == [0, 0, 0]


def nemo_rl(rewards: np.ndarray, groups: np.ndarray, others: bool) -> np.ndarray:
    """calculate_baseline_and_std_per_prompt and GRPOAdvantageEstimator, with numpy's own standard deviation."""
    out = np.zeros_like(rewards)
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        seen = (groups == group) & ((np.arange(len(rewards)) != i) | (not others))
        alone = (groups == group).sum() == 1
        base = reward if alone else rewards[seen].mean()
        std = rewards[seen].std(ddof=1) if seen.sum() > 1 else 0.0
        out[i] = (reward - base) / (std + 1e-6) if std > 0 else reward - base
    return out


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-8, 8)), min_size=1, max_size=24), st.booleans())
def test_advantages_are_nemo_rls(rows, others):
    """Rewards in eighths, whose sums are exact, so that equal ones have no deviation there either."""
    groups, rewards = np.array([row[0] for row in rows]), np.array([row[1] for row in rows]) / 8
    baselines, stds = group_statistics(torch.from_numpy(rewards), torch.from_numpy(groups), leave_one_out=others)
    got = advantages(torch.from_numpy(rewards), baselines, stds, normalize=True)
    np.testing.assert_allclose(got.numpy(), nemo_rl(rewards, groups, others), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-50, 50), st.data())
def test_advantages_do_not_depend_on_the_rewards_scale_offset_or_order(rewards, scale, offset, data):
    """But for the 1e-6 beside the deviation, hence deviations of at least 0.1 only."""
    values = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.zeros(len(values), dtype=torch.int64)
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))

    def compute(values: Tensor) -> tuple[Tensor, Tensor]:
        baselines, stds = group_statistics(values, groups, leave_one_out=False)
        return advantages(values, baselines, stds, normalize=True), stds

    expected, stds = compute(values)
    if stds[0] < 0.1:
        return
    got, _ = compute((values * scale + offset)[order])
    torch.testing.assert_close(got, expected[order], rtol=1e-3, atol=1e-4)
    assert abs(float(expected.sum())) < 1e-4


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_cut_and_mapped():
    """[-1, 1] to [0, 10]: -3 counts as -1, 2 as 1."""
    scaling = RewardScaling(source_min=-1, source_max=1, target_min=0, target_max=10)
    assert scale_rewards(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]), scaling).tolist() == [0, 0, 5, 7.5, 10, 10]
    same = torch.tensor([0.0, 0.25, 1.0])
    assert scale_rewards(same, RewardScaling()).tolist() == same.tolist()
    turned = RewardScaling(target_min=1, target_max=-1)
    assert scale_rewards(same, turned).tolist() == [1, 0.5, -1]


def test_overlong_answers_lose_reward_by_the_token():
    """100 wanted, buffer 20, penalty 1: nothing up to 80, half at 90, all of 1 at 100, and on at the same rate."""
    shaping = RewardShaping(max_response_length=100, overlong_buffer_length=20, overlong_buffer_penalty=1.0)
    lengths = torch.tensor([1, 80, 90, 100, 120])
    shaped = shape_rewards(torch.ones(5), lengths, torch.zeros(5), shaping)
    assert shaped.tolist() == pytest.approx([1, 1, 0.5, 0, -1])
    doubled = RewardShaping(max_response_length=100, overlong_buffer_length=20, overlong_buffer_penalty=2.0)
    assert shape_rewards(torch.ones(5), lengths, torch.zeros(5), doubled).tolist() == pytest.approx([1, 1, 0, -1, -3])


def test_answers_that_did_not_stop_keep_a_share_instead():
    shaping = RewardShaping(max_response_length=100, stop_properly_penalty_coef=0.25)
    rewards, lengths = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([500, 500, 500])
    assert shape_rewards(rewards, lengths, torch.tensor([0, 1, 1]), shaping).tolist() == [1, 0.25, -0.5]


# -- who counts --------------------------------------------------------------------------------------------------------


def test_dynamic_sampling_keeps_groups_whose_rewards_differ():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    _, stds = group_statistics(rewards, groups, leave_one_out=False)
    assert varied(stds).tolist() == [False, False, True, True, False, False, False]


def test_dynamic_sampling_does_not_take_lengths_for_variance():
    """All right, of different length: shaped rewards differ, the group teaches only to be short, and is left out."""
    rewards, groups = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    shaped = shape_rewards(rewards, torch.tensor([10, 100]), torch.zeros(2), RewardShaping(100, 50))
    assert varied(group_statistics(shaped, groups, leave_one_out=False)[1]).all()
    assert not varied(group_statistics(rewards, groups, leave_one_out=False)[1]).any()


def test_truncated_answers_are_left_out_of_the_loss():
    assert not_truncated(torch.tensor([True, False, True])).tolist() == [0, 1, 0]


def test_flagged_samples_are_given_their_advantage():
    values = torch.tensor([1.0, -1.0])
    assert set_advantages(values, torch.tensor([1, 0]), -5.0).tolist() == [-5, -1]
    assert set_advantages(values, torch.tensor([1, 0]), None) is values


def test_advantages_are_clipped_where_a_bound_is_given():
    values = torch.tensor([-9.0, 0.5, 9.0])
    assert clip_advantages(values, -2, 3).tolist() == [-2, 0.5, 3]
    assert clip_advantages(values, None, 3).tolist() == [-9, 0.5, 3]
    assert clip_advantages(values, -2, None).tolist() == [-2, 0.5, 9]
    assert clip_advantages(values, None, None) is values
