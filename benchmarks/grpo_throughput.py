"""GRPO: rollout tokens a second and step time, next to trl's GRPOTrainer with transformers' generation, in one run.

    python benchmarks/grpo_throughput.py [--shapes small,medium] [--turns 5] [--cpu-time] [--json] [--smoke]

Both sides start from the same weights and train on the same prompts with the same group size, longest answer, reward,
dtype (fp32), threads and AdamW, one optimizer step for all rollouts of a step, each in its own process, in turns of a
few steps: ours, trl's, ours, … so that a busy moment of the machine hits both alike. The ratios are those of
neighbouring turns: their median, and their range. Ours is the whole step rl/nemo_rl/rlvr as `nemotron steps run` starts
it, trl's is GRPOTrainer.train with its defaults but for gradient checkpointing and bf16, which are off, and the order
of rows, which is the file's. Neither has a reference policy (trl's default; here `loss_fn.reference_policy_kl_penalty`
is 0). Ours also computes the trainer's log-probabilities of every rollout, which trl leaves out in this case.

--cpu-time counts each process's processor seconds instead of the wall clock's, on one thread: for a machine on which
others work.

Rollouts: sampled tokens over the seconds inside `Generator.generate`, and inside transformers' `generate`. The model's
weights are random, so an answer ends early once in as many tokens as the vocabulary has; only sampled tokens count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_throughput import Worker, answer, make_model, wait_for_turn

LR, CLIP = 1e-5, 1.0
PATTERN = "[aeiou]"  # an answer that holds one is worth 1


@dataclass(frozen=True)
class Shape:
    """A Llama, its prompts and groups. prompt, longest: tokens. steps: of one turn."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    prompts: int
    group: int
    prompt: int
    longest: int
    steps: int

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads ({self.kv_heads} key-value), "
            f"ffn {self.ffn}, vocabulary {self.vocab}, {self.prompts} prompts of {self.prompt} tokens × {self.group} "
            f"answers of {self.longest}"
        )


SHAPES = {
    "small": Shape(4, 128, 4, 2, 352, 1024, prompts=8, group=8, prompt=64, longest=64, steps=4),
    "medium": Shape(8, 512, 8, 4, 1376, 4096, prompts=4, group=8, prompt=128, longest=128, steps=1),
    "smoke": Shape(2, 32, 4, 2, 64, 512, prompts=2, group=4, prompt=12, longest=8, steps=2),
}


# The parent: starts the workers, gives them turns ---------------------------------------------------------------


