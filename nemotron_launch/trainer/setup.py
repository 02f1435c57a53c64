"""From a composed config to what a step trains with: layout, tokenizer, policy, stores; and the one place that ends."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nemotron_launch.catalog import load_step
from nemotron_launch.config import checks
from nemotron_launch.errors import UserError
from nemotron_launch.trainer import doctor, exit_codes, warm_start
from nemotron_launch.trainer.agreement import on_rank_0, together
from nemotron_launch.trainer.architecture import Architecture, differences, read_architecture
from nemotron_launch.trainer.checkpoints import INFO, CheckpointStore, read_info
from nemotron_launch.trainer.config_changes import config_changes, refuse_changes
from nemotron_launch.trainer.data import manifest
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.metrics import MetricsLog
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.process import process_start, run_process
from nemotron_launch.trainer.signals import StopRequest
from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer
from nemotron_launch.trainer.warm_start import WarmStart

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What resuming reads of training_info.json.
RESUME_FIELDS = (
    "epoch",
    "step",
    "step_in_epoch",
    "consumed_samples",
    "total_valid_tokens",
    "save_optimizer",
    "warm_start",
    "tokenizer",
    "data",
)
TITLES = {"tokenizer": "policy.tokenizer (its fingerprint)", "data": "data.train (its rows' fingerprint)"}


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
    """The body of a step's `train.py`; as run_process, which opens the Session that the step trains with."""
    started, stop = process_start(), StopRequest()
    return run_process(step_dir, lambda config: train(_open(config, step_dir, started, stop)), argv)


def _open(config: Mapping[str, Any], step_dir: Path, started: float, stop: StopRequest) -> Session:
    doctor.require()
    if config["policy"]["device"] == "cuda":
        doctor.require("gpu")
    _check_sizes(config)
    policy, megatron = config["policy"], config["policy"]["megatron_cfg"]
    os.environ.update({name: str(value) for name, value in (megatron.get("env_vars") or {}).items()})
    layout = parallel.start(
        tensor=megatron["tensor_model_parallel_size"],
        pipeline=megatron["pipeline_model_parallel_size"],
        sequence_parallel=megatron["sequence_parallel"],
        device=policy["device"],
        seed=loop_section(config)["seed"],
    )
    if layout.device.type == "cpu" and policy["precision"] != "float32":
        raise UserError(
            f"{policy['precision']} needs a GPU, and there is none", where="policy.precision", hint="set it to float32"
        )
    stop.over(lambda flag: parallel.any_rank(flag, layout.device))

    def files() -> tuple[Tokenizer, Architecture, CheckpointStore]:
        tokenizer = load_tokenizer(policy["tokenizer"], policy["model_name"], step_dir=step_dir)
        architecture = warm_start.resolve_architecture(policy, vocab_size=tokenizer.vocab_size, step_dir=step_dir)
        return tokenizer, architecture, _store(config["checkpointing"])

    tokenizer, architecture, store = together(files)
    on_rank_0(lambda: manifest.check_data(config["data"], load_step(step_dir).id, step_dir))
    on_rank_0(lambda: _tidy(store))
    return Session(config, step_dir, Path(config["output_dir"]), started, stop, layout, tokenizer, architecture, store)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """The launcher's checks again, for the processes that were started: they may be others than the config's."""
    started = {**config["cluster"], "num_nodes": 1, "procs_per_node": int(os.environ.get("WORLD_SIZE", "1"))}
    steps = {section: step for step, (section, _) in checks.LOOPS.items()} | {"grpo": checks.ROLLOUTS[0]}
    step = next(step for section, step in steps.items() if config.get(section))
    problems = checks.check(step, {**config, "cluster": started})
    if problems:
        more = [line for problem in problems[1:] for line in (f"{problem.key}: {problem.message}", problem.hint)]
        raise UserError(problems[0].message, where=problems[0].key, hint="\n".join([problems[0].hint, *more]))


