"""Weights between Hugging Face folders (Llama, Qwen2, Qwen3) and a policy, one tensor at a time.

Legend: H hidden size, h query heads, g key-value heads, d head dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.architecture import Architecture, hf_architecture, hf_config

Read = Callable[[str], Tensor]
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
    return fuse_qkv(*(read(f"{prefix}self_attn.{x}_proj.{kind}") for x in "qkv"), a)


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


def shard(value: Tensor, parameter: torch.nn.Parameter, name: str, *, size: int, rank: int) -> Tensor:
    """This tensor-parallel rank's part of a whole parameter, vocabularies padded with zeros first."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):  # gate and up are sharded each by itself
        return torch.cat([half.chunk(size, dim)[rank] for half in value.chunk(2)])
    missing = parameter.shape[dim] * size - value.shape[dim]
    if missing:
        value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value.chunk(size, dim)[rank]


@torch.no_grad()
def load_weights(model: torch.nn.Module, a: Architecture, read: Read, *, size: int, rank: int) -> None:
    """Fill a stage of the policy from Hugging Face tensors, a parameter at a time, so that memory stays low.

    model: the GPTModel of this rank. Raises UserError where shapes differ.
    """
    layers = model.decoder.layers  # type: ignore[union-attr]
    offset = layers[0].layer_number - 1 if len(layers) else 0  # type: ignore[index, arg-type]
    for name, parameter in model.named_parameters():
        value = shard(from_hf(name, offset, a, read), parameter, name, size=size, rank=rank)
        if value.shape != parameter.shape:
            raise UserError(f"{name} has shape {tuple(value.shape)}, the policy {tuple(parameter.shape)}")
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
    return hf_architecture(json.loads(path.read_text()), where=str(path))


def open_weights(folder: Path) -> Read:
    """A reader of the folder's safetensors, sharded or not; tensors are mapped, not loaded, until asked for."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", "pt") as file:
            places = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise UserError(
            "has no model.safetensors",
            where=str(folder),
            hint="save it with transformers' save_pretrained(…, safe_serialization=True)",
        )
    open_files: dict[str, object] = {}

    def read(name: str) -> Tensor:
        if name not in places:
            raise UserError(f"has no tensor {name}", where=str(folder))
        file_name = places[name]
        if file_name not in open_files:
            open_files[file_name] = safe_open(folder / file_name, "pt").__enter__()
        return open_files[file_name].get_tensor(name)  # type: ignore[attr-defined]

    return read


def save_folder(model: torch.nn.Module, a: Architecture, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a whole policy as a Hugging Face folder: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(a) | {"torch_dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: value.to(dtype or value.dtype).contiguous().cpu() for name, value in export_weights(model, a)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
