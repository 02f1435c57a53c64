"""GRPO's losses against numbers worked by hand, and against NeMo-RL's formulas written anew in float64 numpy.

What trl has too is held to it in test_trl_grpo.py.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_launch.config.compose import compose
from nemotron_launch.resources import steps_dir
from nemotron_launch.trainer.grpo_losses import METRICS, GRPOLossConfig, grpo_loss, kl_in_advantages
from nemotron_launch.trainer.losses import token_kl

LN2 = math.log(2)
INF = math.inf
# Two answers, of three tokens and of two; ratios and generator weights as written, log-probabilities made from them.
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
RATIOS = torch.tensor([[1.0, 1.5, 0.5], [0.5, 2.0, 1.0]])
WEIGHTS = torch.tensor([[1.0, 2.0, 0.5], [4.0, 0.25, 1.0]])  # exp(prev - gen)
LOGPS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.5, 0.0]])
ADVANTAGES = torch.tensor([1.0, -1.0])
PLAIN = GRPOLossConfig(reference_policy_kl_penalty=0.0)


def run(
    config: GRPOLossConfig,
    *,
    logps: Tensor = LOGPS,
    ratios: Tensor = RATIOS,
    weights: Tensor = WEIGHTS,
    ref: Tensor | None = None,
    advantages: Tensor = ADVANTAGES,
    mask: Tensor = MASK,
    sample_mask: Tensor | None = None,
    **options: Any,
) -> tuple[dict[str, float], Tensor]:
    """Metrics, and the loss's gradient by the policy's log-probabilities, normalised by what the masks count."""
    logps = logps.clone().requires_grad_()
    previous = logps.detach() - ratios.log()
    sample_mask = torch.ones(len(logps)) if sample_mask is None else sample_mask
    loss, metrics = grpo_loss(
        logps,
        previous,
        previous - weights.log(),
        ref,
        advantages,
        mask,
        sample_mask,
        config=config,
        valid_tokens=(mask * sample_mask[:, None]).sum(),
        valid_sequences=sample_mask.sum(),
        **options,
    )
    loss.backward()
    assert logps.grad is not None
    values = {name: value.item() for name, value in metrics.items()}
    assert loss.dtype == torch.float32
    assert set(values) == set(METRICS)
    assert loss.item() == pytest.approx(values["loss"], rel=1e-6, abs=1e-6)
    return values, logps.grad


def close(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), atol=1e-6, rtol=1e-5)


def test_config_is_the_composed_section():
    folder = steps_dir() / "rl/nemo_rl/rlvr"
    section = compose(folder / "config/tiny.yaml", schema=folder / "schema.json", env={}).data["loss_fn"]
    assert vars(GRPOLossConfig.of(section)) == section
    assert vars(GRPOLossConfig()).keys() == section.keys()


# -- the policy's term -------------------------------------------------------------------------------------------------


def test_clipped_loss_of_tokens_by_hand():
    """A = 1: -1, -1.2 for -1.5 (clipped), -0.5; A = -1: 0.8 for 0.5 (clipped), 2. The five add up to 0.1."""
    got, gradient = run(PLAIN)
    assert got["loss"] == got["actor_loss"] == pytest.approx(0.1 / 5, abs=1e-7)
    close(gradient * 5, [[-1, 0, -0.5], [0, 2, 0]])
    assert (got["clip_high_share"], got["clip_low_share"]) == (pytest.approx(1 / 5), pytest.approx(1 / 5))


def test_loss_of_sequences_is_the_mean_of_each_ones_mean():
    got, gradient = run(replace(PLAIN, token_level_loss=False))
    assert got["loss"] == pytest.approx((-2.7 / 3 + 2.8 / 2) / 2, abs=1e-7)
    close(gradient, [[-1 / 6, 0, -0.5 / 6], [0, 2 / 4, 0]])


def test_the_two_clips_are_set_apart():
    """[0.6, 1.4]: -1, -1.4, -0.5 and 0.6, 2."""
    got, _ = run(replace(PLAIN, ratio_clip_min=0.4, ratio_clip_max=0.4))
    assert got["loss"] == pytest.approx(-0.3 / 5, abs=1e-7)
    got, _ = run(replace(PLAIN, ratio_clip_min=0.4, ratio_clip_max=0.6))  # -1.5 is not clipped at 1.6
    assert got["loss"] == pytest.approx(-0.4 / 5, abs=1e-7)


def test_dual_clip_bounds_the_loss_of_what_was_bad():
    """The last token's 2 becomes 1.5, without a gradient; positive advantages are not bounded."""
    got, gradient = run(replace(PLAIN, ratio_clip_c=1.5))
    assert got["loss"] == pytest.approx(-0.4 / 5, abs=1e-7)
    close(gradient * 5, [[-1, 0, -0.5], [0, 0, 0]])