def compare(name: str, turns: int, threads: int, clock: str) -> dict[str, Any]:
    """Run both sides in turns; the first turn of each warms up and is not counted."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_prompts(folder / "prompts.jsonl", shape)
        maker = Worker("model", folder, name, clock, turns, threads, script=__file__)
        maker.turn()
        maker.close()
        sides = [Worker(side, folder, name, clock, turns + 1, threads, script=__file__) for side in ("ours", "trl")]
        try:
            rounds = [{side.name: side.turn() for side in sides} for _ in range(turns + 1)]
        finally:
            for side in sides:
                side.close()
    counted = rounds[1:] or rounds

    def rate(turn: Mapping[str, float]) -> float:
        return turn["tokens"] / turn["generating"]

    def median(values: Iterator[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    rollouts = sorted(rate(turn["ours"]) / rate(turn["trl"]) for turn in counted)
    steps = sorted(turn["trl"]["seconds"] / turn["ours"]["seconds"] for turn in counted)
    result: dict[str, Any] = {
        "shape": name,
        "model": str(shape),
        "turns": len(counted),
        "rollout_ratio": round(statistics.median(rollouts), 2),
        "rollout_ratio_range": [round(rollouts[0], 2), round(rollouts[-1], 2)],
        "step_ratio": round(statistics.median(steps), 2),
        "step_ratio_range": [round(steps[0], 2), round(steps[-1], 2)],
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    for side in ("ours", "trl"):
        result[side] = {
            "rollout_tokens_per_s": median((rate(turn[side]) for turn in counted), 0),
            "step_seconds": median((turn[side]["seconds"] / shape.steps for turn in counted), 4),
            "generation_seconds": median((turn[side]["generating"] / shape.steps for turn in counted), 4),
            "tokens_per_answer": median((turn[side]["tokens"] / shape.steps / shape.rollouts for turn in counted), 1),
            "reward": median((turn[side]["reward"] for turn in counted), 3),
            "peak_mib": round(rounds[-1][side]["peak_mib"]),
        }
    return result


def write_prompts(path: Path, shape: Shape) -> None:
    """Random text of one byte a token."""
    draw = random.Random(0)
    texts = ("".join(draw.choices(string.ascii_letters, k=shape.prompt)) for _ in range(shape.prompts * shape.steps))
    path.write_text("".join(json.dumps({"prompt": text, "regex": PATTERN}) + "\n" for text in texts))


# The workers ----------------------------------------------------------------------------------------------------


class Turns:
    """Cuts a training into turns of some steps; collects what happens in them."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps = steps
        self.clock = clock
        self.done = 0
        self.generating = self.tokens = self.reward = 0.0

    def start(self) -> None:
        if not wait_for_turn():
            sys.exit()
        self.generating = self.tokens = self.reward = 0.0
        self.began = self.clock()

    def step_done(self) -> None:
        self.done += 1
        if self.done % self.steps:
            return
        answer(
            seconds=self.clock() - self.began,
            generating=self.generating,
            tokens=self.tokens,
            reward=self.reward / self.steps,
        )
        self.start()

    def timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.clock()
            done = generate(*args, **kwargs)
            self.generating += self.clock() - began
            return done

        return call


def ours(folder: Path, shape: Shape, turns: int, clock: Callable[[], float]) -> None:
    """The step rl/nemo_rl/rlvr, its config composed from the step's own tiny one."""
    import torch

    from nemotron_launch.catalog import find_config, find_step
    from nemotron_launch.plan import compose_for, config_text
    from nemotron_launch.trainer import grpo, start
    from nemotron_launch.trainer.generation import MegatronGenerator
    from nemotron_launch.trainer.loop import Progress, Run
    from nemotron_launch.trainer.setup import run_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    step, output = find_step("rlvr"), folder / "ours"
    changes = {
        "output_dir": output,
        "grpo.num_prompts_per_step": shape.prompts,
        "grpo.num_generations_per_prompt": shape.group,
        "grpo.max_num_steps": shape.steps * turns,
        "grpo.max_num_epochs": turns,
        "grpo.val_period": 0,
        "grpo.val_at_start": "false",
        "grpo.val_at_end": "false",
        "grpo.reference_kl_period": 0,
        "loss_fn.reference_policy_kl_penalty": 0,
        "loss_fn.ratio_clip_max": 0.2,
        "policy.model_name": folder / "model",
        "policy.architecture": "null",
        "policy.train_micro_batch_size": shape.rollouts,
        "policy.logprob_batch_size": shape.rollouts,
        "policy.generation_batch_size": shape.rollouts,
        "policy.max_total_sequence_length": shape.prompt + shape.longest,
        "policy.generation.max_new_tokens": shape.longest,
        "policy.megatron_cfg.optimizer.lr": LR,
        "policy.megatron_cfg.optimizer.clip_grad": CLIP,
        "policy.megatron_cfg.scheduler.lr_decay_style": "constant",
        "data.train.data_path": folder / "prompts.jsonl",
        "data.validation": "null",
        "data.shuffle": "false",
        "data.default.env_name": "regex",
        "checkpointing.enabled": "false",
        "checkpointing.pretrained_checkpoint.path": "null",
        "checkpointing.metric_name": "null",
    }
    composed = compose_for(step, find_config(step, "tiny"), [f"++{key}={value}" for key, value in changes.items()])
    output.mkdir(parents=True)
    (output / "composed.yaml").write_text(config_text(composed))
    cut, train, generate = Turns(shape.steps, clock), start.train, MegatronGenerator.generate

    def counted(self: MegatronGenerator, *args: Any, **kwargs: Any) -> Any:
        groups = cut.timed(generate)(self, *args, **kwargs)
        cut.tokens += sum(len(one.ids) for group in groups for one in group)
        return groups

    def watched(run: Run, progress: Progress) -> int:
        log = run.metrics.log

        def logged(step: int, epoch: int, line: Mapping[str, Any]) -> None:
            log(step, epoch, line)
            cut.reward += line["train/reward"]
            cut.step_done()

        run.metrics.log = logged  # type: ignore[method-assign,assignment]
        cut.start()
        return train(run, progress)

    MegatronGenerator.generate = counted  # type: ignore[method-assign]
    start.train = watched
    if code := run_step(step.folder, grpo.run, ["--config", str(output / "composed.yaml")]):
        raise SystemExit(code)


