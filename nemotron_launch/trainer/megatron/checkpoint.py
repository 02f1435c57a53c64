"""Tensors of a checkpoint in megatron-core's torch_dist format, readable at any tensor and pipeline size."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.megatron import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from megatron.core.models.gpt import GPTModel

# What the libraries below raise; CheckpointException is no Exception.
WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)
READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    CheckpointException,
    dist_checkpointing.core.CheckpointingException,
)
# How the distributed optimizer lays out its shards, where it is in use.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(folder: Path, model: GPTModel, optimizer: Any, scheduler: Any) -> None:
    """Write weights and, if given, optimizer and schedule; all ranks call it, into an existing empty folder.

    Raises one of WRITE_ERRORS where that breaks off.
    """
    cpu.prepare()
    state = _state(model, optimizer, scheduler, loading=False)
    dist_checkpointing.save(state, str(folder), WriteHere("torch_dist", 1), content_metadata=METADATA)


def load_training_state(folder: Path, model: GPTModel, optimizer: Any, scheduler: Any) -> None:
    """Restore weights, optimizer and schedule in place, from any layout."""
    cpu.prepare()
    state = _load(folder, _state(model, optimizer, scheduler, loading=True))
    with torch.no_grad():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for value in inner.optimizer.state.values():
            if isinstance(value.get("step"), torch.Tensor):
                value["step"] = value["step"].clone()  # loading shares one tensor between all parameters
    scheduler.load_state_dict(state["scheduler"])


def load_weights(folder: Path, model: GPTModel) -> None:
    """Restore the weights alone, in place, from any layout.

    Raises UserError naming the tensors that are missing or of another shape.
    """
    cpu.prepare()
    wanted = model.sharded_state_dict(metadata=METADATA)
    _check_shapes(folder, wanted)
    state = _load(folder, {"model": wanted})
    with torch.no_grad():
        model.load_state_dict(state["model"])


class WriteHere(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron-core's format, written by this process.

    Its own strategy forks writers and starts one more Python to collect their results. That costs 3 s and the memory of
    a second program on every rank, and a writer whose rank is killed waits for it for ever. Here, too, what one rank
    cannot write is an error on all of them.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        named, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(named, False),
            # One thread: torch drops what goes wrong in the others, and with it the tensors they had to write.
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True),
            planner=self.planner(),
        )

    def planner(self) -> torch_dist.MCoreSavePlanner:
        """What gives the writer its tensors."""
        return torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)


def _state(model: GPTModel, optimizer: Any, scheduler: Any, *, loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=METADATA)
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=METADATA)
        state["scheduler"] = scheduler.state_dict()
    return state


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))
    except READ_ERRORS as error:
        raise UserError(f"cannot be read as a Megatron checkpoint: {last_line(error)}", where=str(folder)) from error


def last_line(error: BaseException) -> str:
    """What an error says in the end: those of several ranks come with their stacks in front."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _check_shapes(folder: Path, wanted: dict[str, Any]) -> None:
    """Compare global shapes first: megatron-core's own message for a mismatch names neither tensor nor sizes."""
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except Exception as error:  # the library raises whatever its file reader did
        raise UserError(
            "is not a Megatron checkpoint (torch_dist)", where=str(folder), hint=f"reading it gave: {error}"
        ) from error
    problems = []
    for tensor in wanted.values():
        if not isinstance(tensor, ShardedTensor):
            continue
        key = tensor.key
        if key not in stored:
            problems.append(f"{key}: not in the checkpoint")
        elif tuple(stored[key].global_shape) != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            shapes = f"{tuple(stored[key].global_shape)} there, {tuple(tensor.global_shape)} here"
            problems.append(f"{key}: {shapes}")
    if problems:
        shown = problems[:8] + ([f"… and {len(problems) - 8} more"] if problems[8:] else [])
        advice = "compare policy.model_name or policy.architecture with the run that wrote it"
        raise UserError("does not fit the policy:", where=str(folder), hint="\n".join([*shown, advice]))