def test_gspo_has_one_ratio_a_sequence():
    """exp(mean log ratio): (1 · 1.5 · 0.5)^(1/3) = 0.90856, and (0.5 · 2)^(1/2) = 1, both within the clip."""
    got, gradient = run(replace(PLAIN, token_level_loss=False, sequence_level_importance_ratios=True))
    first = 0.75 ** (1 / 3)
    assert got["loss"] == pytest.approx((-first + 1) / 2, abs=1e-7)
    close(gradient, [[-first / 6] * 3, [1 / 4, 1 / 4, 0]])
    assert got["probs_ratio_min"] == pytest.approx(first)
    assert got["probs_ratio"] == pytest.approx((3 * first + 2) / 5)


def test_gspo_clips_whole_sequences():
    config = replace(PLAIN, token_level_loss=False, sequence_level_importance_ratios=True, ratio_clip_min=0.01)
    got, gradient = run(config, advantages=torch.tensor([-1.0, -1.0]))
    assert got["loss"] == pytest.approx((0.99 + 1) / 2, abs=1e-7)
    close(gradient, [[0, 0, 0], [1 / 4, 1 / 4, 0]])
    assert got["clip_low_share"] == pytest.approx(3 / 5)


def test_cispo_weighs_the_log_probability_with_the_clipped_ratio():
    """Clipped ratios 1, 1.2, 0.8 and 0.8, 1.2, none of which stops a gradient."""
    got, gradient = run(replace(PLAIN, use_cispo=True))
    assert got["loss"] == pytest.approx((1 * 1 + 1.2 * 2 + 0.8 * 0.5 - 0.8 * 3 - 1.2 * 1.5) / 5, abs=1e-6)
    close(gradient * 5, [[-1, -1.2, -0.8], [0.8, 1.2, 0]])
    assert (got["clip_high_share"], got["clip_low_share"]) == (pytest.approx(2 / 5), pytest.approx(2 / 5))


def test_without_a_ratio_it_is_the_plain_policy_gradient():
    """-A · logp: 1 + 2 + 0.5 - 3 - 1.5. The ratio is logged all the same."""
    got, gradient = run(replace(PLAIN, disable_ppo_ratio=True))
    assert got["loss"] == pytest.approx(-1.0 / 5, abs=1e-7)
    close(gradient * 5, [[-1, -1, -1], [1, 1, 0]])
    assert got["probs_ratio"] == pytest.approx(5.5 / 5)


def test_forced_on_policy_the_ratio_is_1_and_has_a_gradient():
    got, gradient = run(replace(PLAIN, force_on_policy_ratio=True))
    assert got["loss"] == pytest.approx(-1 / 5, abs=1e-7)
    close(gradient * 5, [[-1, -1, -1], [1, 1, 0]])
    assert (got["probs_ratio_min"], got["probs_ratio_max"], got["clip_high_share"]) == (1, 1, 0)


def test_advantages_may_differ_from_token_to_token():
    advantages = torch.tensor([[1.0, -1.0, 2.0], [0.0, -3.0, 9.0]])
    got, _ = run(PLAIN, advantages=advantages)  # -1, 1.5, -1, 0, 6
    assert got["loss"] == pytest.approx(5.5 / 5, abs=1e-6)


# -- the generator's own probabilities ---------------------------------------------------------------------------------


