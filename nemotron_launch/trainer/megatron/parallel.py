"""Process groups and collectives: which rank this is in tensor, pipeline and data parallelism."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.megatron import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of every optional package that is missing
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups and this process's place in them."""

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    device: torch.device

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1


def start(
    *, tensor: int, pipeline: int, sequence_parallel: bool, device: str, seed: int, timeout_minutes: int = 30
) -> Layout:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    device: "cuda", "cpu", or "auto" for CUDA where there is one. Raises UserError where sizes do not divide.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    world = int(os.environ.setdefault("WORLD_SIZE", "1"))
    rank = int(os.environ.setdefault("RANK", "0"))
    if world % (tensor * pipeline):
        raise UserError(
            f"tensor_model_parallel_size {tensor} × pipeline_model_parallel_size {pipeline} does not divide "
            f"the {world} processes",
            where="policy.megatron_cfg",
            hint="change the sizes, or cluster.num_nodes and cluster.gpus_per_node (on CPU cluster.procs_per_node)",
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cpu")
    if on_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are visible",
                where="cluster.gpus_per_node",
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    cpu.prepare()
    if not dist.is_initialized():
        store = None
        if world == 1 and "MASTER_PORT" not in os.environ:
            store = dist.HashStore()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank if store else -1,
            world_size=world if store else -1,
            timeout=timedelta(minutes=timeout_minutes),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
        )
    model_parallel_cuda_manual_seed(seed)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=sequence_parallel and tensor > 1,
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        device=where,
    )


def world_size() -> int:
    """How many processes were started, as the environment says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stop() -> None:
    """Leave the process groups; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_data(values: Tensor) -> Tensor:
    """Sum a tensor over the data-parallel ranks, in place."""
    if parallel_state.get_data_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def max_over_data(values: Tensor) -> Tensor:
    """The greatest of each value over the data-parallel ranks, in place."""
    if parallel_state.get_data_parallel_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return values


def gather_over_data(value: T) -> list[T]:
    """The values of all data-parallel ranks, in their order (they are pickled)."""
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return [value]
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, value, group=parallel_state.get_data_parallel_group())
    return everyone


def from_last_stage(values: Tensor) -> Tensor:
    """Give every pipeline stage the last stage's tensor, in place."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any process of the job raised the flag; all must call it."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
