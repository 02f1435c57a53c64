"""GPTModel of megatron-core for an Architecture, with attention, norms and output layer that run on any device.

Legend: B rows, S tokens of a row, N tokens that a loss or a sampler asks for, v this rank's part of the vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.megatron import cpu
from nemotron_launch.trainer.megatron.attention import PLANS, PlannedAttention
from nemotron_launch.trainer.megatron.gradients import RMSNormalize, SwiGLU
from nemotron_launch.trainer.megatron.linear import linear
from nemotron_launch.trainer.megatron.parallel import Layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass(frozen=True)
class Numerics:
    """How the policy computes: dtype of weights and activations, and what is recomputed to save memory."""

    dtype: torch.dtype = torch.float32
    recompute_granularity: str | None = None
    recompute_modules: tuple[str, ...] = ()
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None


def transformer_config(architecture: Architecture, layout: Layout, numerics: Numerics) -> TransformerConfig:
    """megatron-core's description of the network; every fusion that needs Transformer Engine or Apex is off."""
    a = architecture
    recompute: dict[str, Any] = {}
    if numerics.recompute_granularity == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif numerics.recompute_granularity == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(numerics.recompute_modules)}
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_key_value_heads,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=a.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # "te" for any module that the layer's spec names: see Activation
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        init_method_std=a.initializer_range,
        # Alignment scores what the policy would generate; dropout would make both sides of every ratio noisy.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=numerics.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=numerics.num_layers_in_last_pipeline_stage,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # unused, but the other value refuses variable lengths
        params_dtype=numerics.dtype,
        pipeline_dtype=numerics.dtype,
        bf16=numerics.dtype == torch.bfloat16,
        # Losses are divided by the global batch before they reach the schedule, so gradients are summed as they are.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute,
    )


def padded_vocab(architecture: Architecture, tensor: int) -> int:
    """Rows of the embedding, a multiple of the tensor-parallel size."""
    return -(-architecture.vocab_size // tensor) * tensor


def build_model(architecture: Architecture, layout: Layout, numerics: Numerics, *, seed: int) -> GPTModel:
    """This rank's part of the policy, randomly initialised from `seed` (other weights at another pipeline size).

    Raises what megatron-core raises where sizes do not divide; the config checks come first.
    """
    config = transformer_config(architecture, layout, numerics)
    cpu.prepare()
    torch.manual_seed(seed)
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, architecture, layout),
        vocab_size=padded_vocab(architecture, layout.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=layout.first_stage,
        post_process=layout.last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="none",  # PlannedAttention rotates; it knows where each token stands
    )
    if layout.last_stage:
        # Same parameters and checkpoint keys, another forward: see TokenOutput.
        model.output_layer.__class__ = TokenOutput
    return model.to(device=layout.device, dtype=numerics.dtype)


def _layers(config: TransformerConfig, architecture: Architecture, layout: Layout) -> TransformerBlockSubmodules:
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm))
    modules = layer.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention = modules.self_attention.submodules
    attention.core_attention = PlannedAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    modules.mlp.submodules.activation_func = Activation
    layers = [layer] * get_num_layers_to_build(config)
    if layout.last_stage:
        layers[-1] = replace(layer, module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


class LastLayer(TransformerLayer):
    """The model's last layer: behind its attention it goes on with the tokens of `AttentionPlan.wanted_W` alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attention.core_attention.keeps_wanted_only = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        wanted_W = PLANS[attention_mask].wanted_W
        if wanted_W is None:
            return super().forward(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        attended_W1H, _ = self.self_attention(self.input_layernorm(hidden_states), attention_mask=attention_mask)
        residual_W1H = hidden_states.flatten(0, 1).index_select(0, wanted_W).unsqueeze(1)
        return self._forward_mlp(residual_W1H + attended_W1H), None


class Activation(MegatronModule):
    """The MLP's SwiGLU, under the name that megatron-core's spec has for it."""

    def forward(self, x: Tensor) -> Tensor:
        return SwiGLU.apply(x)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm behind megatron-core's constructor; its weight takes part in sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # where torch has no fused kernel for the gradient
            return RMSNormalize.apply(x, self.weight, self.eps)
        return super().forward(x)


class TokenOutput(ColumnParallelLinear):
    """The output layer, run on the tokens that are asked for and on no others.

    `wanted_N` holds their flat positions s·B + b for the next forward, None asks for all that come. The result is
    [N, 1, v].
    """

    wanted_N: Tensor | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        group = parallel_state.get_tensor_model_parallel_group()
        if self.sequence_parallel:
            # Its backward scatters the sum over ranks, so the product below needs no reduction of its own.
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=group)
        hidden_NH = hidden.flatten(0, 1)
        if self.wanted_N is not None:
            hidden_NH = hidden_NH.index_select(0, self.wanted_N)
        return linear(hidden_NH, self.weight if weight is None else weight).unsqueeze(1), None


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel."""
    inner = model
    while not isinstance(inner, GPTModel):
        inner = cast(torch.nn.Module, inner.module)
    return inner


def without_recompute(numerics: Numerics) -> Numerics:
    """The same numerics for a model that is never differentiated."""
    return replace(numerics, recompute_granularity=None, recompute_modules=())