def corrected(kind: str | None = None, high: float | None = None, low: float | None = None) -> GRPOLossConfig:
    return replace(
        PLAIN,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio=high,
        truncated_importance_sampling_ratio_min=low,
    )


@pytest.mark.parametrize(
    ("config", "total", "outside", "mean_weight"),
    [
        # The terms -1, -1.2, -0.5, 0.8, 2 times 1, 2, 0.5, 4, 0.25.
        (corrected(), -1 - 2.4 - 0.25 + 3.2 + 0.5, 0, 7.75 / 5),
        (corrected("tis", 2.0), -1 - 2.4 - 0.25 + 1.6 + 0.5, 1 / 5, 5.75 / 5),
        (corrected("tis", 2.0, 0.5), -1 - 2.4 - 0.25 + 1.6 + 1.0, 2 / 5, 6 / 5),
        (corrected("icepop", 2.0, 0.5), -1 - 2.4 - 0.25, 2 / 5, 3.5 / 5),
    ],
    ids=["whole", "tis", "tis-both-ends", "icepop"],
)
def test_correction_for_the_generator_by_hand(config, total, outside, mean_weight):
    got, _ = run(config)
    assert got["loss"] == pytest.approx(total / 5, abs=1e-6)
    assert got["is_oob_ratio"] == pytest.approx(outside)
    assert got["sampling_importance_ratio"] == pytest.approx(mean_weight)


def test_seq_mask_tis_leaves_whole_sequences_out_and_the_others_as_they_are():
    """Geometric means (1 · 2 · 0.5)^(1/3) = 1, kept with all its weights, and (4 · 1)^(1/2) = 2, left out."""
    weights = torch.tensor([[1.0, 2.0, 0.5], [4.0, 1.0, 1.0]])
    got, gradient = run(corrected("seq-mask-tis", 1.1, 0.9), weights=weights)
    assert got["loss"] == pytest.approx((-1 - 2.4 - 0.25) / 5, abs=1e-6)
    assert got["is_oob_ratio"] == pytest.approx(1 / 2)  # of sequences
    close(gradient * 5, [[-1, 0, -0.25], [0, 0, 0]])


def test_gspos_correction_is_the_sequences_product():
    """Products 1 · 2 · 0.5 = 1 and 4 · 1 = 4; the losses of the two sequences are -0.90856 and 1."""
    weights = torch.tensor([[1.0, 2.0, 0.5], [4.0, 1.0, 1.0]])
    by_sequence = {"token_level_loss": False, "sequence_level_importance_ratios": True}
    first = 0.75 ** (1 / 3)
    got, _ = run(replace(corrected(), **by_sequence), weights=weights)
    assert got["loss"] == pytest.approx((-first + 4) / 2, abs=1e-6)
    assert got["sampling_importance_ratio"] == pytest.approx(2.5)
    got, _ = run(replace(corrected("tis", 3.0), **by_sequence), weights=weights)
    assert got["loss"] == pytest.approx((-first + 3) / 2, abs=1e-6)
    got, _ = run(replace(corrected("icepop", 3.0, 0.5), **by_sequence), weights=weights)
    assert got["loss"] == pytest.approx(-first / 2, abs=1e-6)


def test_forced_on_policy_the_generator_is_corrected_for_with_the_policy_itself():
    """exp(logp - gen) = ratio · weight: 1, 3, 0.25 and 2, 0.5; times -1 and 1."""
    got, gradient = run(replace(corrected(), force_on_policy_ratio=True))
    assert got["loss"] == pytest.approx((-1 - 3 - 0.25 + 2 + 0.5) / 5, abs=1e-6)
    close(gradient * 5, [[-1, -3, -0.25], [2, 0.5, 0]])


def test_a_weight_that_is_not_finite_leaves_its_token_out():
    """A token that the generator gives no probability, exp(prev + ∞): its -1.2 · 2 is missing."""
    weights = torch.tensor([[1.0, INF, 0.5], [4.0, 0.25, 1.0]])
    got, gradient = run(corrected(), weights=weights)
    assert got["loss"] == pytest.approx((-1 - 0.25 + 3.2 + 0.5) / 5, abs=1e-6)
    assert torch.isfinite(gradient).all()


