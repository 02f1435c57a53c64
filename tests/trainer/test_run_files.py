"""What a run leaves in its output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from runs import STEPS, Finished, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(dpo) -> tuple[Run, Finished]:
    """A run of 9 steps over 16 pairs, two of the 18 rows being bad, that keeps checkpoints by metric and by age."""
    run = dpo(
        data__max_bad_rows=0.2,
        dpo__max_num_steps=9,
        dpo__val_period=2,
        checkpointing__save_period=2,
        checkpointing__keep_top_k=1,
        checkpointing__metric_name="val:validation-default_loss",
        checkpointing__higher_is_better=True,
        checkpointing__ft_save_period=3,
        checkpointing__ft_keep_latest_k=2,
    )
    run.folder.mkdir(exist_ok=True)
    rows = (STEPS["dpo"] / "data/train.jsonl").read_text().splitlines(keepends=True)[:16]
    path = run.folder / "rows.jsonl"
    path.write_text("".join([*rows[:5], "{torn\n", *rows[5:], '{"prompt": "a", "chosen": "b"}\n']))
    run = run.with_(data__train__data_path=str(path))
    finished = run.go()
    assert finished.code == 0, finished.said
    return run, finished


def test_every_step_is_one_line_and_says_its_epoch(done):
    run, _ = done
    assert [line["step"] for line in run.metrics()] == list(range(10))  # 0 is the validation before the first
    assert [line["epoch"] for line in run.metrics()] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]  # two steps of 8 of 16 rows
    assert [line["step"] for line in run.metrics() if "validation-default/loss" in line] == [0, 2, 4, 6, 8, 9]


def test_bad_rows_and_steps_are_in_the_log(done):
    run, finished = done
    log = (run.out / "train.log").read_text()
    for text in (log, finished.said):
        assert "data.train: 2 of 18 rows left out" in text
        assert "rows.jsonl:6" in text
        assert "step 1/9  loss" in text
        assert "policy_accuracy" in text
    assert log.count("saved step") == 6  # 2, 3, 4, 6, 8, 9


def test_the_best_by_metric_the_newest_and_the_last_are_kept(done):
    run, _ = done
    # Saved: 2, 4, 6, 8 by save_period, 3, 6, 9 by ft_save_period. The loss falls, so the highest of the ranked is 2's.
    losses = {line["step"]: line["validation-default/loss"] for line in run.metrics() if line["step"] in (2, 4, 6, 8)}
    assert max(losses, key=lambda step: losses[step]) == 2
    assert run.saved() == [2, 8, 9]


def test_a_checkpoint_has_what_the_documentation_says(done):
    run, _ = done
    checkpoint = run.checkpoints / "step_8"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    tokenizer = {name for name in files if name.startswith("policy/tokenizer/")}
    assert {"policy/tokenizer/tokenizer.json", "policy/tokenizer/generation_config.json"} <= tokenizer
    weights = "policy/weights/iter_0000000"
    assert files - tokenizer == {
        "training_info.json",
        "config.yaml",
        "train_dataloader.json",
        "policy/architecture.json",
        f"{weights}/metadata.json",
        f"{weights}/.metadata",
        f"{weights}/common.pt",
        f"{weights}/__0_0.distcp",
    }
    info = run.info(8)
    # Step 8 of two a epoch: four epochs are over, 64 pairs seen; tiny answers have 6 tokens, of two sequences each.
    assert {key: info[key] for key in ("epoch", "step", "step_in_epoch", "total_steps", "consumed_samples")} == {
        "epoch": 4,
        "step": 8,
        "step_in_epoch": 0,
        "total_steps": 9,
        "consumed_samples": 64,
    }
    assert info["total_valid_tokens"] == 64 * 2 * 6
    assert info["val:validation-default_loss"] == run.metrics()[8]["validation-default/loss"]
    assert info["train:loss"] == run.metrics()[8]["train/loss"]
    assert json.loads((checkpoint / "train_dataloader.json").read_text()) == {"epoch": 4, "step_in_epoch": 0}
    assert info["warm_start"]["path"].endswith("step_7/policy/weights/iter_0000000")


def test_every_key_of_training_info_and_every_metric_is_documented(done):
    run, _ = done
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    plain = [key for key in run.info(8) if ":" not in key]
    metrics = {key.split("/", 1)[1] for line in run.metrics() for key in line if "/" in key}
    assert [key for key in [*plain, *sorted(metrics)] if f"`{key}`" not in text] == []


def test_the_config_is_kept_and_the_exit_code_is_written(done):
    run, _ = done
    config = yaml.safe_load((run.out / "config.yaml").read_text())
    assert config["dpo"]["max_num_steps"] == 9
    assert yaml.safe_load((run.checkpoints / "step_8/config.yaml").read_text()) == config
    assert (run.out / "exit_code").read_text() == "0\n"
