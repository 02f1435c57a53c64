"""DPO tokens a second and memory, next to trl's DPOTrainer and to this machine's matrix multiplication, in one run.

    python benchmarks/dpo_throughput.py [--shapes small,medium] [--modes online,kept] [--turns 7] [--json] [--smoke]

Both sides train the same weights on the same pairs in the same order with the same batch, dtype (fp32), threads and
AdamW, each in its own process, in turns of a few steps: ours, trl's, a matrix product, ours, … so that a busy moment of
the machine hits all alike. The ratio is that of neighbouring turns: its median, and its range. Ours is the whole step
rl/nemo_rl/dpo as `nemotron steps run` starts it (data files, tokenizer, loop, metrics file), trl's is DPOTrainer.train
with its defaults but for gradient checkpointing and bf16, which are off, and the order of rows, which is the file's.

Modes. online: the reference policy scores each batch in its step (`dpo.reference=resident`). kept: its
log-probabilities are computed once, before the first step (`dpo.reference=stored`, our default; trl:
`precompute_ref_log_probs=True`); a turn is then one epoch from the start, and its time that of the computation and of
the epoch's steps.

Tokens: pairs × 2 × (prompt + completion) for both sides, also where one of them runs a prompt once for both answers.
FLOPs are those of the plain algorithm, again for both: 2 per weight and token forward, 4 backward, 2 for the reference,
without the embedding, the output layer on completion tokens alone, attention as 4 · hidden · (tokens seen) per token.
Products: torch.mm of 2048 × 2048 matrices, and what our linear layers use instead where it is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ANSWER = 3  # the file descriptor on which a worker answers; libraries print on the others
BETA, LR, WEIGHT_DECAY, CLIP = 0.1, 1e-5, 0.01, 1.0


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch. steps: of one turn."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    pairs: int
    steps: int
    prompt: int = 128
    completion: int = 128

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.pairs * 2 * (self.prompt + self.completion)

    def flops(self) -> float:
        """Of one step and of the reference's log-probabilities of its pairs."""
        head_dim = self.hidden // self.heads
        attention = self.hidden * head_dim * (2 * self.heads + 2 * self.kv_heads)
        weights = self.layers * (attention + 3 * self.hidden * self.ffn)
        seen = (self.prompt + self.completion) / 2
        forward = self.tokens * (2 * weights + self.layers * 4 * self.hidden * seen)
        forward += self.pairs * 2 * self.completion * 2 * self.hidden * self.vocab
        return 4 * forward  # forward 1, backward 2, reference 1: the same in both modes

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads ({self.kv_heads} key-value), "
            f"ffn {self.ffn}, vocabulary {self.vocab}, {self.pairs} pairs of {self.prompt} + {self.completion} tokens"
        )


SHAPES = {
    "small": Shape(layers=4, hidden=128, heads=4, kv_heads=2, ffn=352, vocab=1024, pairs=8, steps=12),
    "medium": Shape(layers=8, hidden=512, heads=8, kv_heads=4, ffn=1376, vocab=4096, pairs=4, steps=3),
    "smoke": Shape(
        layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, vocab=259, pairs=2, steps=2, prompt=12, completion=10
    ),
}
MODES = {"online": "resident", "kept": "stored"}


# The parent: starts the workers, gives them turns ---------------------------------------------------------------


