"""Weights between Hugging Face folders (Llama, Qwen2, Qwen3) and a policy, one tensor at a time.

Folders are read here and written by hf_folders.py.

Legend: H hidden size, h query heads, g key-value heads, d head dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.architecture import Architecture, hf_architecture
from nemotron_launch.trainer.checkpoints import is_complete, newest_complete

Read = Callable[[str], Tensor]
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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


def hf_names(a: Architecture) -> list[str]:
    """Every tensor of a Hugging Face folder, in the order of the computation."""
    kinds = ("weight", "bias") if a.qkv_bias else ("weight",)
    attention = [f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in kinds]
    attention += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if a.qk_norm else []
    layer = ["input_layernorm.weight", *attention, "self_attn.o_proj.weight", "post_attention_layernorm.weight"]
    layer += [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    layers = [f"model.layers.{i}.{name}" for i in range(a.num_layers) for name in layer]
    last = [] if a.tie_word_embeddings else ["lm_head.weight"]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", *last]


def parameter_names(a: Architecture) -> list[list[str]]:
    """Every parameter of a whole policy, in groups of which one at a time fits into memory: layers."""
    kinds = ("weight", "bias") if a.qkv_bias else ("weight",)
    attention = [f"self_attention.linear_qkv.{kind}" for kind in kinds]
    attention += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] if a.qk_norm else []
    layer = ["input_layernorm.weight", *attention, "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight"]
    layer += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    layers = [[f"decoder.layers.{i}.{name}" for name in layer] for i in range(a.num_layers)]
    last = [] if a.tie_word_embeddings else [["output_layer.weight"]]
    return [["embedding.word_embeddings.weight"], *layers, ["decoder.final_layernorm.weight"], *last]


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
        hint = None
        if (step := newest_complete(folder)) or is_complete(folder):
            found = step or folder
            hint = f"it is a Megatron checkpoint:  nemotron steps run convert/megatron_to_hf megatron_path={found}"
        raise UserError("is not a Hugging Face model folder: it has no config.json", where=str(folder), hint=hint)
    return hf_architecture(read_json(path), where=str(path))


class StoredWeights:
    """The tensors of a folder's safetensors, in one file or several, each read when it is asked for.

    Raises UserError, here or later, where a tensor is missing, unreadable or not of the architecture's shape.
    """

    def __init__(self, folder: Path, a: Architecture) -> None:
        self.folder, self.architecture = folder, a
        if (folder / INDEX).exists():
            self.places = dict(read_json(folder / INDEX).get("weight_map") or {})
        elif (folder / WHOLE).exists():
            with self._opened(WHOLE) as file:
                self.places = dict.fromkeys(file.keys(), WHOLE)
        else:
            raise UserError(
                "has no model.safetensors",
                where=str(folder),
                hint="save it with transformers' save_pretrained(…, safe_serialization=True)",
            )

    def __call__(self, name: str) -> Tensor:
        """The tensor, in the type in which it is stored."""
        with self._holding(name) as file:  # mapped anew each time: what was read would count as memory until closed
            value: Tensor = file.get_tensor(name)
        self.check_shape(name, tuple(value.shape))
        return value

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored; only the file's header is read."""
        with self._holding(name) as file:
            part = file.get_slice(name)
            self.check_shape(name, tuple(part.get_shape()))
            kind = part.get_dtype()
        if kind not in STORED_DTYPES:
            raise UserError(
                f"{name} is stored as {kind}, which is no plain floating-point type",
                where=str(self.folder / self.places[name]),
                hint=f"convert a model whose weights are not quantised ({', '.join(STORED_DTYPES)})",
            )
        return STORED_DTYPES[kind]

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = hf_shape(name, self.architecture)
        if shape != expected:
            raise UserError(
                f"{name} has shape {list(shape)}, config.json makes it {list(expected)}",
                where=str(self.folder / self.places[name]),
            )

    def _holding(self, name: str) -> Any:
        if name not in self.places:
            raise UserError(f"has no tensor {name}", where=str(self.folder))
        return self._opened(self.places[name])

    def _opened(self, file_name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file_name, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot be read as safetensors: {error}", where=str(self.folder / file_name)) from error


def open_weights(folder: Path, a: Architecture) -> StoredWeights:
    """A reader of the folder's tensors by their names."""
    return StoredWeights(folder, a)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where there is no file. UserError where it is something else."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError("holds no mapping", where=str(path))
    return values