def loop_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of a config that rules its loop: dpo, sft, rm or grpo."""
    found: Mapping[str, Any] = config.get("dpo") or config.get("sft") or config.get("rm") or config["grpo"]
    return found


def _store(saving: Mapping[str, Any]) -> CheckpointStore:
    return CheckpointStore(
        Path(saving["checkpoint_dir"]),
        keep_top_k=saving["keep_top_k"],
        save_period=saving["save_period"],
        metric_name=saving["metric_name"],
        higher_is_better=saving["higher_is_better"],
        ft_keep_latest_k=saving["ft_keep_latest_k"],
        ft_save_period=saving["ft_save_period"],
    )


def _tidy(store: CheckpointStore) -> None:
    """End what a killed attempt had begun: saves, swaps, removals."""
    for done in store.clean():
        log.info("%s", done)
    store.prune()


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
    seed = loop_section(session.config)["seed"]
    return Policy(session.architecture, session.layout, numerics(session.config), seed=seed)


def checkpoint_to_resume(session: Session, *, data: str) -> tuple[Path, dict[str, Any]] | None:
    """The run's newest checkpoint with its training_info, or None for a fresh run; data: the rows' fingerprint.

    Raises UserError where something that decides the result is not as it was, naming it: keys of the config, the
    policy's shape, the tokenizer, the rows. Paths may change, what lies there may not.
    """
    return on_rank_0(lambda: _find_own(session, data))


def _find_own(session: Session, data: str) -> tuple[Path, dict[str, Any]] | None:
    folder = session.store.newest_to_resume()
    if folder is None:
        return None
    info = read_info(folder) or {}
    if missing := [name for name in RESUME_FIELDS if name not in info]:
        raise UserError(
            f"lacks {', '.join(missing)}, so nothing can resume from it",
            where=str(folder / INFO),
            hint="start in another output_dir; checkpointing.pretrained_checkpoint.path may name this checkpoint",
        )
    changes = config_changes(_stored_config(folder), session.config)
    for name, now in (("tokenizer", session.tokenizer.fingerprint), ("data", data)):
        if info[name] != now:
            changes.append((TITLES[name], info[name][:12], now[:12]))
    allow = session.config["checkpointing"]["allow_config_change"]
    for line in refuse_changes(changes, checkpoint=str(folder), allow=allow):
        log.warning("resuming with another config: %s", line)
    shape = read_architecture(folder / "policy")
    if shape and (fields := differences(shape, session.architecture)):
        hint = "\n".join([*fields, "restore policy.model_name or policy.architecture, or give another output_dir"])
        raise UserError("the policy has another shape than when the run began:", where=str(folder), hint=hint)
    return folder, info


def _stored_config(folder: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("is not YAML", where=str(folder / "config.yaml"), hint=str(error)) from error
    return stored if isinstance(stored, dict) else {}


def find_start(session: Session, recorded: Mapping[str, Any] | None, *, again: bool) -> WarmStart:
    """The weights from which the run starts, or, given what its checkpoint recorded of them, started.

    again: whether a resumed run needs the same ones, which, where they were drawn, depend on seed and layout.
    """
    layout, section = session.layout, loop_section(session.config)
    drawn = f"seed {section['seed']}, tensor {layout.tensor}, pipeline {layout.pipeline}" if again else "once"
    return on_rank_0(
        lambda: warm_start.find(
            session.config,
            session.architecture,
            tokenizer=session.tokenizer.fingerprint,
            drawn=drawn,
            step_dir=session.step_dir,
            recorded=recorded,
        )
    )


def say_finished(session: Session, folder: Path, step: int, total: int, *, limit: str) -> int:
    """Nothing is left to do; limit: the config key that says so. Returns the exit code."""
    log.info(
        "finished already: %s holds step %d of %d. To train on, raise %s; to start afresh, give another output_dir "
        "or remove %s",
        folder, step, total, limit, session.store.folder,
    )  # fmt: skip
    return exit_codes.FINISHED


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """sha256 of the rows that a run trains on, as token ids; where they lie does not matter."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def open_metrics(session: Session, resume_step: int) -> MetricsLog:
    """metrics.jsonl, train.log and the loggers; on other ranks a log that drops everything."""

    def on_this_rank() -> MetricsLog:
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

    return together(on_this_rank)
