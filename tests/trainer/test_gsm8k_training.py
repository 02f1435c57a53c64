"""Real preference data trains: solutions of GSM8K problems, judged right and wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from runs import REPOSITORY, Run

FOLDER = Path(os.environ.get("NEMOTRON_TEST_GSM8K", REPOSITORY / "../shared/data/gsm8k"))
# Bytes of prompt and answer; 94 of 100 training pairs are not longer.
LONGEST = 1024
MODEL = {
    "policy.architecture.num_layers": 2,
    "policy.architecture.hidden_size": 64,
    "policy.architecture.intermediate_size": 128,
    "policy.max_total_sequence_length": LONGEST,
    "checkpointing.metric_name": None,
}


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no folder {FOLDER}; NEMOTRON_TEST_GSM8K names another")
def test_real_preferences_train_from_a_warm_start_on_real_solutions(tmp_path):
    sft = Run("sft", tmp_path / "sft", MODEL).with_(
        data__train__data_path=str(FOLDER / "train.jsonl"),
        data__validation__data_path=str(FOLDER / "test.jsonl"),
        data__default__input_key="question",
        data__default__output_key="answer",
        sft__max_num_steps=8,
        sft__val_period=0,
        sft__val_batches=4,
        sft__val_generation__num_prompts=0,
    )
    finished = sft.go()
    assert finished.code == 0, finished.said
    losses = [line["train/loss"] for line in sft.metrics()]
    # An untrained model knows nothing of 259 bytes: ln 259 = 5.56 nats a byte.
    assert losses[0] == pytest.approx(math.log(259), abs=0.2)
    assert losses[-1] < losses[0] - 0.3

    dpo = Run("dpo", tmp_path / "dpo", MODEL).with_(
        data__train__data_path=str(FOLDER / "preferences.train.jsonl"),
        data__validation__data_path=str(FOLDER / "preferences.validation.jsonl"),
        checkpointing__pretrained_checkpoint__path=str(sft.checkpoints),
        dpo__max_num_steps=6,
        dpo__val_period=0,
        dpo__val_batches=4,
        dpo__val_generation__num_prompts=0,
    )
    finished = dpo.go()
    assert finished.code == 0, finished.said
    lines = {line["step"]: line for line in dpo.metrics()}
    assert lines.keys() == set(range(7))
    numbers = [value for line in lines.values() for value in line.values()]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)  # null stands for NaN
    assert lines[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(lines[step]["train/num_valid_samples"] for step in range(1, 7)) > 0.8 * 6 * 8
    assert "rows are longer than the limit: kept in batches, out of the loss" in (dpo.out / "train.log").read_text()
    assert lines[6]["validation-default/loss"] < lines[0]["validation-default/loss"]
