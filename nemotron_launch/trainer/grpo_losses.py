"""The loss of GRPO and its relatives: pure functions of tensors, with NeMo-RL's names, maths and normalisation.

The loss is divided by counts over the whole global batch that the caller gives, so that micro-batches and
data-parallel ranks add up to the same loss however the batch is cut.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nemotron_launch.trainer.grpo_metrics import Means, engine_metrics, ratio_metrics
from nemotron_launch.trainer.losses import token_kl

METRICS = (
    "loss",
    "actor_loss",
    "kl_penalty",
    "reference_kl",
    "positive_nll_loss",
    "probs_ratio",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped",
    "probs_ratio_clamped_min",
    "probs_ratio_clamped_max",
    "clip_low_share",
    "clip_high_share",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "is_oob_ratio",
    "approx_entropy",
    "num_valid_samples",
)


@dataclass(frozen=True)
class GRPOLossConfig:
    """The section `loss_fn` of a config; each key is described in its schema."""

    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_on_policy_kl_approximation: bool = False
    use_kl_in_reward: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    use_cispo: bool = False
    disable_ppo_ratio: bool = False
    force_on_policy_ratio: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    positive_example_nll_weight: float = 0.0

    @staticmethod
    def of(section: Mapping[str, Any]) -> GRPOLossConfig:
        """From the composed config's `loss_fn`."""
        return GRPOLossConfig(**{field.name: section[field.name] for field in fields(GRPOLossConfig)})


