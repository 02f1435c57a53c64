"""Weights between Hugging Face folders (Llama, Qwen2, Qwen3) and a policy, one tensor at a time.

Legend: H hidden size, h query heads, g key-value heads, d head dimension.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.architecture import Architecture, hf_architecture, hf_config

Read = Callable[[str], Tensor]
INDEX = "model.safetensors.index.json"
VOCABULARIES = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, a: Architecture) -> Tensor:
    """q [h·d, …], k and v [g·d, …] → [(h + 2g)·d, …], interleaved per group as [q … q k v], as megatron-core wants."""
    g, d, rest = a.num_key_value_heads, a.head_dim, q.shape[1:]
    per_group = a.num_attention_heads // g * d
    parts = [q.view(g, per_group, *rest), k.view(g, d, *rest), v.view(g, d, *rest)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def split_qkv(qkv: Tensor, a: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """The converse of fuse_qkv."""
    g, d, rest = a.num_key_value_heads, a.head_dim, qkv.shape[1:]
    per_group = a.num_attention_heads // g * d
    grouped = qkv.view(g, per_group + 2 * d, *rest)
    q, k, v = grouped.split([per_group, d, d], 1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def from_hf(name: str, layer_offset: int, a: Architecture, read: Read) -> Tensor:
    """The whole (unsharded) value of a policy parameter, read from Hugging Face tensors.

    name: as `named_parameters` of this stage gives it; layer_offset: layers on earlier pipeline stages.
    """
    if name == "embedding.word_embeddings.weight":
        return read("model.embed_tokens.weight")
    if name == "output_layer.weight":
        return read("model.embed_tokens.weight" if a.tie_word_embeddings else "lm_head.weight")
    if name == "decoder.final_layernorm.weight":
        return read("model.norm.weight")
    match = _LAYER.fullmatch(name)
    assert match, f"no Hugging Face counterpart for {name}"
    prefix, rest = f"model.layers.{int(match[1]) + layer_offset}.", match[2]
    if rest in _SAME:
        return read(prefix + _SAME[rest])
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([read(prefix + "mlp.gate_proj.weight"), read(prefix + "mlp.up_proj.weight")])
    kind = rest.removeprefix("self_attention.linear_qkv.")
    q, k, v = (read(f"{prefix}self_attn.{x}_proj.{kind}") for x in "qkv")
    return fuse_qkv(q, k, v, a)


def to_hf(name: str, value: Tensor, a: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that a whole policy parameter holds; name with global layer numbers."""
    if name == "embedding.word_embeddings.weight":
        yield "model.embed_tokens.weight", value[: a.vocab_size]
        return
    if name == "output_layer.weight":
        if not a.tie_word_embeddings:
            yield "lm_head.weight", value[: a.vocab_size]
        return
    if name == "decoder.final_layernorm.weight":
        yield "model.norm.weight", value
        return
    match = _LAYER.fullmatch(name)
    assert match, f"no Hugging Face counterpart for {name}"
    prefix, rest = f"model.layers.{match[1]}.", match[2]
    if rest in _SAME:
        yield prefix + _SAME[rest], value
    elif rest == "mlp.linear_fc1.weight":
        gate, up = value.chunk(2)
        yield prefix + "mlp.gate_proj.weight", gate
        yield prefix + "mlp.up_proj.weight", up
    else:
        kind = rest.removeprefix("self_attention.linear_qkv.")
        for x, part in zip("qkv", split_qkv(value, a), strict=True):
            yield f"{prefix}self_attn.{x}_proj.{kind}", part


def hf_shape(name: str, a: Architecture) -> tuple[int, ...]:
    """The shape that a Hugging Face tensor of this name has."""
    query, key_value = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    module, kind = name.split(".")[-2:]
    rows, columns = {
        "embed_tokens": (a.vocab_size, a.hidden_size),
        "lm_head": (a.vocab_size, a.hidden_size),
        "q_proj": (query, a.hidden_size),
        "k_proj": (key_value, a.hidden_size),
        "v_proj": (key_value, a.hidden_size),
        "o_proj": (a.hidden_size, query),
        "gate_proj": (a.intermediate_size, a.hidden_size),
        "up_proj": (a.intermediate_size, a.hidden_size),
        "down_proj": (a.hidden_size, a.intermediate_size),
        "q_norm": (a.head_dim, None),
        "k_norm": (a.head_dim, None),
    }.get(module, (a.hidden_size, None))
    return (rows,) if kind == "bias" or columns is None else (rows, columns)


