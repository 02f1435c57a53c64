"""What rl/nemo_rl/rlvr -c tiny learns, from seed to seed: SFT, then GRPO, by the command itself, on held-out prompts.

    python benchmarks/rlvr_seeds.py [--seeds 42,1,2] [--procs 1] [--json] [key=value…]

A row a seed: seconds of both runs from the command line (start-up included), accuracy of answers sampled at temperature
1 and of greedy ones, pass@4, and the KL to the warm start in nats a token (k1, on the step's own rollouts; before the
first step and in the last that measured it). Overrides are RLVR's.

The goal: accuracy at least 0.4 higher than before, and at least 0.9, in less than two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tiny_seeds import run

HELD_OUT = ("accuracy", "greedy_accuracy", "pass_k")
KL = "train/reference_kl"


def seed(number: int, procs: int, overrides: list[str]) -> dict[str, Any]:
    """The metrics of one seed at each validation."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        common = [f"cluster.procs_per_node={procs}"]
        seconds = {"sft": run(output, "sft/megatron", f"sft.seed={number}", *common)}
        seconds["rlvr"] = run(output, "rl/nemo_rl/rlvr", f"grpo.seed={number}", *common, *overrides)
        lines = [json.loads(line) for line in (output / "rlvr-tiny/metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation/accuracy" in line]
    return {
        "seed": number,
        "steps": validated[-1]["step"],
        "sft_seconds": seconds["sft"],
        "rlvr_seconds": seconds["rlvr"],
        "step_seconds": sum(line.get("timing/train/total_step_time", 0.0) for line in lines),
        **{name: [line[f"validation/{name}"] for line in validated] for name in HELD_OUT},
        "reference_kl": [line[KL] for line in lines if KL in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42,1,2", help="of both runs (default: %(default)s)")
    parser.add_argument("--procs", type=int, default=1, help="processes of each run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one object a seed, with every validation")
    parser.add_argument("overrides", nargs="*", help="of rl/nemo_rl/rlvr, such as grpo.max_num_steps=100")
    args = parser.parse_args()
    if not args.json:
        print("  seed  sft s  rlvr s  in steps      accuracy           greedy           pass@4             KL")
    for number in args.seeds.split(","):
        row = seed(int(number), args.procs, args.overrides)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        shown = "  ".join(f"{row[name][0]:.3f} → {row[name][-1]:.3f}" for name in (*HELD_OUT, "reference_kl"))
        spent = f"{row['sft_seconds']:6.1f}  {row['rlvr_seconds']:6.1f}  {row['step_seconds']:8.1f}"
        print(f"{row['seed']:6} {spent}  {shown}", flush=True)


if __name__ == "__main__":
    main()
