"""Losses and their metrics: pure functions of tensors, with NeMo-RL's names, maths and normalisation.

Every loss is divided by a count over the whole global batch that the caller gives, so that micro-batches and
data-parallel ranks add up to the same loss however the batch is cut.

Legend: B sequences, S tokens, M pairs (B = 2·M, rows alternate chosen, rejected).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# NeMo-RL's masked means divide by count + 1e-8; kept so that losses agree to the last digit shown.
EPSILON = 1e-8


def sequence_logps(logps_BS: Tensor, mask_BS: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each sequence's masked tokens in nats, [B], fp64 (sums of thousands of tokens are compared).

    average: divide by the number of masked tokens (at least 1).
    """
    sums_B = (logps_BS * mask_BS).sum(-1, dtype=torch.float64)
    return sums_B / mask_BS.sum(-1).clamp(min=1) if average else sums_B


@dataclass(frozen=True)
class DPOWeights:
    """Parameters of the DPO loss under NeMo-RL's config names (`dpo.*`)."""

    reference_policy_kl_penalty: float = 0.05
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False


def dpo_loss(
    logps_BS: Tensor,
    ref_sums_B: Tensor,
    mask_BS: Tensor,
    valid_M: Tensor,
    weights: DPOWeights,
    *,
    valid_pairs: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), summed over the micro-batch's pairs.

    logps_BS: the policy's token log-probabilities in nats; ref_sums_B: the reference's, summed over each sequence's
    masked tokens, fp64. valid_M: 0 for pairs that count in the batch but not in the loss (too long). valid_pairs:
    how many pairs of the whole global batch are valid. Returns the loss, fp32, and metrics that add up over
    micro-batches and ranks: loss, preference_loss, sft_loss, accuracy (reward of chosen > rejected, ties count 0),
    policy_accuracy (log-probability of chosen > rejected), rewards_chosen_mean, rewards_rejected_mean (rewards are
    not scaled by beta), num_valid_samples.
    """
    sums_B = sequence_logps(logps_BS, mask_BS)
    tokens_B = mask_BS.sum(-1).clamp(min=1)
    rewards_B = sums_B - ref_sums_B
    if weights.preference_average_log_probs:
        rewards_B = rewards_B / tokens_B
    chosen_M, rejected_M = rewards_B[0::2], rewards_B[1::2]
    pairs = valid_pairs + EPSILON
    preference = -(F.logsigmoid(weights.reference_policy_kl_penalty * (chosen_M - rejected_M)) * valid_M).sum() / pairs
    nll_M = -(sums_B / tokens_B if weights.sft_average_log_probs else sums_B)[0::2]
    sft = (nll_M * valid_M).sum() / pairs
    loss = weights.preference_loss_weight * preference + weights.sft_loss_weight * sft
    means_B = sums_B / tokens_B if weights.preference_average_log_probs else sums_B
    counted = valid_pairs.clamp(min=1)
    with torch.no_grad():
        metrics = {
            "loss": loss,
            "preference_loss": preference,
            "sft_loss": sft,
            "accuracy": ((chosen_M > rejected_M) * valid_M).sum() / counted,
            "policy_accuracy": ((means_B[0::2] > means_B[1::2]) * valid_M).sum() / counted,
            "rewards_chosen_mean": (chosen_M * valid_M).sum() / counted,
            "rewards_rejected_mean": (rejected_M * valid_M).sum() / counted,
            "num_valid_samples": valid_M.sum().double(),
        }
    return loss.float(), {name: value.detach().double() for name, value in metrics.items()}


def sft_loss(logps_BS: Tensor, mask_BS: Tensor, *, valid_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the masked tokens over the global batch's count of them.

    Returns the loss, fp32, and metrics that add up: loss, num_valid_tokens.
    """
    loss = -(logps_BS * mask_BS).sum(dtype=torch.float64) / (valid_tokens + EPSILON)
    return loss.float(), {"loss": loss.detach(), "num_valid_tokens": mask_BS.sum().double()}


def bradley_terry_loss(scores_B: Tensor, valid_M: Tensor, *, valid_pairs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward model's loss, -log sigmoid(r_chosen - r_rejected) (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    scores_B: rows alternate chosen, rejected; fp32. valid_M: pairs that count. valid_pairs: how many do in the whole
    global batch. Metrics, named as NeMo-RL's: accuracy (chosen above rejected), mean scores of both.
    """
    chosen_M, rejected_M = scores_B[0::2], scores_B[1::2]
    share_M = valid_M.to(scores_B.dtype) / (valid_pairs.to(scores_B.dtype) + EPSILON)
    loss = (-F.logsigmoid(chosen_M - rejected_M) * share_M).sum()
    return loss, {
        "loss": loss.detach(),
        "accuracy": ((chosen_M > rejected_M).to(share_M.dtype) * share_M).sum(),
        "rewards_chosen_mean": (chosen_M.detach() * share_M).sum(),
        "rewards_rejected_mean": (rejected_M.detach() * share_M).sum(),
        "num_valid_samples": valid_M.sum(),
    }


def kl_k1(logps_BS: Tensor, ref_logps_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """KL(policy ‖ reference) in nats, estimated on the policy's own samples (Schulman 2020, "k1").

    Returns the sum over masked tokens of log policy - log reference, fp64. Of few samples it is nearer than k3, which
    is never negative but where one token that the policy has all but given up can outweigh all the others.
    """
    return ((logps_BS - ref_logps_BS).double() * mask_BS).sum()


def token_kl(
    logps_BS: Tensor,
    ref_logps_BS: Tensor,
    *,
    kind: str = "k3",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    weights_BS: Tensor | None = None,
) -> Tensor:
    """Estimate of KL(policy ‖ reference) at each sampled token in nats (Schulman 2020), [B, S].

    With d = log reference - log policy, clamped to ±input_clamp: k1 is -d, k2 is d²/2, k3 is exp(d) - 1 - d.
    weights_BS multiplies the estimate before it is clamped to ±output_clamp, as NeMo-RL's main branch has it, so that
    the gradient holds the score-function term of a weight that depends on the policy (Tang & Munos 2025,
    arXiv 2506.09477). NeMo-RL 0.6 detaches the weight and applies it after the clamp: the same value, another gradient.
    """
    difference_BS = ref_logps_BS - logps_BS
    if input_clamp is not None:
        difference_BS = difference_BS.clamp(-input_clamp, input_clamp)
    if kind == "k1":
        kl_BS = -difference_BS
    elif kind == "k2":
        kl_BS = difference_BS.square() / 2
    elif kind == "k3":
        kl_BS = torch.expm1(difference_BS) - difference_BS
    else:
        raise ValueError(f"no KL estimator {kind}: k1, k2, k3")
    if weights_BS is not None:
        kl_BS = kl_BS * weights_BS
    return kl_BS if output_clamp is None else kl_BS.clamp(-output_clamp, output_clamp)
