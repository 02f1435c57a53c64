"""Runs for tests of reports: output folders as the trainer leaves them, and rows of the ledger for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_launch.jobs.ledger import Ledger
from tests.browser import browser  # noqa: F401
from tests.jobs.rows import row

HOSTILE = "</script><script>document.title='pwned'</script><!--\"'`${1}&\\\u2028\u0007\x1b[31m"


def make_run(folder: Path, *, steps: int = 60, speed: float = 1.0, samples: bool = True, **config: Any) -> Path:
    """An output folder of GRPO that went well. config: sections and values above the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            line: dict[str, Any] = {"step": step, "epoch": 0, "time": 1.8e9 + 2 * step}
            learnt = 1 - math.exp(-speed * step / 20)
            if step:
                line |= {
                    "train/loss": -0.03 * math.sin(step), "train/reward": 0.5 + 0.45 * learnt, "train/reward_min": 0.0,
                    "train/reward_max": 1.0, "train/reward_std_within_groups": 0.4 - 0.25 * learnt,
                    "train/reference_kl": 0.2 * learnt, "train/approx_entropy": 0.1 - 0.05 * learnt,
                    "train/mean_gen_tokens_per_sample": 6.0 + (step % 3) / 10, "train/truncation_rate": 0.0,
                    "train/unheard_of": 3.0 * step, "timing/train/generation": 0.02, "timing/train/reward": 0.01,
                    "timing/train/policy_training": 0.05, "timing/train/total_step_time": 0.09,
                    "timing/train/tokens_per_sec": 1e4,
                }  # fmt: skip
            if step % 20 == 0:
                line |= {"validation/accuracy": 0.55 + 0.4 * learnt, "timing/validation/total_validation_time": 0.1}
            file.write(json.dumps(line) + "\n")
    composed = {"grpo": {"max_num_steps": 60, "seed": 1}, "policy": {"megatron_cfg": {"optimizer": {"lr": 1e-4}}}}
    whole = {**composed, "output_dir": str(folder), **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8", errors="replace")
    if samples:
        rows = [
            {"step": step, "kind": "train", "question": f"sort {step}:", "answer": f"{step}", "reward": step % 2}
            for step in range(1, 31)
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def add_run(name: str, folder: Path, *, state: Path | None = None, **fields: Any) -> None:
    """A finished run of this output folder in the ledger."""
    values = {"step": "rl/nemo_rl/rlvr", "state": "finished", "exit_code": 0, "started": 1.8e9, "ended": 1.8e9 + 120}
    with Ledger(state) as ledger:
        ledger.add([row(name, folder.parent, **{**values, "output_dir": str(folder), **fields})])


@pytest.fixture
def ledger_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ledger and an empty working directory."""
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work