def test_without_the_correction_the_weights_are_only_logged():
    got, _ = run(PLAIN)
    assert got["loss"] == pytest.approx(0.1 / 5, abs=1e-7)
    assert got["sampling_importance_ratio"] == pytest.approx(7.75 / 5)


# -- the KL to the reference -------------------------------------------------------------------------------------------

# d = log reference - log policy
KL = {
    "k1": {LN2: -LN2, -LN2: LN2, 0.0: 0.0},
    "k2": {LN2: LN2**2 / 2, -LN2: LN2**2 / 2, 0.0: 0.0},
    "k3": {LN2: 1 - LN2, -LN2: LN2 - 0.5, 0.0: 0.0},
}


@pytest.mark.parametrize("kind", KL)
def test_kl_estimators_by_hand(kind):
    difference = torch.tensor([list(KL[kind])])
    found = token_kl(torch.zeros(1, 3), difference, kind=kind)
    assert found[0].tolist() == pytest.approx(list(KL[kind].values()), abs=1e-7)


def test_kl_estimators_of_many_samples_are_the_kl():
    """p = (.7, .2, .1), q = (.2, .3, .5): k1 and k3 are unbiased; k2 is not, and near only where p and q are."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = float((p * (p / q).log()).sum())
    drawn = torch.multinomial(p, 1_000_000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    for kind in ("k1", "k3"):
        assert token_kl(p.log()[drawn], q.log()[drawn], kind=kind).mean().item() == pytest.approx(exact, abs=4e-3)


def test_no_other_kl_estimator():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        token_kl(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")


REF = LOGPS + torch.tensor([[LN2, -LN2, 0.0], [LN2, LN2, 7.0]])
ONES = torch.ones_like(RATIOS)


@pytest.mark.parametrize(
    ("kind", "slope"),
    [
        ("k1", lambda d: -d + 1),  # the estimate itself (the score function's term), and its derivative
        ("k2", lambda d: d * d / 2 - d),
        ("k3", lambda d: math.exp(d) - 1 - d + (1 - math.exp(d))),  # = -d
    ],
)
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
def test_kl_penalty_and_its_gradient_by_hand(kind, slope, token_level):
    """NeMo-RL main: the weight exp(logp - stopgrad(logp)) is 1, and its derivative is the estimate."""
    config = replace(
        PLAIN, reference_policy_kl_penalty=0.3, reference_policy_kl_type=kind, token_level_loss=token_level
    )
    got, gradient = run(config, ref=REF, ratios=ONES, advantages=torch.zeros(2))
    table = KL[kind]
    first, second = table[LN2] + table[-LN2], 2 * table[LN2]
    expected = (first + second) / 5 if token_level else (first / 3 + second / 2) / 2
    assert got["kl_penalty"] == pytest.approx(expected, abs=1e-6)
    assert got["loss"] == pytest.approx(0.3 * expected, abs=1e-6)
    assert got["reference_kl"] == pytest.approx((-LN2 + LN2 - 2 * LN2) / 5, abs=1e-6)  # k1, of tokens, always
    up, down = slope(LN2), slope(-LN2)
    shares = [[1 / 5] * 3, [1 / 5] * 2] if token_level else [[1 / 6] * 3, [1 / 4] * 2]
    slopes = [[up, down, slope(0.0)], [up, up]]
    rows = [[0.3 * a * b for a, b in zip(*pair, strict=True)] for pair in zip(slopes, shares, strict=True)]
    close(gradient, [rows[0], [*rows[1], 0.0]])


def test_kl_weighted_to_the_policys_own_by_hand():
    """exp(logp - gen) = ratio · weight: 1, 3, 0.25, 2, 0.5 times k3 of ±ln 2 and 0; the gradient is weight · -d."""
    config = replace(PLAIN, reference_policy_kl_penalty=1.0, use_on_policy_kl_approximation=True)
    got, gradient = run(config, ref=REF, advantages=torch.zeros(2))
    up, down = KL["k3"][LN2], KL["k3"][-LN2]
    assert got["kl_penalty"] == pytest.approx((1 * up + 3 * down + 0 + 2 * up + 0.5 * up) / 5, abs=1e-6)
    close(gradient * 5, [[-LN2, 3 * LN2, 0], [-2 * LN2, -0.5 * LN2, 0]])


def test_kl_clamps_by_hand():
    """d = 25 counts as 20; k3 of 3 is 16.1, counted as 10; clamped tokens have no gradient, not even their weight's."""
    logps = torch.tensor([[-30.0, -4.0, -1.0]])
    config = replace(PLAIN, reference_policy_kl_penalty=1.0, kl_output_clamp_value=None, reference_policy_kl_type="k1")
    one = torch.ones(1, 3)
    case = {"logps": logps, "ratios": one, "weights": one, "mask": one, "advantages": torch.zeros(1)}
    ref = torch.tensor([[-5.0, -1.0, -1.0]])
    got, gradient = run(config, ref=ref, **case)
    assert got["kl_penalty"] == pytest.approx((-20 - 3 + 0) / 3)
    close(gradient * 3, [[-20, -3 + 1, 1]])  # the weight's, and where it is not clamped k1's own
    got, gradient = run(replace(config, kl_output_clamp_value=10.0, reference_policy_kl_type="k3"), ref=ref, **case)
    assert got["kl_penalty"] == pytest.approx((10 + 10 + 0) / 3)
    close(gradient, [[0, 0, 0]])


