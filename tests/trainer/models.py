"""Small Hugging Face models, the policies converted from them, and optimizer settings, for the trainer's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.architecture import hf_architecture
from nemotron_launch.trainer.batch import Batch, Group, collate
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.policy import Policy

VOCAB = 259  # odd, as the byte-level tokenizer's: tensor parallelism must pad it
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def hf_model(family: str, *, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of family llama, qwen2 or qwen3, every parameter (biases and norms too) random."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    extra = {"head_dim": 32} if family == "qwen3" else {}
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **extra, **changes, "tie_word_embeddings": tied})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + 0.08 * torch.randn(parameter.shape, generator=generator))
    return model


def policy_of(model: Any, layout: Layout, numerics: Numerics | None = None) -> Policy:
    """The policy with a transformers model's weights."""
    architecture = hf_architecture(model.config.to_dict(), where="test")
    policy = Policy(architecture, layout, numerics or Numerics())
    weights = model.state_dict()
    hf.load_weights(policy.gpt, architecture, weights.__getitem__, size=layout.tensor, rank=layout.tensor_rank)
    return policy


def megatron_section(*, lr: float = 1e-3, clip: float = 1.0, weight_decay: float = 0.01) -> dict[str, Any]:
    """`policy.megatron_cfg` as far as the optimizer reads it; constant learning rate without warm-up."""
    return {
        "optimizer": {
            "lr": lr,
            "min_lr": 0.0,
            "weight_decay": weight_decay,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_eps": 1e-8,
            "clip_grad": clip,
            "use_distributed_optimizer": True,
        },
        "scheduler": {
            "lr_decay_style": "constant",
            "lr_decay_iters": None,
            "lr_warmup_iters": 0,
            "lr_warmup_init": 0.0,
            "lr_wsd_decay_style": "exponential",
            "lr_wsd_decay_iters": None,
            "start_weight_decay": weight_decay,
            "end_weight_decay": weight_decay,
            "weight_decay_incr_style": "constant",
        },
        "distributed_data_parallel_config": {"grad_reduce_in_fp32": False, "overlap_grad_reduce": True},
    }


def pairs(count: int, *, seed: int = 0, equal_prompts: bool = False) -> list[Group]:
    """Groups of two random answers of 1 to 12 tokens behind prompts of 2 to 9."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        prompt = rng.integers(2, VOCAB, 6 if equal_prompts else int(rng.integers(2, 10)))
        answers = [rng.integers(2, VOCAB, int(rng.integers(1, 13))) for _ in range(2)]
        groups.append(Group(len(prompt), tuple(np.concatenate([prompt, answer]) for answer in answers)))
    return groups


def batch_of(groups: list[Group], **options: Any) -> Batch:
    return collate(groups, pad_id=0, device=torch.device("cpu"), **options)
