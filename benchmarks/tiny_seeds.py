"""What the tiny configs learn, from seed to seed: SFT, then DPO, by the command itself, and the held-out metrics.

    python benchmarks/tiny_seeds.py [--seeds 42,1,2,3] [--procs 1] [--json] [key=value…]

A row a seed: seconds of both runs from the command line (start-up included), and policy_accuracy, exact match and KL to
the reference before the first step and after the last. Overrides are DPO's.

The warm start answers ascending and descending half and half, four in five of a prompt's kind one way (see
steps/make_tiny_data.py). A policy that always answers ascending thus has a KL of -(ln 0.8 + ln 0.2) / 2 = 0.92 nats an
answer, 0.153 a token of its six.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
HELD_OUT = "validation-default/"
SHOWN = ("policy_accuracy", "exact_match", "kl_to_reference", "preference_loss")


def run(output: Path, step: str, *overrides: str) -> float:
    """Run a step with its tiny config; the seconds it took."""
    command = [sys.executable, "-m", "nemotron_launch", "steps", "run", step, "-c", "tiny", *overrides]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    state = str(output / "state")  # these are nobody's runs
    env = {**os.environ, "RL_OUTPUT_DIR": str(output), "NEMOTRON_STATE_DIR": state, "PYTHONPATH": path}
    start = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.monotonic() - start


def seed(number: int, procs: int, overrides: list[str]) -> dict[str, Any]:
    """The metrics of one seed, first and last."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        common = [f"cluster.procs_per_node={procs}"]
        seconds = {"sft": run(output, "sft/megatron", f"sft.seed={number}", *common)}
        seconds["dpo"] = run(output, "rl/nemo_rl/dpo", f"dpo.seed={number}", *common, *overrides)
        lines = [json.loads(line) for line in (output / "dpo-tiny/metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if HELD_OUT + SHOWN[0] in line]
    first = next(line for line in lines if "train/preference_loss" in line)
    return {
        "seed": number,
        "steps": validated[-1]["step"],
        "sft_seconds": seconds["sft"],
        "dpo_seconds": seconds["dpo"],
        "first_loss_minus_ln2": first["train/preference_loss"] - math.log(2),
        **{name: [line[HELD_OUT + name] for line in validated] for name in SHOWN},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42,1,2,3", help="of both runs (default: %(default)s)")
    parser.add_argument("--procs", type=int, default=1, help="processes of each run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one object a seed, with every validation")
    parser.add_argument("overrides", nargs="*", help="of rl/nemo_rl/dpo, such as dpo.max_num_steps=100")
    args = parser.parse_args()
    if not args.json:
        print("  seed   sft s  dpo s  |loss-ln2|  policy_accuracy    exact_match   kl_to_reference")
    for number in args.seeds.split(","):
        row = seed(int(number), args.procs, args.overrides)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        accuracy, exact, kl, _ = (f"{row[name][0]:.3f} → {row[name][-1]:.3f}" for name in SHOWN)
        print(
            f"{row['seed']:6}  {row['sft_seconds']:6.1f} {row['dpo_seconds']:6.1f}"
            f"     {abs(row['first_loss_minus_ln2']):.0e}    {accuracy}  {exact}    {kl}",
            flush=True,
        )


if __name__ == "__main__":
    main()