def test_the_kls_weight_comes_before_its_output_clamp():
    """8 · k3(1.5) = 8 · 1.98 is counted as 10, without a gradient; clamped before its weight it would be 15.9."""
    one = torch.ones(1, 1)
    config = replace(PLAIN, reference_policy_kl_penalty=1.0, use_on_policy_kl_approximation=True)
    got, gradient = run(
        config, logps=-3 * one, ref=-1.5 * one, ratios=one, weights=8 * one, mask=one, advantages=torch.zeros(1)
    )
    assert got["kl_penalty"] == pytest.approx(10)
    close(gradient, [[0]])


def test_the_kl_is_of_the_whole_distribution_where_the_policys_is_filtered():
    """The actor's term reads the filtered log-probabilities, the KL the whole ones, each with its own gradient."""
    config = replace(PLAIN, reference_policy_kl_penalty=1.0, reference_policy_kl_type="k1")
    whole = (LOGPS - 0.5).requires_grad_()
    got, gradient = run(config, ref=LOGPS - 1.0, whole_logps_BS=whole)
    assert got["kl_penalty"] == got["reference_kl"] == pytest.approx(0.5)
    assert got["actor_loss"] == pytest.approx(0.1 / 5, abs=1e-7)
    close(gradient * 5, [[-1, 0, -0.5], [0, 2, 0]])
    assert whole.grad is not None
    close(whole.grad * 5, [[1.5, 1.5, 1.5], [1.5, 1.5, 0]])  # k1's weight and k1 itself


def test_a_kl_without_penalty_is_logged_and_learns_nothing():
    got, gradient = run(PLAIN, ref=REF)
    bare, expected = run(PLAIN)
    assert got["loss"] == bare["loss"]
    assert torch.equal(gradient, expected)
    assert got["kl_penalty"] > 0
    assert (bare["kl_penalty"], bare["reference_kl"]) == (0, 0)


def test_a_kl_in_the_reward_is_no_part_of_the_loss_but_of_the_advantages():
    config = replace(PLAIN, reference_policy_kl_penalty=0.5, use_kl_in_reward=True)
    got, gradient = run(config, ref=REF)
    bare, expected = run(PLAIN)
    assert got["loss"] == bare["loss"]
    assert torch.equal(gradient, expected)
    reduced = kl_in_advantages(ADVANTAGES, LOGPS, REF, MASK, config=config)
    up, down = KL["k3"][LN2], KL["k3"][-LN2]
    close(reduced, [[1 - 0.5 * up, 1 - 0.5 * down, 1], [-1 - 0.5 * up, -1 - 0.5 * up, -1]])