def shard(value: Tensor, parameter: torch.nn.Parameter, name: str, *, size: int, rank: int) -> Tensor:
    """This tensor-parallel rank's part of a whole parameter, vocabularies padded with zeros first."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):  # gate and up are sharded each by itself
        return torch.cat([half.chunk(size, dim)[rank] for half in value.chunk(2)])
    if name in VOCABULARIES:
        padding = parameter.shape[0] * size - len(value)
        value = torch.cat([value, value.new_zeros(padding, value.shape[1])]) if padding else value
    return value.chunk(size, dim)[rank]


def unshard(parts: Sequence[Tensor], parameter: torch.nn.Parameter, name: str) -> Tensor:
    """The converse of shard, from the parts of all ranks in order; vocabularies keep their padding."""
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([torch.cat([half[i] for half in halves], dim) for i in range(2)])
    return torch.cat(list(parts), dim)


def global_name(name: str, layer_offset: int) -> str:
    """A parameter's name in the whole model; layer_offset: layers on earlier pipeline stages."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{int(match[1]) + layer_offset}.{match[2]}" if match else name


@torch.no_grad()
def load_weights(model: torch.nn.Module, a: Architecture, read: Read, *, size: int, rank: int) -> None:
    """Fill a stage of the policy from Hugging Face tensors, a parameter at a time, so that memory stays low.

    model: the GPTModel of this rank; size and rank: of tensor parallelism.
    """
    layers: Any = cast(Any, model).decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        value = shard(from_hf(name, offset, a, read), parameter, name, size=size, rank=rank)
        assert value.shape == parameter.shape, f"{name}: {tuple(value.shape)} for {tuple(parameter.shape)}"
        parameter.copy_(value)


def export_weights(model: torch.nn.Module, a: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of a whole policy (tensor and pipeline size 1), in model order."""
    for name, parameter in model.named_parameters():
        yield from to_hf(name, parameter.detach(), a)


def read_config(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder; UserError where it has none that we convert."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError("is not a Hugging Face model folder: it has no config.json", where=str(folder))
    return hf_architecture(_read_json(path), where=str(path))


def open_weights(folder: Path, a: Architecture) -> Read:
    """A reader of the folder's safetensors, in one file or several; tensors are mapped, not loaded, until asked for.

    Raises UserError, here or when it reads, where a tensor is missing, unreadable or not of the architecture's shape.
    """
    from safetensors import SafetensorError, safe_open

    open_files: dict[str, Any] = {}

    def opened(file_name: str) -> Any:
        if file_name not in open_files:
            try:
                open_files[file_name] = safe_open(folder / file_name, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot be read as safetensors: {error}", where=str(folder / file_name)) from error
        return open_files[file_name]

    if (folder / INDEX).exists():
        places = dict(_read_json(folder / INDEX).get("weight_map") or {})
    elif (folder / "model.safetensors").exists():
        places = dict.fromkeys(opened("model.safetensors").keys(), "model.safetensors")
    else:
        raise UserError(
            "has no model.safetensors",
            where=str(folder),
            hint="save it with transformers' save_pretrained(…, safe_serialization=True)",
        )

    def read(name: str) -> Tensor:
        if name not in places:
            raise UserError(f"has no tensor {name}", where=str(folder))
        value: Tensor = opened(places[name]).get_tensor(name)
        if value.shape != hf_shape(name, a):
            raise UserError(
                f"{name} has shape {list(value.shape)}, config.json makes it {list(hf_shape(name, a))}",
                where=str(folder / places[name]),
            )
        return value

    return read


def save_folder(
    model: torch.nn.Module,
    a: Architecture,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write a whole policy as a Hugging Face folder: safetensors in files of at most max_file_bytes, then config.json.

    Holds one file's tensors beside the model. Raises UserError where the folder holds a model already.
    """
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        raise UserError("holds a model already", where=str(folder), hint="name a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("model*.safetensors*"):  # of an export that broke off
        left_over.unlink()
    dtype = dtype or next(model.parameters()).dtype
    numbers, total = _files(model, a, dtype, max_file_bytes)
    count = max(numbers.values())
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for number, part in itertools.groupby(export_weights(model, a), lambda named: numbers[named[0]]):
        tensors = {name: value.to(device="cpu", dtype=dtype).contiguous() for name, value in part}
        save_file(tensors, folder / names[number - 1], metadata={"format": "pt"})
    if count > 1:
        places = {name: names[number - 1] for name, number in numbers.items()}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(folder / "config.json", hf_config(a) | {"torch_dtype": str(dtype).removeprefix("torch.")})


def _files(model: torch.nn.Module, a: Architecture, dtype: torch.dtype, most: int) -> tuple[dict[str, int], int]:
    """Which file, from 1, each tensor goes into, in model order; and the bytes of all."""
    numbers: dict[str, int] = {}
    number, used, total = 1, 0, 0
    for parameter_name, parameter in model.named_parameters():
        for name, value in to_hf(parameter_name, torch.empty_like(parameter, dtype=dtype, device="meta"), a):
            if used and used + value.nbytes > most:
                number, used = number + 1, 0
            numbers[name] = number
            used += value.nbytes
            total += value.nbytes
    return numbers, total


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError("holds no mapping", where=str(path))
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
