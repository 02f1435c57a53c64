"""What rl/nemo_rl/rlhf -c tiny learns, from seed to seed: SFT, a reward model, then GRPO, by the command itself.

    python benchmarks/rlhf_seeds.py [--seeds 42,1,2] [--json] [key=value…]

A row a seed: seconds of the three runs from the command line (start-up included), the reward model's accuracy on
held-out pairs, the mean reward of sampled answers to held-out prompts before and after, by how many of the first
validation's standard deviations it rose, the length of the answers (a reward model that is fooled shows there first;
right is 6 with the stop), and the KL to the warm start. Overrides are RLHF's.

The goal: at least one standard deviation, with the KL bounded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tiny_seeds import run

HELD_OUT = "validation/"


def seed(number: int, overrides: list[str]) -> dict[str, Any]:
    """The metrics of one seed."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        seconds = {
            "sft": run(output, "sft/megatron", f"sft.seed={number}"),
            "rm": run(output, "rm/hf", f"rm.seed={number}"),
            "rlhf": run(output, "rl/nemo_rl/rlhf", f"grpo.seed={number}", *overrides),
        }
        rm, rlhf = (_lines(output / f"{name}-tiny" / "metrics.jsonl") for name in ("rm", "rlhf"))
        samples = _lines(output / "rlhf-tiny" / "samples.jsonl")
    validated = [line for line in rlhf if HELD_OUT + "accuracy" in line]
    rewards = [line[HELD_OUT + "accuracy"] for line in validated]
    return {
        "seed": number,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "rm_accuracy": [line["validation-default/accuracy"] for line in rm if "validation-default/accuracy" in line][
            -1
        ],
        "reward": rewards,
        "deviations": (rewards[-1] - rewards[0]) / validated[0][HELD_OUT + "reward_std"],
        "length": [line[HELD_OUT + "avg_length"] for line in validated],
        "kl": [line["train/reference_kl"] for line in rlhf if "train/reference_kl" in line],
        "samples": [sample for sample in samples if sample["step"] == validated[-1]["step"]][:3],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42,1,2", help="of all three runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one object a seed, with every validation")
    parser.add_argument(
        "overrides", nargs="*", help="of rl/nemo_rl/rlhf, such as loss_fn.reference_policy_kl_penalty=1"
    )
    args = parser.parse_args()
    if not args.json:
        print("  seed  sft s   rm s  rlhf s  rm accuracy        reward      deviations   length           KL")
    for number in args.seeds.split(","):
        row = seed(int(number), args.overrides)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{row['seed']:6} {row['sft_seconds']:6.1f} {row['rm_seconds']:6.1f}  {row['rlhf_seconds']:6.1f}"
            f"     {row['rm_accuracy']:.3f}    {row['reward'][0]:6.2f} → {row['reward'][-1]:.2f}    "
            f"{row['deviations']:.2f}     {row['length'][0]:.2f} → {row['length'][-1]:.2f}   "
            f"{row['kl'][0]:.3f} → {row['kl'][-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
