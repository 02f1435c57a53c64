"""Losses against numbers worked by hand, and against NeMo-RL's formulas written anew in float64 numpy.

Legend: B sequences, S tokens, M pairs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_launch.trainer.losses import DPOWeights, dpo_loss, kl_k1, sequence_logps, sft_loss

LN2 = math.log(2)
# What adds up over micro-batches; num_valid_samples does too, the others are already shares of the global batch.
ADDITIVE = ("loss", "preference_loss", "sft_loss", "accuracy", "policy_accuracy", "rewards_chosen_mean")

# Two pairs of at most three tokens; the second rejected answer is two tokens long, the last column of it padding.
LOGPS = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -1.0, -3.0], [-0.25, -0.75, -1.0], [-2.0, -1.0, -9.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
# Sums: -3.5, -5.5, -2, -3. Against these reference sums, the rewards are 0.5, -1, -1, 0.5.
REFERENCE = torch.tensor([-4.0, -4.5, -1.0, -3.5], dtype=torch.float64)
ALL_VALID = torch.ones(2)


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def dpo(
    logps_BS: Tensor = LOGPS,
    ref_B: Tensor = REFERENCE,
    mask_BS: Tensor = MASK,
    valid_M: Tensor = ALL_VALID,
    *,
    pairs: float | None = None,
    **weights: float | bool,
) -> dict[str, float]:
    valid_pairs = torch.tensor(float(valid_M.sum()) if pairs is None else pairs, dtype=torch.float64)
    loss, metrics = dpo_loss(logps_BS, ref_B, mask_BS, valid_M, DPOWeights(**weights), valid_pairs=valid_pairs)
    values = {name: value.item() for name, value in metrics.items()}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(values["loss"], rel=1e-6, abs=1e-6)
    return values


def test_a_sequences_log_probability_is_the_sum_of_its_masked_tokens():
    assert sequence_logps(LOGPS, MASK).tolist() == [-3.5, -5.5, -2.0, -3.0]
    assert sequence_logps(LOGPS, MASK, average=True).tolist() == pytest.approx([-3.5 / 3, -5.5 / 3, -2 / 3, -1.5])
    assert sequence_logps(LOGPS, MASK).dtype == torch.float64
    nothing = sequence_logps(LOGPS, torch.zeros(4, 3), average=True)
    assert nothing.tolist() == [0.0] * 4


def test_sums_of_long_sequences_keep_their_last_digits():
    """100,000 tokens of -0.1 in fp32: 0.1 is 0.100000001490116 there, and fp32 sums drift by more than that adds."""
    logps = torch.full((1, 100_000), -0.1)
    assert sequence_logps(logps, torch.ones_like(logps)).item() == pytest.approx(-10_000.0001490116, abs=1e-6)


def test_dpo_by_hand():
    """Margins 1.5 and -1.5 at beta 0.1: (-ln σ(0.15) - ln σ(-0.15)) / 2."""
    got = dpo(reference_policy_kl_penalty=0.1)
    expected = -(logsigmoid(0.15) + logsigmoid(-0.15)) / 2
    assert expected == pytest.approx(0.695957, abs=1e-6)
    assert got == pytest.approx(
        {
            "loss": expected,
            "preference_loss": expected,
            "sft_loss": (3.5 + 2.0) / 2,
            "accuracy": 0.5,  # 0.5 > -1, and not -1 > 0.5
            "policy_accuracy": 1.0,  # -3.5 > -5.5 and -2 > -3
            "rewards_chosen_mean": -0.25,
            "rewards_rejected_mean": -0.25,
            "num_valid_samples": 2.0,
        },
        abs=1e-7,
    )


def test_dpo_averaged_over_tokens_by_hand():
    """Rewards 0.5/3, -1/3, -1/3, 0.5/2 make margins 0.5 and -7/12; policy means -3.5/3 > -5.5/3 and -2/3 > -3/2."""
    got = dpo(reference_policy_kl_penalty=2.0, preference_average_log_probs=True)
    assert got["preference_loss"] == pytest.approx(-(logsigmoid(1.0) + logsigmoid(-7 / 6)) / 2, abs=1e-7)
    assert got["rewards_chosen_mean"] == pytest.approx((0.5 / 3 - 1 / 3) / 2)
    assert got["rewards_rejected_mean"] == pytest.approx((-1 / 3 + 0.25) / 2)
    assert got["policy_accuracy"] == 1.0


def test_averaging_can_turn_the_policys_order():
    """Ten tokens of -0.2 against two of -0.5: less likely in all, more likely per token."""
    logps = torch.zeros(2, 10)
    logps[0], logps[1, :2] = -0.2, -0.5
    mask = torch.ones(2, 10)
    mask[1, 2:] = 0
    one = torch.ones(1)
    reference = torch.zeros(2, dtype=torch.float64)
    assert dpo(logps, reference, mask, one)["policy_accuracy"] == 0
    assert dpo(logps, reference, mask, one, preference_average_log_probs=True)["policy_accuracy"] == 1


@pytest.mark.parametrize(("average", "sft"), [(False, (3.5 + 2.0) / 2), (True, (3.5 / 3 + 2 / 3) / 2)])
def test_the_sft_term_is_the_chosen_answers_likelihood(average, sft):
    got = dpo(sft_loss_weight=0.3, preference_loss_weight=2.0, sft_average_log_probs=average)
    assert got["sft_loss"] == pytest.approx(sft)
    assert got["loss"] == pytest.approx(2.0 * got["preference_loss"] + 0.3 * sft)


def test_before_the_first_step_the_loss_is_ln_2_and_nothing_is_accurate():
    """Policy and reference are the same: margins 0, and ties count as wrong."""
    got = dpo(ref_B=sequence_logps(LOGPS, MASK))
    assert got["preference_loss"] == pytest.approx(LN2, abs=1e-8)
    assert (got["accuracy"], got["policy_accuracy"]) == (0.0, 1.0)
    assert (got["rewards_chosen_mean"], got["rewards_rejected_mean"]) == (0.0, 0.0)


def test_equal_answers_are_not_accurate_to_the_policy_either():
    got = dpo(LOGPS[[0, 0]], REFERENCE[:2], MASK[:2], torch.ones(1))
    assert got["policy_accuracy"] == 0.0


def test_rewards_are_not_scaled_by_beta():
    assert dpo(reference_policy_kl_penalty=0.1)["rewards_chosen_mean"] == -0.25
    assert dpo(reference_policy_kl_penalty=5.0)["rewards_chosen_mean"] == -0.25


def test_a_pair_that_is_too_long_counts_nowhere():
    valid = torch.tensor([1.0, 0.0])
    got = dpo(mask_BS=MASK * valid.repeat_interleave(2)[:, None], valid_M=valid, sft_loss_weight=0.5)
    alone = dpo(LOGPS[:2], REFERENCE[:2], MASK[:2], torch.ones(1), sft_loss_weight=0.5)
    assert got == pytest.approx(alone)
    assert got["num_valid_samples"] == 1


def test_a_batch_without_a_valid_pair_has_loss_and_gradient_zero():
    logps = LOGPS.clone().requires_grad_()
    none = torch.zeros(2)
    loss, metrics = dpo_loss(
        logps, REFERENCE, MASK, none, DPOWeights(sft_loss_weight=1.0), valid_pairs=torch.tensor(0.0)
    )
    loss.backward()
    assert loss.item() == 0
    assert not logps.grad.any()
    assert [value.item() for value in metrics.values()] == [0.0] * len(metrics)


def test_dpo_gradient_by_hand():
    """d/d logp of -ln σ(β·m) is ∓β·σ(-β·m), on each masked token, over the number of pairs; NeMo-RL's sign."""
    logps = LOGPS.clone().requires_grad_()
    loss, _ = dpo_loss(
        logps, REFERENCE, MASK, ALL_VALID, DPOWeights(reference_policy_kl_penalty=0.1), valid_pairs=torch.tensor(2.0)
    )
    loss.backward()
    first = 0.1 / (1 + math.exp(0.15)) / 2  # margin 1.5
    second = 0.1 / (1 + math.exp(-0.15)) / 2  # margin -1.5
    expected = torch.tensor([[-first], [first], [-second], [second]]) * MASK
    torch.testing.assert_close(logps.grad, expected, atol=1e-8, rtol=1e-6)


