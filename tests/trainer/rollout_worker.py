"""One rank of a layout under test: makes rollouts and hands its weights over. Started through `spawn`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.generation import MegatronGenerator
from nemotron_launch.trainer.hand_over import write_weights
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Sampling

PROMPTS = [np.arange(2, 2 + n) for n in (3, 7, 5, 7)]
SAMPLINGS = (
    Sampling(24, temperature=0.0, stop_ids=tuple(range(0, 259, 12))),
    Sampling(24, stop_ids=tuple(range(0, 259, 12))),
    Sampling(24, temperature=0.8, top_p=0.9, top_k=50, stop_ids=tuple(range(0, 259, 12))),
)


def rollouts(policy: Policy, batch_size: int | None) -> list[list[list[float]]]:
    """Ids and log-probabilities; each data-parallel rank answers its share of the prompts."""
    generator = MegatronGenerator(policy, batch_size=batch_size, max_length=20)
    mine = np.array_split(np.arange(len(PROMPTS)), policy.layout.data)[policy.layout.data_rank]
    done = []
    for sampling in SAMPLINGS:
        prompts = [PROMPTS[i] for i in mine]
        groups = generator.generate(prompts, sampling, samples=4, seed=3, step=2, prompt_keys=mine.tolist())
        for share in parallel.gather_over_data(groups):
            done += [[one.ids.tolist(), one.logps.tolist()] for group in share for one in group]
    return done


def scores(policy: Policy) -> list[list[float]]:
    """Log-probabilities of given answers as each sampling filters them, tokens that it leaves out included."""
    groups = [Group(len(prompt), (np.concatenate([prompt, np.arange(30, 40)]),)) for prompt in PROMPTS]
    batch = collate(groups, pad_id=0, device=policy.layout.device, multiple_of=policy.layout.tensor)
    return [policy.logps([batch], sampling)[0].flatten().tolist() for sampling in SAMPLINGS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = parallel.start(tensor=args.tp, pipeline=args.pp, sequence_parallel=args.tp > 1, device="cpu", seed=1)
    architecture = hf.read_config(args.model)
    policy = Policy(architecture, layout, Numerics())
    read = hf.open_weights(args.model, architecture)
    hf.load_weights(policy.gpt, architecture, read, size=layout.tensor, rank=layout.tensor_rank)
    done, scored = rollouts(policy, batch_size=5), scores(policy)
    write_weights(policy, args.out / "weights")
    if layout.rank == 0:
        (args.out / "rollouts.json").write_text(json.dumps([done, scored]))
    parallel.stop()


if __name__ == "__main__":
    main()
