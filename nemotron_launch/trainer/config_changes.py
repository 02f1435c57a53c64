"""Which keys of a config decide the result of a training run, so that a resumed run cannot change them unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from nemotron_launch.errors import UserError

# What may differ between two attempts of a run: where it runs, reads and writes, how long, how the work is cut up, what
# is measured. `*` stands for anything, dots too. All else decides the result. What lies at a path decides it too, but
# not the path: weights, tokenizer, rows and the policy's shape are compared by content.
FREE_TO_CHANGE = (
    "defaults*",
    "output_dir",
    "run*",
    "logger*",
    "cluster*",
    "checkpointing*",
    "dpo.max_num_*",
    "sft.max_num_*",
    "dpo.val_*",
    "sft.val_*",
    "grpo.max_num_*",
    "grpo.val_*",
    "grpo.num_val_generations_per_prompt",
    "grpo.max_val_samples",
    "grpo.reference_kl_period",
    "*.reference",  # stored, resident or offloaded: the same numbers
    "data.train.data_path",
    "data.default.data_path",
    "data.validation*",
    "data.val_data_paths*",
    "data.manifest_path",
    "data.num_workers",
    "data.cache_dir",
    "data.max_bad_rows",
    "policy.model_name",
    "policy.tokenizer.name",
    "policy.train_micro_batch_size",
    "policy.logprob_batch_size",
    "policy.logprob_chunk_size",
    "policy.shared_prompt",
    "policy.device",
    "policy.offload_optimizer_for_logprob",
    "policy.make_sequence_length_divisible_by",  # follows the tensor-parallel size
    "policy.generation_batch_size",
    "policy.generation.server",
    "policy.generation.val_*",
    "policy.generation.colocated*",
    "policy.generation.port_*",
    "policy.generation.vllm_*",
    "policy.generation.mcore_generation_config*",
    "env.max_failed_rollouts",
    "env.*.num_workers",
    "env.*.server",
    "policy.dtensor_cfg*",
    "policy.automodel_cfg*",
    "policy.dynamic_batching*",
    "policy.sequence_packing*",
    "policy.megatron_cfg.enabled",
    "policy.megatron_cfg.env_vars*",
    "policy.megatron_cfg.*_parallel_size",
    "policy.megatron_cfg.sequence_parallel",
    "policy.megatron_cfg.num_layers_in_*_pipeline_stage",
    "policy.megatron_cfg.activation_checkpointing",
    "policy.megatron_cfg.recompute_*",
    "policy.megatron_cfg.empty_unused_memory_level",
    "policy.megatron_cfg.*_fusion",
    "policy.megatron_cfg.attention_backend",
    "policy.megatron_cfg.use_gloo_process_groups",
    "policy.megatron_cfg.force_*",
    "policy.megatron_cfg.checkpoint*",
    "policy.megatron_cfg.optimizer.use_distributed_optimizer",
    "policy.megatron_cfg.optimizer.optimizer_*offload*",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_*",
    "policy.megatron_cfg.distributed_data_parallel_config.data_parallel_sharding_strategy",
)


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every key that decides the result and differs, sorted; a missing key is as good as null."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and _decides(key)
    ]


def refuse_changes(changes: Iterable[tuple[str, Any, Any]], *, checkpoint: str, allow: bool) -> list[str]:
    """UserError that names what differs from `checkpoint`; where that is allowed, the lines that say it."""
    lines = [f"{key}: {_short(was)} there, {_short(now)} here" for key, was, now in changes]
    if lines and not allow:
        advice = "take them back, give another output_dir, or set checkpointing.allow_config_change=true"
        message = f"{checkpoint} was trained with another config, so resuming from it would mix two runs"
        raise UserError(message, hint="\n".join([*lines, advice]))
    return lines


def _decides(key: str) -> bool:
    return not any(fnmatchcase(key, pattern) for pattern in FREE_TO_CHANGE)


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a list is one value, an empty mapping none."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