def test_sft_by_hand():
    """The eleven tokens sum to -14."""
    loss, metrics = sft_loss(LOGPS, MASK, valid_tokens=torch.tensor(11.0))
    assert loss.item() == pytest.approx(14 / 11)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"loss": 14 / 11, "num_valid_tokens": 11}
    )


def test_sft_of_nothing_is_zero():
    loss, metrics = sft_loss(LOGPS, torch.zeros(4, 3), valid_tokens=torch.tensor(0.0))
    assert (loss.item(), metrics["num_valid_tokens"].item()) == (0.0, 0.0)


def test_kl_by_hand():
    """log policy - log reference of the masked tokens: 0.5, -0.25 and, left out, 7."""
    policy = torch.tensor([[-1.0, -0.5, -1.0]])
    reference = torch.tensor([[-1.5, -0.25, -8.0]])
    assert kl_k1(policy, reference, torch.tensor([[1.0, 1.0, 0.0]])).item() == 0.25


def test_kl_estimate_of_many_samples_is_the_kl():
    """p = (.7, .2, .1), q = (.2, .3, .5): KL = .7 ln 3.5 + .2 ln (2/3) + .1 ln .2 = 0.634; a million samples."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = 0.7 * math.log(3.5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.2)
    drawn = torch.multinomial(p, 1_000_000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    estimate = kl_k1(p.log()[drawn], q.log()[drawn], torch.ones_like(drawn)) / 1_000_000
    assert estimate.item() == pytest.approx(exact, abs=4e-3)  # four standard errors of 0.00095


# -- NeMo-RL's formulas (nemo_rl/algorithms/loss_functions.py: PreferenceLossFn, DPOLossFn, NLLLossFn) -----------------


def masked_mean(values: np.ndarray, mask: np.ndarray, norm: float) -> float:
    return float((values * mask).sum() / (norm + 1e-8))


def nemo_rl(
    logps: np.ndarray, ref: np.ndarray, token_mask: np.ndarray, sample_mask: np.ndarray, w: DPOWeights, pairs: float
) -> dict[str, float]:
    """ref: token log-probabilities; sample_mask: one number a sequence, as NeMo-RL has it."""
    mask = token_mask * sample_mask[:, None]
    lengths = np.maximum(mask.sum(1), 1)
    rewards = ((logps - ref) * mask).sum(1)
    if w.preference_average_log_probs:
        rewards = rewards / lengths
    chosen, rejected, sample = rewards[::2], rewards[1::2], sample_mask[::2]
    per_pair = np.log1p(np.exp(-w.reference_policy_kl_penalty * (chosen - rejected)))
    preference = masked_mean(per_pair, sample, pairs)
    likelihood = -(logps * mask).sum(1)
    if w.sft_average_log_probs:
        likelihood = likelihood / lengths
    sft = masked_mean(likelihood[::2], sample, pairs)
    return {
        "loss": w.sft_loss_weight * sft + w.preference_loss_weight * preference,
        "preference_loss": preference,
        "sft_loss": sft,
        "accuracy": masked_mean(chosen > rejected, sample, pairs),
        "rewards_chosen_mean": masked_mean(chosen, sample, pairs),
        "rewards_rejected_mean": masked_mean(rejected, sample, pairs),
        "num_valid_samples": float(sample.sum()),
    }


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], DPOWeights]:
    """Random log-probabilities and masks (some rows without a token, some pairs invalid), and random weights."""
    pairs, tokens = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2 * pairs, tokens)
    valid = rng.random(pairs) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    values = {
        "logps": -rng.exponential(2.0, shape),
        "ref": -rng.exponential(2.0, shape),
        "tokens": (rng.random(shape) < draw(st.sampled_from([0.1, 0.7, 1.0]))).astype(float),
        "valid": valid.astype(float),
    }
    weights = DPOWeights(
        reference_policy_kl_penalty=draw(st.floats(0.01, 2.0)),
        preference_loss_weight=draw(st.floats(0.0, 2.0)),
        sft_loss_weight=draw(st.floats(0.0, 2.0)),
        preference_average_log_probs=draw(st.booleans()),
        sft_average_log_probs=draw(st.booleans()),
    )
    return values, weights


def computed(
    values: dict[str, np.ndarray], weights: DPOWeights, rows: slice = slice(None), pairs: float | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics and gradient of our loss in fp64, on some of the pairs, divided by the valid ones of all."""
    sample = values["valid"].repeat(2)[:, None]
    both = slice(None if rows.start is None else 2 * rows.start, None if rows.stop is None else 2 * rows.stop)
    mask = torch.from_numpy((values["tokens"] * sample)[both])
    logps = torch.from_numpy(values["logps"][both]).requires_grad_()
    reference = sequence_logps(torch.from_numpy(values["ref"][both]), mask)
    total = torch.tensor(values["valid"].sum() if pairs is None else pairs)
    loss, metrics = dpo_loss(
        logps, reference, mask, torch.from_numpy(values["valid"][rows]), weights, valid_pairs=total
    )
    loss.backward()
    return {name: value.item() for name, value in metrics.items()}, logps.grad.numpy()


