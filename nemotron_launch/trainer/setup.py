"""From a composed config to what a step trains with: layout, tokenizer, policy, stores; and the one place that ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import doctor, exit_codes, warm_start
from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.checkpoints import CheckpointStore, read_info
from nemotron_launch.trainer.config_changes import refuse_config_changes
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.metrics import MetricsLog, train_log
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.signals import StopRequest
from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Session:
    """What every training step has before it reads its data."""

    config: Mapping[str, Any]
    step_dir: Path
    output_dir: Path
    started: float
    stop: StopRequest
    layout: parallel.Layout
    tokenizer: Tokenizer
    architecture: Architecture
    store: CheckpointStore

    @property
    def main_rank(self) -> bool:
        return self.layout.rank == 0


def run_step(step_dir: Path, train: Callable[[Session], int], argv: list[str] | None = None) -> int:
    """The body of a step's `train.py`: reads --config, trains, and returns the attempt's exit code.

    Every UserError is printed once, by rank 0; anything else is a defect of ours and shows its stack in the log.
    """
    started = time.monotonic()
    # megatron-core warns of its own deprecations and of every optional package that is not there.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    config = yaml.safe_load(_arguments(argv).config.read_text())
    try:
        with train_log(Path(config["output_dir"])) if rank == 0 else contextlib.nullcontext():
            return train(_open(config, step_dir, started, stop))
    except UserError as error:
        if rank == 0:
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return exit_codes.FAILED
    finally:
        if sys.exc_info()[0] is None:
            parallel.stop()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="the composed config")
    return parser.parse_args(argv)


def _open(config: Mapping[str, Any], step_dir: Path, started: float, stop: StopRequest) -> Session:
    doctor.require()
    if config["policy"]["device"] == "cuda":
        doctor.require("gpu")
    policy, megatron = config["policy"], config["policy"]["megatron_cfg"]
    os.environ.update({name: str(value) for name, value in (megatron.get("env_vars") or {}).items()})
    section = config.get("dpo") or config.get("sft") or {}
    layout = parallel.start(
        tensor=megatron["tensor_model_parallel_size"],
        pipeline=megatron["pipeline_model_parallel_size"],
        sequence_parallel=megatron["sequence_parallel"],
        device=policy["device"],
        seed=section["seed"],
    )
    if layout.device.type == "cpu" and policy["precision"] != "float32":
        raise UserError(
            f"{policy['precision']} needs a GPU, and there is none", where="policy.precision", hint="set it to float32"
        )
    stop.over(lambda flag: parallel.any_rank(flag, layout.device))
    output_dir = Path(config["output_dir"])
    tokenizer = load_tokenizer(policy["tokenizer"], policy["model_name"], step_dir=step_dir)
    architecture = warm_start.resolve_architecture(policy, vocab_size=tokenizer.vocab_size, step_dir=step_dir)
    saving = config["checkpointing"]
    store = CheckpointStore(
        Path(saving["checkpoint_dir"]),
        keep_top_k=saving["keep_top_k"],
        save_period=saving["save_period"],
        metric_name=saving["metric_name"],
        higher_is_better=saving["higher_is_better"],
        ft_keep_latest_k=saving["ft_keep_latest_k"],
        ft_save_period=saving["ft_save_period"],
    )
    if layout.rank == 0:
        for done in store.clean():
            log.info("%s", done)
    parallel.barrier()
    return Session(config, step_dir, output_dir, started, stop, layout, tokenizer, architecture, store)


def numerics(config: Mapping[str, Any]) -> Numerics:
    """dtype and recompute as `policy` says."""
    policy, megatron = config["policy"], config["policy"]["megatron_cfg"]
    recompute = megatron["activation_checkpointing"]
    return Numerics(
        dtype=DTYPES[policy["precision"]],
        recompute_granularity=megatron["recompute_granularity"] if recompute else None,
        recompute_modules=tuple(megatron["recompute_modules"] or ["core_attn"]),
        num_layers_in_first_pipeline_stage=megatron["num_layers_in_first_pipeline_stage"],
        num_layers_in_last_pipeline_stage=megatron["num_layers_in_last_pipeline_stage"],
    )


def row_multiple(session: Session) -> int:
    """Tokens of a row are padded to a multiple of this."""
    tensor = session.layout.tensor if session.layout.sequence_parallel else 1
    return math.lcm(session.config["policy"]["make_sequence_length_divisible_by"] or 1, tensor)


def new_policy(session: Session) -> Policy:
    """A policy of the config's shape with weights drawn from the seed."""
    section = session.config.get("dpo") or session.config.get("sft") or {}
    return Policy(session.architecture, session.layout, numerics(session.config), seed=section["seed"])


def checkpoint_to_resume(session: Session) -> tuple[Path, dict[str, Any]] | None:
    """The run's newest complete checkpoint with its training_info, or None for a fresh run.

    Raises UserError where a setting that changes the result differs from the checkpoint's, naming the keys.
    """
    folder = session.store.latest()
    if folder is None:
        return None
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    allow = session.config["checkpointing"]["allow_config_change"]
    for line in refuse_config_changes(stored, dict(session.config), checkpoint=str(folder), allow=allow):
        log.warning("resuming with another config: %s", line)
    return folder, read_info(folder) or {}


def open_metrics(session: Session, resume_step: int) -> MetricsLog:
    """metrics.jsonl, train.log and the loggers; on other ranks a log that drops everything."""
    if session.main_rank:
        text = yaml.safe_dump(dict(session.config), sort_keys=False, allow_unicode=True)
        (session.output_dir / "config.yaml").write_text(text, encoding="utf-8")
    return MetricsLog(
        session.output_dir,
        session.config["logger"],
        resume_step=resume_step,
        config=session.config,
        enabled=session.main_rank,
    )