# -- the likelihood of right answers -----------------------------------------------------------------------------------


def test_likelihood_of_right_answers_by_hand():
    """-(-1 - 2 - 0.5) over the 3 tokens of the one that is right."""
    right = torch.tensor([1.0, 0.0])
    config = replace(PLAIN, positive_example_nll_weight=0.1)
    got, gradient = run(config, positive_B=right, positive_tokens=torch.tensor(3.0))
    assert got["positive_nll_loss"] == pytest.approx(3.5 / 3)
    assert got["loss"] == pytest.approx(0.1 / 5 + 0.1 * 3.5 / 3, abs=1e-6)
    close(gradient, [[-1 / 5 - 0.1 / 3, -0.1 / 3, -0.5 / 5 - 0.1 / 3], [0, 2 / 5, 0]])


def test_a_batch_without_right_answers_has_no_likelihood():
    config = replace(PLAIN, positive_example_nll_weight=0.1)
    got, _ = run(config, positive_B=torch.zeros(2), positive_tokens=torch.tensor(0.0))
    assert got["positive_nll_loss"] == 0
    assert got["loss"] == pytest.approx(0.1 / 5, abs=1e-7)


# -- what does not count -----------------------------------------------------------------------------------------------


def test_a_sequence_that_is_masked_counts_nowhere():
    got, gradient = run(PLAIN, sample_mask=torch.tensor([1.0, 0.0]))
    alone, expected = run(
        PLAIN, logps=LOGPS[:1], ratios=RATIOS[:1], weights=WEIGHTS[:1], mask=MASK[:1], advantages=ADVANTAGES[:1]
    )
    assert got == pytest.approx(alone)
    close(gradient, [expected[0].tolist(), [0, 0, 0]])


@pytest.mark.parametrize("by", ["mask", "sample_mask"])
def test_a_batch_of_which_nothing_counts_has_loss_and_gradient_zero(by):
    masks = {"mask": torch.zeros(2, 3)} if by == "mask" else {"sample_mask": torch.zeros(2)}
    config = replace(corrected("seq-mask-tis", 2.0, 0.5), reference_policy_kl_penalty=1.0, token_level_loss=False)
    got, gradient = run(config, ref=REF, **masks)
    assert not gradient.any()
    assert got["loss"] == 0
    assert [got[f"probs_ratio{name}"] for name in ("_min", "_max")] == [INF, -INF]  # what joins with other batches


# -- NeMo-RL's formulas (nemo_rl/algorithms/loss/loss_functions.py: ClippedPGLossFn) -----------------------------------