@settings(deadline=None, max_examples=200)
@given(batches())
def test_dpo_is_nemo_rls_formula(case):
    values, weights = case
    got, _ = computed(values, weights)
    expected = nemo_rl(
        values["logps"], values["ref"], values["tokens"], values["valid"].repeat(2), weights, values["valid"].sum()
    )
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-7, abs=1e-7)


@settings(deadline=None, max_examples=100)
@given(batches(), st.data())
def test_micro_batches_add_up_to_the_batch_however_it_is_cut(case, data):
    values, weights = case
    count = len(values["valid"])
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    whole, gradient = computed(values, weights)
    parts = [
        computed(values, weights, slice(start, stop), values["valid"].sum())
        for start, stop in zip([0, *cuts], [*cuts, count], strict=True)
    ]
    for name in (*ADDITIVE, "num_valid_samples"):
        assert sum(metrics[name] for metrics, _ in parts) == pytest.approx(whole[name], rel=1e-9, abs=1e-9), name
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), gradient, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(batches())
def test_an_invalid_pair_might_as_well_not_be_there(case):
    values, weights = case
    kept = values["valid"] > 0
    got, gradient = computed(values, weights)
    assert not gradient[~kept.repeat(2)].any()
    assert all(math.isfinite(value) for value in got.values())
    if kept.any():
        fewer = {name: value[kept if len(value) == len(kept) else kept.repeat(2)] for name, value in values.items()}
        assert got == pytest.approx(computed(fewer, weights)[0], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(batches())
def test_what_the_answers_share_does_not_matter(case):
    """Adding the same to the policy's and the reference's token changes no preference: only ratios count."""
    values, weights = case
    shift = np.linspace(-1, 1, values["logps"].size).reshape(values["logps"].shape)
    moved = {**values, "logps": values["logps"] + shift, "ref": values["ref"] + shift}
    before, after = computed(values, weights)[0], computed(moved, weights)[0]
    assert after["preference_loss"] == pytest.approx(before["preference_loss"], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_sft_is_the_mean_over_the_global_batchs_tokens(rows, tokens, seed):
    """numpy in float64, and the same when each row is a micro-batch of its own."""
    rng = np.random.default_rng(seed)
    logps, mask = -rng.exponential(2.0, (rows, tokens)), (rng.random((rows, tokens)) < 0.6).astype(float)
    total = torch.tensor(mask.sum())
    parts = [
        sft_loss(torch.from_numpy(logps[i : i + 1]), torch.from_numpy(mask[i : i + 1]), valid_tokens=total)
        for i in range(rows)
    ]
    got = sum(metrics["loss"].item() for _, metrics in parts)
    assert got == pytest.approx(-(logps * mask).sum() / (mask.sum() + 1e-8), abs=1e-9)
    assert sum(metrics["num_valid_tokens"].item() for _, metrics in parts) == mask.sum()
