"""Prints how far the logits of a Megatron checkpoint and of a Hugging Face folder are apart: the largest, and where.

    python both_sides.py CHECKPOINT_STEP HF_FOLDER ROWS.jsonl

Not the step's own comparison: each row's text by itself, tokens by each side's own tokenizer, the weights read by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_launch.trainer.architecture import read_architecture
from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.checkpoints import WEIGHTS
from nemotron_launch.trainer.megatron import checkpoint, parallel
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.tokenizer import load_tokenizer


def main(step: Path, folder: Path, rows: Path) -> None:
    layout = parallel.start(tensor=1, pipeline=1, sequence_parallel=False, device="cpu", seed=1)
    architecture = read_architecture(step / "policy")
    assert architecture is not None
    policy = Policy(architecture, layout, Numerics())
    checkpoint.load_weights(step / WEIGHTS, policy.gpt)
    ours = load_tokenizer({"name": str(step / "policy" / "tokenizer")}, None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    furthest, texts = 0.0, 0
    for line in rows.read_text().splitlines()[:20]:
        row = json.loads(line)
        text = row["prompt"] + row["expected_answer"]
        ids = ours.encode(text)
        assert list(ids) == theirs.encode(text, add_special_tokens=False), text
        megatron = policy.logits(
            collate([Group(0, (torch.tensor(list(ids)).numpy(),))], pad_id=0, device=layout.device)
        )
        with torch.no_grad():
            transformers = model(torch.tensor([list(ids)])).logits[0, :-1]
        furthest = max(furthest, float((megatron - transformers).abs().max()))
        texts += 1
    print(json.dumps({"difference": furthest, "texts": texts}))
    parallel.stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
