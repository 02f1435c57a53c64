"""Finished runs for tests: folders and rows as the shipped steps leave them, without training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.artifacts import record, registry
from nemotron_launch.catalog import Step, find_config, find_step
from nemotron_launch.config.compose import Composed
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import open_host
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.submission import new_run
from nemotron_launch.plan import compose_for, config_text, plan_job
from nemotron_launch.trainer.architecture import inline_architecture

START = "checkpointing.pretrained_checkpoint.path"
MINUTE = 60.0


def composed(step_id: str, *overrides: str) -> tuple[Step, Composed]:
    """A shipped step with its tiny config."""
    step = find_step(step_id)
    return step, compose_for(step, find_config(step, "tiny"), overrides)


def byte_tokenizer(folder: Path, template: str | None = None, merges: Sequence[str] = ()) -> None:
    """The files that a trainer saves of its byte-level tokenizer; merges: make it another one."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    added = [
        {"id": 256 + n, "content": token, "special": True, "normalized": False}
        for n, token in enumerate(("<pad>", "<bos>", "<eos>"))
    ]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "fuse_unk": False, "vocab": vocab, "merges": list(merges)}
    rules = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": split, "model": model}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def checkpoint(folder: Path, config: dict[str, Any], step: int = 3, *, loss: float = 0.5) -> Path:
    """A step_N without weights, as its config says it is."""
    home = folder / f"step_{step}"
    byte_tokenizer(home / "policy" / "tokenizer")
    shape = inline_architecture(config["policy"]["architecture"], tokenizer_vocab_size=259)
    (home / "policy" / "architecture.json").write_text(json.dumps(asdict(shape)))
    (home / "training_info.json").write_text(json.dumps({"step": step, "train:loss": loss}))
    return home


def finished(
    ledger: Ledger,
    step_id: str = "sft/megatron",
    *overrides: str,
    run_id: str,
    ago: float = MINUTE,
    loss: float = 0.5,
    register: bool = True,
    **fields: Any,
) -> Run:
    """A run of a shipped step that has finished `ago` seconds ago: its folder, its record, its row."""
    step, config = composed(step_id, *overrides)
    job = plan_job(step, config, run_id=run_id)
    run_dir = Path(job.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config_text(config))
    if step_id == "data_prep/rl_prep":
        manifest = Path(str(config.get("manifest_path")))
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"format": 1, "loss": loss}))
    else:
        checkpoint(Path(str(config.get("checkpointing.checkpoint_dir"))), config.data, loss=loss)
    record.register(step.folder, config.data, config_path=run_dir / "config.yaml", metrics={"train/loss": loss})
    now = time.time()
    run = replace(
        new_run(job, overrides),
        state="finished",
        exit_code=0,
        created=now - ago - 1,
        started=now - ago - 1,
        ended=now - ago,
        **fields,
    )
    ledger.add([run])
    if register:
        registry.register(ledger, open_host({}), [run])
    return run


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """An empty ledger; runs leave their output in the working directory, which is an empty folder."""
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RL_OUTPUT_DIR", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Ledger()