def nemo_rl(v: dict[str, np.ndarray], c: GRPOLossConfig) -> dict[str, float]:
    """The loss and what is logged of it, in its terms, with masked_mean(x, m, n) = sum(x · m) / (n + 1e-8)."""
    token, sample = v["mask"], v["sample"]
    mask = token * sample[:, None]
    prev = v["logps"] if c.force_on_policy_ratio else v["prev"]
    tokens, sequences = mask.sum() + 1e-8, sample.sum() + 1e-8

    def of_tokens(x: np.ndarray) -> float:
        return float((x * mask).sum() / tokens)

    def of_sequences(x: np.ndarray) -> float:
        return float((x * sample).sum() / sequences)

    def aggregate(x: np.ndarray) -> float:
        return of_tokens(x) if c.token_level_loss else of_sequences((x * token).sum(1) / (token.sum(1) + 1e-8))

    log_ratio = np.zeros_like(prev) if c.force_on_policy_ratio else v["logps"] - prev
    if c.sequence_level_importance_ratios and not c.force_on_policy_ratio:
        log_ratio = ((log_ratio * token).sum(1) / (token.sum(1) + 1e-8))[:, None] + np.zeros_like(prev)
    ratio = np.exp(log_ratio)
    clipped = ratio if c.force_on_policy_ratio else ratio.clip(1 - c.ratio_clip_min, 1 + c.ratio_clip_max)
    if c.disable_ppo_ratio:
        ratio = clipped = v["logps"]
    advantage = v["advantages"][:, None]
    terms = -advantage * clipped * v["logps"] if c.use_cispo else np.maximum(-advantage * ratio, -advantage * clipped)
    if c.ratio_clip_c is not None:
        terms = np.where(advantage < 0, np.minimum(terms, -advantage * c.ratio_clip_c), terms)

    log_weight = prev - v["gen"]
    weight = np.exp(log_weight)
    if c.sequence_level_importance_ratios:
        weight = np.exp((log_weight * token).sum(1))[:, None] + np.zeros_like(prev)
    high, low = c.truncated_importance_sampling_ratio, c.truncated_importance_sampling_ratio_min or 0.0
    if c.truncated_importance_sampling_type == "tis":
        weight = weight.clip(low, high)
    elif c.truncated_importance_sampling_type == "icepop":
        weight = np.where((weight >= low) & (weight <= high), weight, 0)
    elif c.truncated_importance_sampling_type == "seq-mask-tis":
        mean = np.exp((log_weight * token).sum(1) / (token.sum(1) + 1e-8))
        weight = weight * ((mean >= low) & (mean <= high))[:, None]
    actor = aggregate(weight * terms if c.use_importance_sampling_correction else terms)

    difference = (v["ref"] - v["logps"]).clip(-20, 20)
    kl = {"k1": -difference, "k2": difference**2 / 2, "k3": np.exp(difference) - 1 - difference}
    on_policy = np.exp(v["logps"] - v["gen"]) if c.use_on_policy_kl_approximation else 1.0
    penalty = aggregate((kl[c.reference_policy_kl_type] * on_policy).clip(-10, 10))
    in_loss = 0.0 if c.use_kl_in_reward else c.reference_policy_kl_penalty * penalty
    right = mask * v["positive"][:, None]
    nll = -float((v["logps"] * right).sum() / max(right.sum(), 1))
    whole = {
        "loss": actor + in_loss + c.positive_example_nll_weight * nll,
        "kl_penalty": penalty,
        "token_mult_prob_error": of_tokens(np.exp(np.abs(v["gen"] - prev))),
        "approx_entropy": -of_tokens(np.exp(v["logps"] - v["gen"]) * v["logps"]),
        "num_valid_samples": float(sample.sum()),
        "sampling_importance_ratio": of_tokens(weight),
    }
    if c.sequence_level_importance_ratios:
        whole["sampling_importance_ratio"] = of_sequences(weight[:, 0])
    return whole


def configs() -> st.SearchStrategy[GRPOLossConfig]:
    """Every way to combine the keys that checks_grpo.py lets pass."""

    @st.composite
    def build(draw: st.DrawFn) -> GRPOLossConfig:
        way = draw(st.sampled_from(["ppo", "dual", "gspo", "cispo", "plain", "forced", "forced-gspo"]))
        kinds = [None, "tis", "icepop"] if "gspo" in way else [None, "tis", "icepop", "seq-mask-tis"]
        kind = draw(st.sampled_from(kinds))
        return GRPOLossConfig(
            reference_policy_kl_penalty=draw(st.sampled_from([0.0, 0.1])),
            reference_policy_kl_type=draw(st.sampled_from(["k1", "k2", "k3"])),
            use_on_policy_kl_approximation=draw(st.booleans()),
            use_kl_in_reward=draw(st.booleans()),
            ratio_clip_max=draw(st.sampled_from([0.2, 0.28])),
            ratio_clip_c=1.5 if way == "dual" else None,
            token_level_loss=way == "cispo" or ("gspo" not in way and draw(st.booleans())),
            sequence_level_importance_ratios="gspo" in way,
            use_cispo=way == "cispo",
            disable_ppo_ratio=way == "plain",
            force_on_policy_ratio="forced" in way,
            use_importance_sampling_correction=kind is not None or draw(st.booleans()),
            truncated_importance_sampling_type=kind,
            truncated_importance_sampling_ratio=None if kind is None else 1.2,
            truncated_importance_sampling_ratio_min=None if kind is None else draw(st.sampled_from([0.7, 0.9])),
            positive_example_nll_weight=draw(st.sampled_from([0.0, 0.3])),
        )

    return build()


