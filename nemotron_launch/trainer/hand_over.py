"""The policy's weights as a Hugging Face folder, whole, for an engine in another process; from any layout."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.agreement import on_rank_0
from nemotron_launch.trainer.architecture import hf_config
from nemotron_launch.trainer.policy import Policy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

MAX_FILE_BYTES = 5 << 30


def write_weights(policy: Policy, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write the policy as safetensors in files of at most max_file_bytes, with config.json; all ranks call it.

    Rank 0 holds one file's tensors at a time. The folder, which must not exist, appears when it is whole. Raises
    UserError, on all ranks, where it cannot be written.
    """
    temporary = folder.with_name(f"tmp_{folder.name}")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    on_rank_0(prepare)
    writer = _Writer(temporary, max_file_bytes) if policy.layout.rank == 0 else None
    for name, value in whole_weights(policy):
        if writer is not None:
            writer.add(name, value)

    def finish() -> None:
        assert writer is not None
        writer.finish(hf_config(policy.architecture) | {"torch_dtype": str(policy.numerics.dtype).split(".")[1]})
        os.replace(temporary, folder)

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


class _Writer:
    """Collects tensors into files, and then says in an index which is where. What goes wrong, `finish` raises."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.held: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.places: dict[str, str] = {}
        self.failure: OSError | None = None

    def add(self, name: str, value: Tensor) -> None:
        if self.held and self.bytes + value.nbytes > self.most:
            self._write()
        self.held[name] = value.to("cpu", copy=True).contiguous()
        self.bytes += value.nbytes
        self.total += value.nbytes

    def finish(self, config: dict[str, Any]) -> None:
        self._write()
        if self.failure is not None:
            raise self.failure
        index = {"metadata": {"total_size": self.total}, "weight_map": self.places}
        (self.folder / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file_name = f"model-{len(set(self.places.values())) + 1:05d}.safetensors"
        try:
            if self.failure is None:
                save_file(self.held, self.folder / file_name, metadata={"format": "pt"})
        except OSError as error:  # the other ranks are still sending: take what they send
            self.failure = error
        except SafetensorError as error:
            self.failure = OSError(f"{self.folder / file_name}: {error}")
        self.places |= dict.fromkeys(self.held, file_name)
        self.held, self.bytes = {}, 0
