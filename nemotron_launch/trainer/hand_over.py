"""The policy's weights as a Hugging Face folder, whole, for an engine in another process; from any layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.agreement import on_rank_0
from nemotron_launch.trainer.hf_folders import MAX_FILE_BYTES, FolderWriter, config_of
from nemotron_launch.trainer.policy import Policy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


def write_weights(policy: Policy, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write the policy as safetensors in files of at most max_file_bytes, with config.json; all ranks call it.

    Rank 0 holds one tensor at a time. The folder, which must not exist, appears when it is whole. Raises UserError, on
    all ranks, where it cannot be written.
    """
    a = policy.architecture
    dtypes = dict.fromkeys(hf.hf_names(a), policy.numerics.dtype)
    made: list[FolderWriter] = []  # on rank 0
    on_rank_0(lambda: made.append(FolderWriter(folder, a, dtypes, max_file_bytes=max_file_bytes)))
    for name, value in whole_weights(policy):
        made[0].add(name, value)

    def finish() -> None:
        made[0].finish(config_of(a, dtypes.values()))
        made[0].publish(sync=False)

    on_rank_0(finish)


@torch.no_grad()
def whole_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, on rank 0, in model order; the others run through it and get none."""
    layout, a = policy.layout, policy.architecture
    if layout.data_rank != 0:
        return
    layers: Any = policy.gpt.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    own = [(hf.global_name(name, offset), parameter) for name, parameter in policy.gpt.named_parameters()]
    for stage, rank in enumerate(dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())):
        mine = stage == layout.pipeline_rank
        # The stage's first tensor-parallel rank sends, all of its ranks gather.
        if mine:
            whole = ((name, _whole(parameter, name, layout.tensor)) for name, parameter in own)
            if layout.pipeline_rank == 0:
                for name, value in whole:
                    yield from hf.to_hf(name, value, a) if layout.rank == 0 else ()
            else:
                for name, value in whole:
                    if layout.tensor_rank == 0:
                        dist.send_object_list([name, tuple(value.shape)], dst=0, device=layout.device)
                        dist.send(value.contiguous(), dst=0)
                if layout.tensor_rank == 0:
                    dist.send_object_list([None, None], dst=0, device=layout.device)
        elif layout.rank == 0:
            for name, value in _received(policy, rank):
                yield from hf.to_hf(name, value, a)


def _received(policy: Policy, rank: int) -> Iterator[tuple[str, Tensor]]:
    while True:
        header: list[Any] = [None, None]
        dist.recv_object_list(header, src=rank, device=policy.layout.device)
        name, shape = header
        if name is None:
            return
        value = torch.empty(shape, dtype=policy.numerics.dtype, device=policy.layout.device)
        dist.recv(value, src=rank)
        yield name, value


def _whole(parameter: torch.nn.Parameter, name: str, size: int) -> Tensor:
    """The whole of a parameter from its tensor-parallel parts, on all of these ranks."""
    value = parameter.detach()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return value
    parts = [torch.empty_like(value) for _ in range(size)]
    dist.all_gather(parts, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return hf.unshard(parts, parameter, name)
