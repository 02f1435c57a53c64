"""What SFT and DPO share when they validate: cutting batches, averaging, and checking what the policy writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.generation import MegatronGenerator
from nemotron_launch.trainer.losses import kl_k1
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Completion, Sampling

if TYPE_CHECKING:
    from nemotron_launch.trainer.reference import Reference
    from nemotron_launch.trainer.setup import Session

AT_ONCE = 64


def shares(indices: np.ndarray, layout: Layout, micro_batch: int) -> list[np.ndarray]:
    """This data-parallel rank's micro-batches of a global batch, in order."""
    mine = np.array_split(indices, layout.data)[layout.data_rank]
    return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]


def padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    """Indices filled up with -1 to a multiple, so that every rank has as many micro-batches."""
    return np.concatenate([indices, np.full(-len(indices) % multiple, -1)])


def weighted_mean(results: Sequence[Mapping[str, float]], weight: str) -> dict[str, float]:
    """Mean of each metric over batches, weighted by one of them; the weight itself is summed."""
    total = sum(result[weight] for result in results)
    means = {
        name: sum(result[name] * result[weight] for result in results) / max(total, 1)
        for name in results[0]
        if name != weight
    }
    return means | {weight: total}


@dataclass(frozen=True)
class GenerationCheck:
    """Greedy answers for exact match, and samples for the KL to the reference, on the first held-out prompts."""

    num_prompts: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    seed: int

    @staticmethod
    def of(section: Mapping[str, Any], session: Session) -> GenerationCheck | None:
        """As `val_generation` says; None where it is off."""
        if not section["num_prompts"]:
            return None
        part = session.config.get("dpo") or session.config["sft"]
        return GenerationCheck(
            num_prompts=section["num_prompts"],
            max_new_tokens=section["max_new_tokens"],
            temperature=section["temperature"],
            stop_ids=session.tokenizer.stop_ids,
            pad_id=session.tokenizer.pad_id,
            seed=part["seed"],
        )

    def run(
        self,
        policy: Policy,
        prompts: Sequence[np.ndarray],
        answers: Sequence[np.ndarray],
        reference: Reference | None,
    ) -> dict[str, float]:
        """exact_match (share of greedy answers equal to `answers`), response length, and with a reference the KL.

        kl_to_reference: nats per token, estimator k1 on answers sampled from the policy (it can be a little below 0).
        """
        layout = policy.layout
        chosen = np.arange(min(self.num_prompts, len(prompts)))
        mine = np.array_split(chosen, layout.data)[layout.data_rank]
        totals = torch.zeros(5, dtype=torch.float64, device=layout.device)
        for start in range(0, len(mine), AT_ONCE):
            part = mine[start : start + AT_ONCE]
            texts = [prompts[i] for i in part]
            greedy = self._generate(policy, texts, temperature=0.0, keys=part)
            right = sum(np.array_equal(done.ids, answers[i]) for done, i in zip(greedy, part, strict=True))
            tokens = sum(len(done.ids) for done in greedy)
            totals += torch.tensor([right, tokens, len(part), 0, 0], dtype=torch.float64, device=layout.device)
            if reference is not None:
                sampled = self._generate(policy, texts, temperature=self.temperature, keys=part)
                totals[3:] += self._kl(policy, texts, sampled, reference)
        parallel.sum_over_data(totals)
        right_, tokens_, count, kl, kl_tokens = totals.tolist()
        count = max(count, 1)  # none where every held-out prompt is too long
        result = {"exact_match": right_ / count, "response_length_mean": tokens_ / count}
        if reference is not None:
            result["kl_to_reference"] = kl / max(kl_tokens, 1)
        return result

    def _generate(
        self, policy: Policy, prompts: Sequence[np.ndarray], *, temperature: float, keys: np.ndarray
    ) -> list[Completion]:
        sampling = Sampling(self.max_new_tokens, temperature=temperature, stop_ids=self.stop_ids)
        done = MegatronGenerator(policy).generate(prompts, sampling, seed=self.seed, prompt_keys=keys.tolist())
        return [completions[0] for completions in done]

    def _kl(
        self, policy: Policy, prompts: Sequence[np.ndarray], sampled: Sequence[Completion], reference: Reference
    ) -> torch.Tensor:
        groups = [
            Group(len(prompt), (np.concatenate([prompt, done.ids]),))
            for prompt, done in zip(prompts, sampled, strict=True)
        ]
        tensor = policy.layout.tensor
        batch = collate(groups, pad_id=self.pad_id, device=policy.layout.device, multiple_of=tensor)
        own = policy.logps([batch])[0]
        ref = reference.logps([batch])[0]
        return torch.stack([kl_k1(own, ref, batch.mask_NR), batch.mask_NR.sum().double()])