def trl(folder: Path, shape: Shape, turns: int, clock: Callable[[], float]) -> None:
    """trl's GRPOTrainer."""
    import re

    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from nemotron_launch.trainer.tokenizer import load_tokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    disable_progress_bars()
    rows = [{"prompt": json.loads(line)["prompt"]} for line in (folder / "prompts.jsonl").read_text().splitlines()]
    cut = Turns(shape.steps, clock)

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        values = [float(bool(re.search(PATTERN, text))) for text in completions]
        cut.tokens += sum(len(ids) for ids in completion_ids)
        cut.reward += statistics.mean(values)
        return values

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            cut.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            cut.step_done()

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            num_generations=shape.group,
            per_device_train_batch_size=shape.rollouts,
            max_completion_length=shape.longest,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            learning_rate=LR,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            max_steps=shape.steps * turns,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer({"name": "bytes"}, None).hf,
        callbacks=[Clock()],
    )
    trainer.model.generate = cut.timed(trainer.model.generate)
    trainer.train()


# ----------------------------------------------------------------------------------------------------------------


def lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['shape']}: {result['model']}"
    yield f"  {'':6}{'rollout tokens/s':>18}{'step s':>9}{'generation s':>14}{'tokens/answer':>15}{'peak MiB':>10}"
    for side in ("ours", "trl"):
        row = result[side]
        yield (
            f"  {side:6}{row['rollout_tokens_per_s']:18.0f}{row['step_seconds']:9}{row['generation_seconds']:14}"
            f"{row['tokens_per_answer']:15}{row['peak_mib']:10}"
        )
    rollout, step = result["rollout_ratio_range"], result["step_ratio_range"]
    yield (
        f"  ratio: rollouts {result['rollout_ratio']} ({rollout[0]} to {rollout[1]}), whole step "
        f"{result['step_ratio']} ({step[0]} to {step[1]}), {result['turns']} turns; load {result['load'][0]}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        side, folder, name, clock, turns = sys.argv[2:]
        if side == "model":
            return make_model(Path(folder), SHAPES[name])  # type: ignore[arg-type]
        return {"ours": ours, "trl": trl}[side](Path(folder), SHAPES[name], int(turns), getattr(time, clock))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="small,medium", help="of: " + ", ".join(SHAPES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, on one thread")
    parser.add_argument("--json", action="store_true", help="all measured values")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and one turn: does it run")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.turns = "smoke", 1
    threads, clock = (1, "process_time") if given.cpu_time else (given.threads, "perf_counter")
    results = []
    for name in given.shapes.split(","):
        results.append(compare(name, given.turns, threads, clock))
        if not given.json:
            print("\n".join(lines(results[-1])), flush=True)
    if given.json:
        print(json.dumps(results, indent=2))
    return None


if __name__ == "__main__":
    main()