def grpo_loss(
    logps_BS: Tensor,
    prev_logps_BS: Tensor,
    gen_logps_BS: Tensor,
    ref_logps_BS: Tensor | None,
    advantages: Tensor,
    mask_BS: Tensor,
    sample_mask_B: Tensor,
    *,
    config: GRPOLossConfig,
    valid_tokens: Tensor,
    valid_sequences: Tensor,
    positive_B: Tensor | None = None,
    positive_tokens: Tensor | None = None,
    whole_logps_BS: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with its KL penalty, of a micro-batch (NeMo-RL's ClippedPGLossFn, main branch).

    Log-probabilities of the sampled tokens in nats, under the sampling temperature: logps_BS the policy's, with
    gradient; prev_logps_BS the policy's before the step's first update; gen_logps_BS the generator's; ref_logps_BS the
    reference's, None where it was not asked. advantages: [B] or [B, S]. mask_BS: 1 on sampled tokens; sample_mask_B: 0
    leaves a sequence out. valid_tokens and valid_sequences: sums of mask × sample mask, and of the sample mask, over
    the whole global batch. positive_B (1 where the reward is above 0) and positive_tokens (their tokens in the global
    batch) are read with positive_example_nll_weight only. whole_logps_BS: where top-p or top-k filter, the policy's
    log-probabilities in the unfiltered distribution, as the reference's are: the KL is taken of these.

    Returns the loss, fp32, and METRICS, which add up over micro-batches and ranks, but for names in _min and _max.

    Of a token, with ratio = exp(logp - prev): max(-A·ratio, -A·clip(ratio, 1 - ratio_clip_min, 1 + ratio_clip_max))
    (PPO, GRPO, DAPO), for A < 0 at most -A·ratio_clip_c (dual clip, Ye et al. 2020). Instead of it
    sequence_level_importance_ratios takes exp(mean of the sequence's log ratios) (GSPO, Zheng et al. 2025); use_cispo
    -A·stopgrad(clip(ratio))·logp (MiniMax-M1); disable_ppo_ratio -A·logp; force_on_policy_ratio a ratio of 1 that
    has a gradient, and the generator is then corrected for with the policy itself. The correction is described at
    `generator_weights`, the KL at `token_kl`: its weight exp(logp - stopgrad(logp)), or exp(logp - gen) with
    use_on_policy_kl_approximation, has a gradient and comes before the output clamp, as in NeMo-RL's main branch.

    Where NeMo-RL averages the likelihood of right answers over each micro-batch's own tokens, it is averaged over the
    global batch's here: otherwise it would depend on how the batch is cut.
    """
    counted_BS = mask_BS > 0
    # 0 where nothing counts: what stands there may be infinite, and infinity times 0 is no number.
    logps_BS, gen_BS = logps_BS.masked_fill(~counted_BS, 0.0), gen_logps_BS.masked_fill(~counted_BS, 0.0)
    prev_BS = logps_BS.detach() if config.force_on_policy_ratio else prev_logps_BS.masked_fill(~counted_BS, 0.0)
    whole_BS = logps_BS if whole_logps_BS is None else whole_logps_BS.masked_fill(~counted_BS, 0.0)
    ref_BS = None if ref_logps_BS is None else ref_logps_BS.masked_fill(~counted_BS, 0.0)
    means = Means(mask_BS, sample_mask_B, valid_tokens, valid_sequences)
    mean = means.tokens if config.token_level_loss else means.sequences
    advantages_BS = (advantages if advantages.dim() == 2 else advantages[:, None]).expand_as(logps_BS)

    ratios_BS, clipped_BS = _ratios(logps_BS, prev_BS, mask_BS, config)
    weights_BS, outside = generator_weights(prev_BS, gen_BS, mask_BS, config)
    policy_BS = _policy_terms(logps_BS, ratios_BS, clipped_BS, advantages_BS, config)
    actor = mean(weights_BS * policy_BS if config.use_importance_sampling_correction else policy_BS)
    kl, reference_kl = _kl(whole_BS, gen_BS, ref_BS, mean, means, config)
    nll = actor.new_zeros(())
    if config.positive_example_nll_weight and positive_B is not None and positive_tokens is not None:
        right_BS = mask_BS * (sample_mask_B * positive_B)[:, None]
        nll = -(logps_BS * right_BS).sum(dtype=torch.float64) / positive_tokens.clamp(min=1)
    penalty = 0.0 if config.use_kl_in_reward else config.reference_policy_kl_penalty
    loss = actor + config.positive_example_nll_weight * nll
    if penalty:
        loss = loss + penalty * kl

    with torch.no_grad():
        if config.disable_ppo_ratio:  # nothing is multiplied with a ratio, but it still tells how far the policy went
            ratios_BS = clipped_BS = (logps_BS - prev_BS).exp()
        by_sequence = config.sequence_level_importance_ratios
        masks_sequences = config.truncated_importance_sampling_type == "seq-mask-tis"
        metrics = {
            "loss": loss,
            "actor_loss": actor,
            "kl_penalty": kl,
            "reference_kl": reference_kl,
            "positive_nll_loss": nll,
            **ratio_metrics(ratios_BS, clipped_BS, advantages_BS, means, cispo=config.use_cispo),
            **engine_metrics(prev_BS, gen_BS, means, kind=config.reference_policy_kl_type),
            "sampling_importance_ratio": means.each_sequence(weights_BS) if by_sequence else means.tokens(weights_BS),
            "is_oob_ratio": means.each_sequence(outside) if masks_sequences else means.tokens(outside),
            "approx_entropy": -means.tokens((logps_BS - gen_BS).exp() * logps_BS),
            "num_valid_samples": sample_mask_B.sum(),
        }
    return loss.float(), {name: value.detach().double() for name, value in metrics.items()}


def _ratios(logps_BS: Tensor, prev_BS: Tensor, mask_BS: Tensor, config: GRPOLossConfig) -> tuple[Tensor, Tensor]:
    """What the advantage is multiplied with, as it is and clipped."""
    if config.force_on_policy_ratio:
        ratios_BS = (logps_BS - logps_BS.detach()).exp()
        return ratios_BS, ratios_BS
    if config.disable_ppo_ratio:
        return logps_BS, logps_BS
    if config.sequence_level_importance_ratios:
        log_ratios_B = ((logps_BS - prev_BS) * mask_BS).sum(-1) / mask_BS.sum(-1).clamp(min=1)
        ratios_BS = log_ratios_B.exp()[:, None].expand_as(logps_BS)
    else:
        ratios_BS = (logps_BS - prev_BS).exp()
    return ratios_BS, ratios_BS.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)


def _policy_terms(
    logps_BS: Tensor, ratios_BS: Tensor, clipped_BS: Tensor, advantages_BS: Tensor, config: GRPOLossConfig
) -> Tensor:
    """Each token's part of the loss."""
    if config.use_cispo:
        return -advantages_BS * clipped_BS.detach() * logps_BS
    terms_BS = torch.maximum(-advantages_BS * ratios_BS, -advantages_BS * clipped_BS)
    if config.ratio_clip_c is not None:
        bound_BS = -advantages_BS * config.ratio_clip_c
        terms_BS = torch.where(advantages_BS < 0, torch.minimum(terms_BS, bound_BS), terms_BS)
    return terms_BS


@torch.no_grad()
def generator_weights(
    prev_BS: Tensor, gen_BS: Tensor, mask_BS: Tensor, config: GRPOLossConfig
) -> tuple[Tensor, Tensor]:
    """How much more probable the policy finds each token than the engine that sampled it, and which are out of bounds.

    exp(prev - gen) of a token, or of the sequence's sum with sequence_level_importance_ratios (GSPO); what is not
    finite is 0. Limited to [min, max] = [truncated_importance_sampling_ratio_min or 0, …_ratio]: tis cuts it there
    (Yao et al. 2025), icepop makes it 0 outside (Ring-1T 2025), seq-mask-tis makes it 0 on all of a sequence whose
    geometric mean is outside, and leaves the other sequences' as they are. Returns weights and 0/1 marks, [B, S].
    """
    log_BS = prev_BS - gen_BS
    if config.sequence_level_importance_ratios:
        log_BS = (log_BS * mask_BS).sum(-1, keepdim=True).expand_as(log_BS)
    weights_BS = log_BS.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    kind, high = config.truncated_importance_sampling_type, config.truncated_importance_sampling_ratio
    if kind is None or high is None:
        return weights_BS, torch.zeros_like(weights_BS)
    low = config.truncated_importance_sampling_ratio_min or 0.0
    compared_BS = weights_BS
    if kind == "seq-mask-tis":
        finite_BS = log_BS.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        means_B = (finite_BS * mask_BS).sum(-1) / mask_BS.sum(-1).clamp(min=1)
        compared_BS = means_B.exp()[:, None].expand_as(weights_BS)
    outside_BS = (compared_BS < low) | (compared_BS > high)
    limited_BS = weights_BS.clamp(low, high) if kind == "tis" else weights_BS.masked_fill(outside_BS, 0.0)
    return limited_BS, outside_BS.to(weights_BS)


def _kl(
    logps_BS: Tensor,
    gen_BS: Tensor,
    ref_BS: Tensor | None,
    mean: Callable[[Tensor], Tensor],
    means: Means,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor]:
    """The KL penalty before its weight, averaged as the loss is; and the plain KL (k1, no clamp) a token."""
    if ref_BS is None:
        zero = means.tokens(torch.zeros_like(logps_BS))
        return zero, zero
    base_BS = gen_BS if config.use_on_policy_kl_approximation else logps_BS.detach()
    weights_BS = (logps_BS - base_BS).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    kl_BS = token_kl(
        logps_BS,
        ref_BS,
        kind=config.reference_policy_kl_type,
        input_clamp=config.kl_input_clamp_value,
        output_clamp=config.kl_output_clamp_value,
        weights_BS=weights_BS,
    )
    return mean(kl_BS), means.tokens((logps_BS - ref_BS).detach())


@torch.no_grad()
def kl_in_advantages(
    advantages_B: Tensor, prev_logps_BS: Tensor, ref_logps_BS: Tensor, mask_BS: Tensor, *, config: GRPOLossConfig
) -> Tensor:
    """use_kl_in_reward: each token's advantage less its KL to the reference times the penalty, [B, S].

    The KL of a token goes to that token, not to those before it, as in NeMo-RL; it is clamped as it is in the loss.
    """
    kl_BS = token_kl(
        prev_logps_BS,
        ref_logps_BS,
        kind=config.reference_policy_kl_type,
        input_clamp=config.kl_input_clamp_value,
        output_clamp=config.kl_output_clamp_value,
    )
    kl_BS = kl_BS.masked_fill(mask_BS == 0, 0.0)
    return advantages_B[:, None] - config.reference_policy_kl_penalty * kl_BS