class Worker:
    """A process of one side. It waits before every turn, and answers with what it measured."""

    def __init__(
        self, side: str, folder: Path, shape: str, mode: str, turns: int, threads: int, script: str = __file__
    ) -> None:
        read, write = os.pipe()
        arguments = [side, str(folder), shape, mode, str(turns)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_DISABLED": "true"}
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY), **quiet, **offline}
        self.name = side
        self.log = folder / f"{side}.log"
        with self.log.open("w") as log:
            own = [sys.executable, script]
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", f'exec "$0" "$@" {ANSWER}>&{write}', *own, "--worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                pass_fds=[write],
                cwd=folder,
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.answers.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def compare(name: str, mode: str, turns: int, threads: int) -> dict[str, Any]:
    """Run both sides and the matrix product in turns; the first turn of each warms up and is not counted."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pairs(folder / "pairs.jsonl", shape)
        workers = [Worker("model", folder, name, mode, turns, threads)]
        workers[0].turn()
        workers.append(Worker("ours", folder, name, mode, turns + 1, threads))
        workers.append(Worker("trl", folder, name, mode, turns + 1, threads))
        matmul, sides = workers[0], workers[1:]
        try:
            rounds = [{worker.name: worker.turn() for worker in [*sides, matmul]} for _ in range(turns + 1)]
        finally:
            for worker in workers:
                worker.close()
    counted = rounds[1:] or rounds
    tokens, flops = shape.tokens * shape.steps, shape.flops() * shape.steps

    def median(side: str, what: str) -> float:
        return round(statistics.median(one[side][what] for one in counted), 4)

    ratios = sorted(one["trl"]["seconds"] / one["ours"]["seconds"] for one in counted)
    result: dict[str, Any] = {
        "shape": name,
        "mode": mode,
        "model": str(shape),
        "turns": len(counted),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "mm_gflops": round(median("model", "mm"), 1),
        "linear_gflops": round(median("model", "linear"), 1),
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    for side in ("ours", "trl"):
        result[side] = {
            "tokens_per_s": round(tokens / median(side, "seconds")),
            "gflops": round(flops / median(side, "seconds") / 1e9, 1),
            "seconds": {part: median(side, part) for part in ("reference", "steps")},
            "peak_mib": round(rounds[-1][side]["peak_mib"]),
            "losses": rounds[0][side]["losses"],
        }
    return result


def write_pairs(path: Path, shape: Shape) -> None:
    """Random text of one byte a token; the tokenizer adds EOS, one token, to each answer."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=length))

    rows = (
        {"prompt": text(shape.prompt), "chosen": text(shape.completion - 1), "rejected": text(shape.completion - 1)}
        for _ in range(shape.pairs * shape.steps)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# The workers ----------------------------------------------------------------------------------------------------


def wait_for_turn() -> bool:
    return bool(sys.stdin.readline())


def answer(**values: Any) -> None:
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    os.write(ANSWER, (json.dumps({**values, "peak_mib": peak / 1024}) + "\n").encode())


class Turns:
    """Cuts a training that runs through into turns: call `start` before the first step, `step_done` after each."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[Any] = []
        self.began = 0.0

    def start(self) -> None:
        if not wait_for_turn():
            sys.exit()
        self.began = time.perf_counter()

    def step_done(self, loss: Any) -> None:
        self.losses.append(loss)
        if len(self.losses) % self.steps:
            return
        seconds = time.perf_counter() - self.began
        answer(seconds=seconds, reference=0.0, steps=seconds, losses=rounded(self.losses[-self.steps :]))
        self.start()


def rounded(losses: Iterable[Any]) -> list[float]:
    return [round(float(loss), 6) for loss in losses]


def make_model(folder: Path, shape: Shape) -> None:
    """Write the weights from which both start, then answer each turn with the rate of a large sgemm."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemotron_launch.trainer.megatron.linear import linear

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    size = 2048 if shape.hidden > 32 else 64
    left, right = torch.rand(size, size), torch.rand(size, size)
    if wait_for_turn():
        answer()
    while wait_for_turn():
        flops = 2 * size**3
        answer(mm=rate(lambda: torch.mm(left, right), flops), linear=rate(lambda: linear(left, right), flops))


def rate(product: Callable[[], Any], flops: float) -> float:
    """GFLOP/s of the best of some runs."""
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return flops / best / 1e9


def ours(folder: Path, shape: Shape, mode: str, turns: int) -> None:
    """The step rl/nemo_rl/dpo, its config composed from the step's own tiny one."""
    import torch

    from nemotron_launch.catalog import find_config, find_step
    from nemotron_launch.plan import compose_for, config_text
    from nemotron_launch.trainer import dpo, start
    from nemotron_launch.trainer.loop import Progress, Run
    from nemotron_launch.trainer.setup import run_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    step = find_step("dpo")
    online = mode == "online"

    def config(output: Path) -> Path:
        changes = {
            "output_dir": output,
            "dpo.reference": MODES[mode],
            "dpo.max_num_steps": shape.steps * (turns if online else 1),
            "dpo.max_num_epochs": turns,
            "dpo.val_period": 0,
            "dpo.val_at_start": "false",
            "dpo.val_at_end": "false",
            "dpo.val_generation.num_prompts": 0,
            "dpo.reference_policy_kl_penalty": BETA,
            "dpo.sft_loss_weight": 0,
            "policy.megatron_cfg.scheduler.lr_decay_style": "constant",
            "policy.model_name": folder / "model",
            "policy.architecture": "null",
            "policy.train_global_batch_size": shape.pairs,
            "policy.train_micro_batch_size": shape.pairs,
            "policy.logprob_batch_size": shape.pairs,
            "policy.max_total_sequence_length": shape.prompt + shape.completion,
            "policy.megatron_cfg.optimizer.lr": LR,
            "policy.megatron_cfg.optimizer.weight_decay": WEIGHT_DECAY,
            "policy.megatron_cfg.optimizer.clip_grad": CLIP,
            "data.train.data_path": folder / "pairs.jsonl",
            "data.validation": "null",
            "data.shuffle": "false",
            "checkpointing.enabled": "false",
            "checkpointing.pretrained_checkpoint.path": "null",
            "checkpointing.metric_name": "null",
        }
        composed = compose_for(step, find_config(step, "tiny"), [f"++{key}={value}" for key, value in changes.items()])
        output.mkdir(parents=True)
        (output / "composed.yaml").write_text(config_text(composed))
        return output / "composed.yaml"

    def go(output: Path) -> None:
        if code := run_step(step.folder, dpo.run, ["--config", str(config(output))]):
            raise SystemExit(code)

    cut = Turns(shape.steps)
    losses: list[float] = []
    train = start.train

    def watched(run: Run, progress: Progress) -> int:
        log = run.metrics.log

        def logged(step: int, epoch: int, line: Mapping[str, Any]) -> None:
            log(step, epoch, line)
            losses.append(line["train/loss"])
            if online:
                cut.step_done(losses[-1])

        run.metrics.log = logged  # type: ignore[method-assign,assignment]
        if online:
            cut.start()
        return train(run, progress)

    start.train = watched
    if online:
        return go(folder / "ours")
    spent: dict[str, float] = {}
    dpo.open_reference = timed(dpo.open_reference, spent, "reference")
    start.train = timed(watched, spent, "steps")
    for turn in range(turns):
        if not wait_for_turn():
            return None
        losses.clear()
        go(folder / f"ours-{turn}")
        answer(seconds=sum(spent.values()), losses=rounded(losses), **spent)
    return None


def trl(folder: Path, shape: Shape, mode: str, turns: int) -> None:
    """trl's DPOTrainer."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from nemotron_launch.trainer.tokenizer import load_tokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    disable_progress_bars()
    online = mode == "online"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    spent: dict[str, float] = {}
    cut = Turns(shape.steps)

    class Measured(DPOTrainer):
        losses: list[Any]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        def _precompute_ref_logps(self, *args: Any) -> Any:
            return timed(super()._precompute_ref_logps, spent, "reference")(*args)

    class Clock(TrainerCallback):
        trainer: Measured

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if online:
                cut.start()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if online:
                cut.step_done(self.trainer.losses[-1])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            spent["steps"] = time.perf_counter() - self.began

    def trainer(turn: int) -> Measured:
        clock = Clock()
        clock.trainer = Measured(
            model=str(folder / "model"),
            args=DPOConfig(
                output_dir=str(folder / f"trl-{turn}"),
                beta=BETA,
                precompute_ref_log_probs=not online,
                per_device_train_batch_size=shape.pairs,
                learning_rate=LR,
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=CLIP,
                lr_scheduler_type="constant",
                max_steps=shape.steps * (turns if online else 1),
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer({"name": "bytes"}, None).hf,
            callbacks=[clock],
        )
        clock.trainer.losses = []
        return clock.trainer

    if online:
        trainer(0).train()
        return
    for turn in range(turns):
        if not wait_for_turn():
            return
        one = trainer(turn)
        one.train()
        answer(seconds=sum(spent.values()), losses=rounded(one.losses), **spent)


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = time.perf_counter() - began

    return call


# ----------------------------------------------------------------------------------------------------------------


def lines(result: dict[str, Any]) -> Iterator[str]:
    low, high = result["ratio_range"]
    yield f"{result['shape']}, reference {result['mode']}: {result['model']}"
    yield f"  {'':6}{'tokens/s':>10}{'GFLOP/s':>9}{'reference s':>13}{'steps s':>9}{'peak MiB':>10}  losses"
    for side in ("ours", "trl"):
        row = result[side]
        times = row["seconds"]
        yield (
            f"  {side:6}{row['tokens_per_s']:10}{row['gflops']:9}{times['reference']:13}{times['steps']:9}"
            f"{row['peak_mib']:10}  {' '.join(f'{loss:.6f}' for loss in row['losses'][:4])}"
        )
    yield (
        f"  ratio {result['ratio']} ({low} to {high}, {result['turns']} turns); "
        f"products {result['mm_gflops']} GFLOP/s, ours {result['linear_gflops']}; load {result['load'][0]}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        side, folder, name, mode, turns = sys.argv[2:]
        if side == "model":
            return make_model(Path(folder), SHAPES[name])
        return {"ours": ours, "trl": trl}[side](Path(folder), SHAPES[name], mode, int(turns))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="small,medium", help="of: " + ", ".join(SHAPES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of one turn, instead of the shape's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="all measured values")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and one turn: does it run")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.turns = "smoke", 1
    results = []
    for name in given.shapes.split(","):
        for mode in given.modes.split(","):
            results.append(compare(name, mode, given.turns, given.threads))
            if not given.json:
                print("\n".join(lines(results[-1])), flush=True)
    if given.json:
        print(json.dumps(results, indent=2))
    return None


if __name__ == "__main__":
    main()