@st.composite
def batches(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Random log-probabilities and masks: some rows without a token, some left out."""
    rows, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (rows, tokens)
    logps = -rng.exponential(2.0, shape)
    prev = logps + 0.3 * rng.standard_normal(shape)
    return {
        "logps": logps,
        "prev": prev,
        "gen": prev + 0.2 * rng.standard_normal(shape),
        "ref": logps + rng.standard_normal(shape),
        "advantages": rng.standard_normal(rows),
        "mask": (rng.random(shape) < draw(st.sampled_from([0.2, 0.8, 1.0]))).astype(float),
        "sample": (rng.random(rows) < draw(st.sampled_from([0.0, 0.6, 1.0]))).astype(float),
        "positive": (rng.random(rows) < 0.5).astype(float),
    }


def computed(
    values: dict[str, np.ndarray], config: GRPOLossConfig, rows: slice | np.ndarray = slice(None)
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics and gradient of our loss in fp64, on some of the rows, divided by what counts of all."""
    counted = values["mask"] * values["sample"][:, None]
    part = {name: torch.from_numpy(value[rows].copy()) for name, value in values.items()}
    logps = part["logps"].requires_grad_()
    loss, metrics = grpo_loss(
        logps,
        part["prev"],
        part["gen"],
        part["ref"],
        part["advantages"],
        part["mask"],
        part["sample"],
        config=config,
        valid_tokens=torch.tensor(counted.sum()),
        valid_sequences=torch.tensor(values["sample"].sum()),
        positive_B=part["positive"],
        positive_tokens=torch.tensor((counted * values["positive"][:, None]).sum()),
    )
    loss.backward()
    return {name: value.item() for name, value in metrics.items()}, logps.grad.numpy()


@settings(deadline=None, max_examples=150)
@given(batches(), configs())
def test_the_loss_is_nemo_rls_formula(values, config):
    got, gradient = computed(values, config)
    expected = nemo_rl(values, config)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert np.isfinite(gradient).all()


@settings(deadline=None, max_examples=100)
@given(batches(), configs(), st.data())
def test_micro_batches_and_ranks_add_up_to_the_batch_however_it_is_cut(values, config, data):
    """Rows in any order, in any number of parts: sums and extremes of the parts are those of the whole."""
    count = len(values["sample"])
    order = np.array(data.draw(st.permutations(range(count))))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    whole, gradient = computed(values, config)
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    results = [computed(values, config, part) for part in parts]
    for name in METRICS:
        join = min if name.endswith("_min") else max if name.endswith("_max") else sum
        assert join(metrics[name] for metrics, _ in results) == pytest.approx(whole[name], rel=1e-9, abs=1e-9), name
    for part, (_, partial) in zip(parts, results, strict=True):
        np.testing.assert_allclose(partial, gradient[part], rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(batches(), configs(), st.sampled_from([math.nan, INF, -INF, 1e30]))
def test_what_stands_in_padding_does_not_matter(values, config, garbage):
    dirty = {
        name: np.where(values["mask"] > 0, value, garbage) if name in ("logps", "prev", "gen", "ref") else value
        for name, value in values.items()
    }
    clean, expected = computed(values, config)
    got, gradient = computed(dirty, config)
    assert got == clean
    np.testing.assert_array_equal(gradient, expected)


@settings(deadline=None, max_examples=60)
@given(batches(), configs())
def test_before_the_first_update_every_ratio_is_1(values, config):
    """Policy, old policy and generator agree: nothing is clipped, and the engine's error is the least possible."""
    same = {**values, "prev": values["logps"], "gen": values["logps"]}
    got, _ = computed(same, config)
    if (values["mask"] * values["sample"][:, None]).any():
        assert (got["probs_ratio_min"], got["probs_ratio_max"]) == pytest.approx((1, 1))
        assert got["token_mult_prob_error"] == pytest.approx(1)
    for name in ("clip_low_share", "clip_high_share", "is_oob_ratio", "js_divergence_error", "gen_kl_error"):
        assert got[name] == pytest.approx(0, abs=1e-12), name
