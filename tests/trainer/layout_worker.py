"""One rank of the layouts under test: of each trains DPO, then GRPO, and writes what it saw. Run by `spawn`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from models import batch_of, megatron_section, pairs

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.batch import Batch, Group
from nemotron_launch.trainer.generation import MegatronGenerator
from nemotron_launch.trainer.grpo_losses import METRICS as GRPO_METRICS
from nemotron_launch.trainer.grpo_losses import GRPOLossConfig, grpo_loss
from nemotron_launch.trainer.losses import DPOWeights, dpo_loss, sequence_logps
from nemotron_launch.trainer.megatron import checkpoint, parallel
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Sampling
from nemotron_launch.trainer.validation import shares

METRICS = ("loss", "accuracy", "rewards_chosen_mean", "num_valid_samples")
PAIRS = 8


def grpo_steps(policy: Policy, micro: int, make: Callable[[list[Group]], Batch]) -> list[dict[str, float]]:
    """Three updates on the same rollouts, so that ratios leave 1, with a generator and a reference made up of them."""
    parts = shares(np.arange(PAIRS), policy.layout, micro)
    groups = pairs(PAIRS, seed=99)
    batches = [make([groups[i] for i in part]) for part in parts]
    previous = policy.logps(batches)
    off = [0.3 * torch.sin(batch.tails_NR.float()) * batch.mask_NR for batch in batches]
    config = GRPOLossConfig(
        reference_policy_kl_penalty=0.1,
        use_on_policy_kl_approximation=True,
        ratio_clip_c=1.5,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="tis",
        truncated_importance_sampling_ratio=1.2,
    )
    tokens = sum(len(ids) - group.prompt_len for group in groups for ids in group.ids)

    def loss(logps: torch.Tensor, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        advantages = torch.sin(torch.tensor([2 * pair + k for pair in parts[i] for k in range(2)]) + 1.0)
        return grpo_loss(
            logps,
            previous[i],
            previous[i] + off[i],
            previous[i] - 2 * off[i],
            advantages,
            batches[i].mask_NR,
            torch.ones(len(advantages)),
            config=config,
            valid_tokens=torch.tensor(float(tokens)),
            valid_sequences=torch.tensor(2.0 * PAIRS),
        )

    return [policy.train_step(batches, loss, GRPO_METRICS) for _ in range(3)]


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--first-step", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--no-sharing", action="store_true")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    return parser.parse_args(words)


def main() -> None:
    """One layout after the other; the arguments of each are a list in a JSON file."""
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        run(arguments(words))
        parallel.parallel_state.destroy_model_parallel()
    parallel.stop()


def run(args: argparse.Namespace) -> None:
    layout = parallel.start(tensor=args.tp, pipeline=args.pp, sequence_parallel=args.sp, device="cpu", seed=1)
    numerics = Numerics(recompute_granularity="full" if args.recompute else None)
    architecture = hf.read_config(args.model)
    policy = Policy(architecture, layout, numerics)
    read = hf.open_weights(args.model, architecture)
    hf.load_weights(policy.gpt, architecture, read, size=layout.tensor, rank=layout.tensor_rank)

    def make(groups: list[Group]):
        return batch_of(groups, share_prompt=not args.no_sharing, multiple_of=layout.tensor if args.sp else 1)

    def micro_batches(groups: list[Group]):
        parts = shares(np.arange(PAIRS), layout, args.micro)
        return [make([groups[i] for i in part]) for part in parts]

    steps = range(args.first_step, args.first_step + args.steps)
    data = {step: micro_batches(pairs(PAIRS, seed=step)) for step in steps}
    references = {
        step: [
            sequence_logps(logps, batch.mask_NR) for logps, batch in zip(policy.logps(batches), batches, strict=True)
        ]
        for step, batches in data.items()
    }
    policy.make_trainable(megatron_section(lr=3e-3), total_steps=20)
    if args.load:
        checkpoint.load_training_state(args.load, policy.gpt, policy.optimizer, policy.scheduler)
    valid_pairs = torch.tensor(float(PAIRS))
    weights = DPOWeights(reference_policy_kl_penalty=0.1, sft_loss_weight=0.1)
    lines = []
    for step, batches in data.items():

        def loss(logps, i, step=step, batches=batches):
            batch = batches[i]
            ref = references[step][i]
            return dpo_loss(logps, ref, batch.mask_NR, batch.valid_G, weights, valid_pairs=valid_pairs)

        lines.append(policy.train_step(batches, loss, METRICS))
    if args.save:
        if layout.rank == 0:
            args.save.mkdir(parents=True)
        parallel.barrier()
        checkpoint.save(args.save, policy.gpt, policy.optimizer, policy.scheduler)
    prompts = [np.arange(2, 2 + n) for n in (3, 7, 5)]
    texts = {}
    for temperature in (0.0, 1.0):
        sampling = Sampling(12, temperature=temperature, stop_ids=(5, 9))
        groups = MegatronGenerator(policy).generate(prompts, sampling, samples=2, seed=3)
        texts[str(temperature)] = [[one.ids.tolist(), one.logps.tolist()] for group in groups for one in group]
    rollouts = grpo_steps(policy, args.micro, make)
    if layout.rank == 0:
        args.out.write_text(json.dumps({"steps": lines, "grpo": rollouts, "texts": texts}))
    parallel.barrier()


if __name__ == "__main__":
    main()
