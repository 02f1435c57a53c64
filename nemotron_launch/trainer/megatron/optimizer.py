"""Gradient reduction, optimizer and learning-rate schedule of megatron-core for one policy."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from nemotron_launch.trainer.megatron import cpu
from nemotron_launch.trainer.megatron.parallel import Layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def distributed_optimizer_is_safe(layout: Layout) -> bool:
    """Whether Adam's state may be sharded over data parallelism.

    Without Transformer Engine or Apex a resumed distributed optimizer can silently start Adam's step at 0 again.
    """
    has_fused_adam = any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))
    return layout.device.type == "cuda" and has_fused_adam


def reduce_gradients(model: GPTModel, layout: Layout, section: Mapping[str, Any]) -> DistributedDataParallel:
    """The model with its gradient buffers; section is `policy.megatron_cfg`."""
    ddp = section["distributed_data_parallel_config"]
    on_gpu = layout.device.type == "cuda"
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            # The sum over a global batch loses too much in bf16.
            grad_reduce_in_fp32=ddp["grad_reduce_in_fp32"] or not on_gpu,
            overlap_grad_reduce=ddp["overlap_grad_reduce"] and on_gpu and layout.data > 1,
            use_distributed_optimizer=_distributed(section, layout),
            average_in_collective=False,
        ),
        model,
    )
    wrapped.broadcast_params()
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, layout: Layout, section: Mapping[str, Any], *, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with gradient clipping and its schedule; ticks are optimizer steps."""
    o = section["optimizer"]
    dtype = model.module.config.params_dtype
    distributed = _distributed(section, layout)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=o["lr"],
            min_lr=o["min_lr"],
            weight_decay=o["weight_decay"],
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            adam_beta1=o["adam_beta1"],
            adam_beta2=o["adam_beta2"],
            adam_eps=o["adam_eps"],
            clip_grad=o["clip_grad"],
            use_distributed_optimizer=distributed,
        ),
        [model],
        use_gloo_process_groups=layout.device.type == "cpu",
    )
    cpu.prepare()  # importing the optimizer's parts above brought in more modules
    _use_fused_adam(optimizer)
    model.module.config.finalize_model_grads_func = finalize_model_grads
    model.module.config.grad_scale_func = optimizer.scale_loss
    if model.ddp_config.overlap_grad_reduce:
        model.module.config.no_sync_func = model.no_sync
    return optimizer, build_scheduler(optimizer, section, total_steps=total_steps)


def build_scheduler(
    optimizer: MegatronOptimizer | torch.optim.Optimizer, section: Mapping[str, Any], *, total_steps: int
) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay that `policy.megatron_cfg` asks for; ticks are optimizer steps."""
    o, s = section["optimizer"], section["scheduler"]
    decay_steps = s["lr_decay_iters"] or total_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=min(s["lr_warmup_init"], o["lr"]),
        max_lr=o["lr"],
        min_lr=o["min_lr"],
        lr_warmup_steps=min(s["lr_warmup_iters"], decay_steps - 1),
        lr_decay_steps=decay_steps,
        lr_decay_style=s["lr_decay_style"],
        start_wd=s["start_weight_decay"],
        end_wd=s["end_weight_decay"],
        wd_incr_steps=decay_steps,
        wd_incr_style=s["weight_decay_incr_style"],
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=s["lr_wsd_decay_iters"] or max(decay_steps // 10, 1),
        lr_wsd_decay_style=s["lr_wsd_decay_style"],
    )


def _distributed(section: Mapping[str, Any], layout: Layout) -> bool:
    return bool(section["optimizer"]["use_distributed_optimizer"]) and distributed_optimizer_is_safe(layout)


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers that megatron-core's one wraps."""
    return [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """torch's single-pass AdamW, where megatron-core fell back to torch's: the loop version costs a tenth of a step."""
    for inner in torch_optimizers(optimizer):
        if type(inner) is torch.optim.AdamW:
            inner.defaults["fused"] = True
            for group in inner.param_groups:
                group["fused"] = True
                group["foreach"] = False
