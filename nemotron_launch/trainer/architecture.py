"""The shape of a policy: read from a Hugging Face folder or from `policy.architecture`, kept beside every checkpoint.

Imports no torch, so that the launcher may read a checkpoint's shape too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError

FILE_NAME = "architecture.json"
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What `config.json` may say where transformers has variants of these families.
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "partial_rotary_factor": (1.0,),
    # The others of transformers change their frequencies with the sequence's length.
    "rope_type": ("default", "linear", "llama3", "yarn"),
}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm, SwiGLU and rotary positions: the common shape of Llama, Qwen2 and Qwen3.

    `vocab_size` counts the rows that mean something; padding for tensor parallelism comes on top and is never stored.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02

    @property
    def family(self) -> str:
        """The Hugging Face model type whose code computes exactly this shape."""
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")


def read_architecture(folder: Path) -> Architecture | None:
    """The architecture stored in a checkpoint's policy folder, or None where another tool wrote the checkpoint."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        return Architecture(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"is not an architecture file: {error}", where=str(path)) from error


def inline_architecture(section: Mapping[str, Any], *, tokenizer_vocab_size: int) -> Architecture:
    """`policy.architecture` of a config; the vocabulary is the tokenizer's unless it says more."""
    values = dict(section)
    vocab_size = values.pop("vocab_size", None) or tokenizer_vocab_size
    if vocab_size < tokenizer_vocab_size:
        raise UserError(
            f"{vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer_vocab_size}",
            where="policy.architecture.vocab_size",
            hint="leave it null to take the tokenizer's",
        )
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    known = {field.name for field in dataclasses.fields(Architecture)}
    return Architecture(vocab_size=vocab_size, **{key: value for key, value in values.items() if key in known})


def hf_architecture(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The architecture that a Hugging Face `config.json` of type Llama, Qwen2 or Qwen3 describes.

    Raises UserError for another model type, for a variant whose maths differs (attention bias on the output
    projection, MLP bias, sliding windows, another activation, partly rotated heads), or where a size is missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"model type {kind!r} is not one that the trainer converts",
            where=where,
            hint=f"supported: {', '.join(FAMILIES)} (dense); others go through Megatron-Bridge in a GPU container",
        )
    if absent := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise UserError(f"has no {absent[0]}", where=where)
    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    old_type = rope.pop("type", None)
    rope_type = rope.get("rope_type") or old_type or "default"
    rotated = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    variant = {
        "hidden_act": config.get("hidden_act") or "silu",
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "attention_bias": kind != "qwen2" and bool(config.get("attention_bias")),
        "partial_rotary_factor": rotated,
        "rope_type": rope_type,
    }
    for key, value in variant.items():
        if value not in SUPPORTED[key]:
            raise UserError(f"{key}={value!r} is not supported", where=where)
    scaling = None if rope_type == "default" else {**rope, "rope_type": rope_type}
    heads = config["num_attention_heads"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        # What transformers takes where it is left out.
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // heads),
        rope_theta=float(theta),
        rope_scaling=scaling,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        initializer_range=config.get("initializer_range", 0.02),
    )


def hf_config(architecture: Architecture) -> dict[str, Any]:
    """The `config.json` values with which transformers builds the same model (the converse of `hf_architecture`)."""
    a = architecture
    config: dict[str, Any] = {
        "architectures": [FAMILIES[a.family]],
        "model_type": a.family,
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "intermediate_size": a.intermediate_size,
        "vocab_size": a.vocab_size,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "rope_parameters": {"rope_type": "default", **(a.rope_scaling or {}), "rope_theta": a.rope_theta},
        "tie_word_embeddings": a.tie_word_embeddings,
        "max_position_embeddings": a.max_position_embeddings,
        "initializer_range": a.initializer_range,
    }
    if a.rope_scaling:
        config["rope_scaling"] = dict(a.rope_scaling)
    return config


def differences(stored: Architecture, wanted: Architecture) -> list[str]:
    """The fields that decide tensor shapes or the maths and differ, as `field: stored there, wanted here`."""
    ignored = {"max_position_embeddings", "initializer_range"}
    pairs = zip(dataclasses.asdict(stored).items(), dataclasses.asdict(wanted).values(), strict=True)
    return [
        f"{name}: {old} in the checkpoint, {new} in the config"
        for (name, old), new in pairs
        if old != new and name not in ignored
    ]
