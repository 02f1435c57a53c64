"""Weights of a torch_dist checkpoint one tensor at a time, with no model in memory: what conversion writes and reads.

A tensor of a layer is stored as a slice of one that holds all layers', [L, …], under the name of its Transformer Engine
module. Names are those of `named_parameters` of the whole model.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.megatron import cpu
from nemotron_launch.trainer.megatron.checkpoint import METADATA, READ_ERRORS, WriteHere, last_line
from nemotron_launch.trainer.megatron.model import Numerics, build_model
from nemotron_launch.trainer.megatron.parallel import Layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Norms are stored as parts of the linear layers that they feed.
_STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_NAMED = {stored: name for name, stored in _STORED.items()}


def write(
    folder: Path,
    a: Architecture,
    layout: Layout,
    value: Callable[[str], Tensor],
    dtype: Callable[[str], torch.dtype],
) -> None:
    """Write weights into an existing empty folder; all ranks call it, each writes its part.

    value: a whole parameter by its name, wanted a few times, one after the other. dtype: the type of a stored tensor
    by a layer's name without its number; the same for all layers. Raises one of checkpoint.WRITE_ERRORS.
    """
    cpu.prepare()
    meta = dataclasses.replace(layout, device=torch.device("meta"))
    with meta.device:
        model = build_model(a, meta, Numerics(), seed=0)
    for name, parameter in model.named_parameters():
        match = _LAYER.fullmatch(name)
        parameter.data = parameter.data.to(dtype(match[2] if match else name))
    state = {"model": model.sharded_state_dict(metadata=METADATA)}
    dist_checkpointing.save(state, str(folder), _WriteOneByOne(value), content_metadata=METADATA)


class _WriteOneByOne(WriteHere):
    """Takes the values from a function when their turn comes; the state has shapes only."""

    def __init__(self, value: Callable[[str], Tensor]) -> None:
        super().__init__("torch_dist", 1)
        self.value = value

    def planner(self) -> torch_dist.MCoreSavePlanner:
        return _Asking(self.value)


class _Asking(torch_dist.MCoreSavePlanner):
    def __init__(self, value: Callable[[str], Tensor]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.value = value

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        name, offsets, sizes = _in_layer(write_item.index.fqn, chunk.offsets, chunk.sizes)
        part = _slice(self.value(name), offsets, sizes)
        return part.to(write_item.tensor_data.properties.dtype).reshape(chunk.sizes).contiguous()


def _in_layer(key: str, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[str, Sequence[int], Sequence[int]]:
    """The parameter of which a stored slice is a part, and the part."""
    rest = key.removeprefix("decoder.layers.")
    if rest == key:
        return key, offsets, sizes
    return f"decoder.layers.{offsets[0]}.{_NAMED.get(rest, rest)}", offsets[1:], sizes[1:]


def _slice(whole: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A part of a tensor; rows of a vocabulary that only fill it up for tensor parallelism are zeros."""
    part = whole
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), max(0, min(size, part.shape[dim] - start)))
    if part.shape[0] == sizes[0]:
        return part
    filler = part.new_zeros(sizes[0] - part.shape[0], *sizes[1:])
    return torch.cat([part, filler])


class StoredTensors:
    """The weights of a checkpoint, whichever layout wrote it; one process reads, with no collectives.

    Raises UserError where the folder is no torch_dist checkpoint or lacks a tensor of the architecture.
    """

    def __init__(self, folder: Path, a: Architecture) -> None:
        self.folder, self.architecture = folder, a
        self.reader = FileSystemReader(folder)
        try:
            self.metadata = self.reader.read_metadata()
        except Exception as error:  # it is unpickled, so anything may come of a torn file
            raise UserError(
                "is not a Megatron checkpoint (torch_dist)", where=str(folder), hint=f"reading it gave: {error}"
            ) from error
        self.reader.set_up_storage_reader(self.metadata, True)

    def shape(self, name: str) -> Tensor:
        """A parameter without its values: shape and stored type."""
        _, entry, layer = self._entry(name)
        sizes = entry.size if layer is None else entry.size[1:]
        return torch.empty(sizes, dtype=entry.properties.dtype, device="meta")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some whole parameters, a layer's say, in their stored types; vocabularies with the rows that fill them up."""
        values, items, targets = {}, [], {}
        for name in names:
            key, entry, layer = self._entry(name)
            sizes = list(entry.size) if layer is None else [1, *entry.size[1:]]
            offsets = [layer or 0, *[0] * (len(sizes) - 1)]
            target = torch.empty(sizes, dtype=entry.properties.dtype)
            values[name] = target if layer is None else target[0]
            targets[(key, torch.Size(offsets))] = target
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            items += create_read_items_for_chunk_list(key, entry, [chunk])
        try:
            self.reader.read_data(LoadPlan(items), _Placing(targets)).wait()
        except READ_ERRORS as error:
            raise UserError(
                f"cannot be read as a Megatron checkpoint: {last_line(error)}", where=str(self.folder)
            ) from error
        return values

    def _entry(self, name: str) -> tuple[str, TensorStorageMetadata, int | None]:
        """The key under which a parameter is stored, what is there, and which of its layers is meant."""
        match = _LAYER.fullmatch(name)
        tried: list[tuple[str, int | None]] = [(name, None)]
        if match:
            stored = _STORED.get(match[2], match[2])
            # Megatron-LM stores layers of different kinds each under its own number.
            tried = [(f"decoder.layers.{stored}", int(match[1])), (f"decoder.layers.{match[1]}.{stored}", None)]
        for key, layer in tried:
            entry = self.metadata.state_dict_metadata.get(key)
            if isinstance(entry, TensorStorageMetadata) and (layer is None or layer < entry.size[0]):
                return key, entry, layer
        raise UserError(
            f"has no tensor {tried[0][0]}" + (f" of layer {match[1]}" if match else ""),
            where=str(self.folder),
            hint="its architecture is another one than architecture.json (or hf_model_id) says",
        )


class _Placing(LoadPlanner):
    """Puts what is read into the tensors of one call."""

    def __init__(self, targets: Mapping[tuple[str, torch.Size], Tensor]) -> None:
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index: MetadataIndex = read_item.dest_index
        assert index.offset is not None
        part = self.targets[(index.fqn, index.offset)]
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError
