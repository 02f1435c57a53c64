"""Cross-checks of a composed config: each wrong one gives one problem, at the key to change, with what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nemotron_launch.config.checks import check, data_parallel_size, processes

BASE: dict[str, Any] = {
    "dpo": {
        "max_num_steps": 100,
        "val_period": 50,
        "val_at_end": False,
        "val_global_batch_size": 8,
        "val_micro_batch_size": 1,
        "preference_loss_weight": 1,
        "sft_loss_weight": 0,
        "val_generation": {"num_prompts": 0, "max_new_tokens": 128},
    },
    "policy": {
        "model_name": "meta-llama/Llama-3.2-1B-Instruct",
        "architecture": None,
        "tokenizer": {
            "name": "meta-llama/Llama-3.2-1B-Instruct",
            "chat_template": "default",
            "chat_template_kwargs": None,
        },
        "train_global_batch_size": 32,
        "train_micro_batch_size": 1,
        "max_total_sequence_length": 1024,
        "make_sequence_length_divisible_by": 1,
        "precision": "bfloat16",
        "device": "auto",
        "megatron_cfg": {
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "sequence_parallel": True,
            "pipeline_dtype": "bfloat16",
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "activation_checkpointing": False,
            "recompute_granularity": "full",
            "recompute_modules": None,
            "optimizer": {"lr": 1e-6, "min_lr": 0.0, "bf16": None},
            "scheduler": {
                "lr_decay_style": "constant",
                "lr_decay_iters": None,
                "lr_warmup_iters": 10,
                "lr_warmup_init": 0.0,
                "lr_wsd_decay_iters": None,
                "start_weight_decay": 0.1,
                "end_weight_decay": 0.1,
                "weight_decay_incr_style": "constant",
            },
        },
    },
    "data": {
        "train": {"data_path": "train.jsonl"},
        "validation": {"data_path": "validation.jsonl"},
        "default": {"data_path": None, "dataset_name": None},
        "val_data_paths": {},
        "max_input_seq_length": 1024,
    },
    "checkpointing": {
        "enabled": True,
        "checkpoint_dir": "out/checkpoints",
        "metric_name": "val:validation-default_loss",
        "checkpoint_must_save_by": None,
        "pretrained_checkpoint": None,
        "ft_save_period": None,
        "ft_keep_latest_k": None,
    },
    "cluster": {"num_nodes": 1, "gpus_per_node": 8, "procs_per_node": None},
}
INLINE = {
    "num_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "head_dim": None,
    "max_position_embeddings": 2048,
}
MEGATRON = "policy.megatron_cfg"
SCHEDULE = f"{MEGATRON}.scheduler"
INLINE_MODEL = {"policy.model_name": None, "policy.architecture": INLINE}


def config(changes: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, Any]:
    data = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            section = section[parent]
        section[last] = copy.deepcopy(value)
    return data


def test_right_config_has_no_problem() -> None:
    assert check("rl/nemo_rl/dpo", BASE) == []


def test_right_inline_architecture_has_no_problem() -> None:
    assert check("rl/nemo_rl/dpo", config(INLINE_MODEL)) == []


def test_sft_reads_its_own_loop() -> None:
    sft = config({})
    sft["sft"] = {key: sft["dpo"][key] for key in sft["dpo"] if not key.endswith("_weight")}
    del sft["dpo"]
    assert check("sft/megatron", sft) == []
    sft["sft"]["val_global_batch_size"] = 12
    (problem,) = check("sft/megatron", sft)
    assert problem.key == "sft.val_global_batch_size"
    assert "12 conversations" in problem.message


def test_step_without_a_training_loop_has_no_problem() -> None:
    assert check("data_prep/rl_prep", {}) == []


# key of the problem, words of its message, words of its hint, what is changed in a right config
WRONG: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "batches cut by tokens": (
        "policy.dynamic_batching.enabled",
        "not cut by token counts",
        "train_micro_batch_size",
        {"policy.dynamic_batching": {"enabled": True}},
    ),
    "validation answers that nothing prints": (
        "logger.num_val_samples_to_print",
        "prints no answers",
        "set it to 0",
        {"logger": {"num_val_samples_to_print": 3}},
    ),
    "no loss": ("dpo.preference_loss_weight", "nothing to learn", "=1", {"dpo.preference_loss_weight": 0}),
    "no model": ("policy.model_name", "no model", "hub id", {"policy.model_name": None}),
    "two models": ("policy.architecture", "two models", "null", {"policy.architecture": INLINE}),
    "no tokenizer": (
        "policy.tokenizer.name", "no tokenizer", "bytes", {**INLINE_MODEL, "policy.tokenizer.name": None},
    ),
    "arguments without a template": (
        "policy.tokenizer.chat_template_kwargs", "no chat template", "chat_template=default",
        {"policy.tokenizer.chat_template": None, "policy.tokenizer.chat_template_kwargs": {"enable_thinking": False}},
    ),
    "architecture without its width": (
        "policy.architecture.hidden_size", "not set", "needs",
        {"policy.model_name": None, "policy.architecture": {k: v for k, v in INLINE.items() if k != "hidden_size"}},
    ),
    "key/value heads that do not divide the heads": (
        "policy.architecture.num_key_value_heads", "3 key/value heads do not divide 8", "divisor of 8",
        {"policy.model_name": None, "policy.architecture": {**INLINE, "num_key_value_heads": 3}},
    ),
    "heads that do not divide the width": (
        "policy.architecture.num_attention_heads", "12 heads do not divide the hidden size 256", "head_dim",
        {"policy.model_name": None, "policy.architecture": {**INLINE, "num_attention_heads": 12}},
    ),
    "odd head width": (
        "policy.architecture.head_dim", "33 is odd", "even",
        {"policy.model_name": None, "policy.architecture": {**INLINE, "head_dim": 33}},
    ),
    "fewer key/value heads than tensor ranks": (
        "policy.architecture.num_key_value_heads", "4 is not a multiple", "tensor_model_parallel_size",
        {
            **INLINE_MODEL,
            f"{MEGATRON}.tensor_model_parallel_size": 8,
            "policy.make_sequence_length_divisible_by": 8,
        },
    ),
    "layers that do not share out": (
        f"{MEGATRON}.pipeline_model_parallel_size", "6 layers, do not share out evenly over 4", "change",
        {
            "policy.model_name": None,
            "policy.architecture": {**INLINE, "num_layers": 6},
            f"{MEGATRON}.pipeline_model_parallel_size": 4,
        },
    ),
    "layers that do not share out beside a fixed stage": (
        f"{MEGATRON}.pipeline_model_parallel_size", "1 of them in the first stage", "num_layers_in_first",
        {
            **INLINE_MODEL,
            f"{MEGATRON}.pipeline_model_parallel_size": 4,
            f"{MEGATRON}.num_layers_in_first_pipeline_stage": 1,
        },
    ),
    "a first stage without a pipeline": (
        f"{MEGATRON}.num_layers_in_first_pipeline_stage", "one pipeline stage", "null",
        {f"{MEGATRON}.num_layers_in_first_pipeline_stage": 1},
    ),
    "no processes": (
        "cluster.procs_per_node", "no processes", "procs_per_node=1", {"cluster.gpus_per_node": 0},
    ),
    "tensor x pipeline that does not divide": (
        f"{MEGATRON}.tensor_model_parallel_size",
        "tensor 3 x pipeline 2 = 6 does not divide the 8 processes (1 node x 8)", "a multiple of 6",
        {
            f"{MEGATRON}.tensor_model_parallel_size": 3,
            f"{MEGATRON}.pipeline_model_parallel_size": 2,
            "policy.make_sequence_length_divisible_by": 3,
        },
    ),
    "more model-parallel ranks than processes": (
        f"{MEGATRON}.tensor_model_parallel_size", "does not divide the 8", "lower",
        {f"{MEGATRON}.pipeline_model_parallel_size": 16},
    ),
    "padding that sequence parallel cannot split": (
        "policy.make_sequence_length_divisible_by", "1 is not a multiple", "divisible_by=2",
        {f"{MEGATRON}.tensor_model_parallel_size": 2},
    ),
    "training batch that does not divide": (
        "policy.train_global_batch_size", "36 pairs do not divide into micro-batches of 2 on 8", "to 32 or 48",
        {"policy.train_global_batch_size": 36, "policy.train_micro_batch_size": 2},
    ),
    "training batch smaller than one turn": (
        "policy.train_global_batch_size", "4 pairs", "to 8,", {"policy.train_global_batch_size": 4},
    ),
    "validation batch that does not divide": (
        "dpo.val_global_batch_size", "12 pairs", "to 8 or 16", {"dpo.val_global_batch_size": 12},
    ),
    "input longer than the sequence": (
        "data.max_input_seq_length", "2048 is more than", "lower it", {"data.max_input_seq_length": 2048},
    ),
    "positions the model is not meant for": (
        "policy.architecture.max_position_embeddings", "512 is less than", "raise it",
        {"policy.model_name": None, "policy.architecture": {**INLINE, "max_position_embeddings": 512}},
    ),
    "generation longer than the sequence": (
        "dpo.val_generation.max_new_tokens", "no room for a prompt", "lower it",
        {"dpo.val_generation": {"num_prompts": 4, "max_new_tokens": 1024}},
    ),
    "pipeline type": (
        f"{MEGATRON}.pipeline_dtype", "float32 is not policy.precision=bfloat16", "remove",
        {f"{MEGATRON}.pipeline_dtype": "float32"},
    ),
    "bf16 against precision": (
        f"{MEGATRON}.optimizer.bf16", "true contradicts policy.precision=float32", "remove",
        {"policy.precision": "float32", f"{MEGATRON}.pipeline_dtype": "float32", f"{MEGATRON}.optimizer.bf16": True},
    ),
    "cuda without GPUs": (
        "policy.device", "gpus_per_node is 0", "auto",
        {"policy.device": "cuda", "cluster.gpus_per_node": 0, "cluster.procs_per_node": 8},
    ),
    "bfloat16 on CPU": ("policy.precision", "bfloat16 needs a GPU", "float32", {"policy.device": "cpu"}),
    "recompute modules that nothing reads": (
        f"{MEGATRON}.recompute_modules", "only when", "selective", {f"{MEGATRON}.recompute_modules": ["core_attn"]},
    ),
    "warm-up longer than the run": (
        f"{SCHEDULE}.lr_warmup_iters", "101 steps does not end within dpo.max_num_steps=100", "at most 100",
        {f"{SCHEDULE}.lr_warmup_iters": 101},
    ),
    "warm-up that leaves no decay": (
        f"{SCHEDULE}.lr_warmup_iters", "leaves none of dpo.max_num_steps=100", "constant",
        {f"{SCHEDULE}.lr_warmup_iters": 100, f"{SCHEDULE}.lr_decay_style": "cosine"},
    ),
    "warm-up beyond the decay's end": (
        f"{SCHEDULE}.lr_warmup_iters", "lr_decay_iters=20", "lower",
        {f"{SCHEDULE}.lr_warmup_iters": 30, f"{SCHEDULE}.lr_decay_iters": 20, f"{SCHEDULE}.lr_decay_style": "linear"},
    ),
    "lowest rate above the highest": (
        f"{MEGATRON}.optimizer.min_lr", "5e-06 is more than", "lower", {f"{MEGATRON}.optimizer.min_lr": 5e-6},
    ),
    "first rate above the highest": (
        f"{SCHEDULE}.lr_warmup_init", "is more than", "lower", {f"{SCHEDULE}.lr_warmup_init": 1e-5},
    ),
    "a decay of WSD longer than the run": (
        f"{SCHEDULE}.lr_wsd_decay_iters", "101 steps", "null",
        {f"{SCHEDULE}.lr_decay_style": "WSD", f"{SCHEDULE}.lr_wsd_decay_iters": 101},
    ),
    "constant weight decay that changes": (
        f"{SCHEDULE}.weight_decay_incr_style", "from 0.1 to 0.2", "linear", {f"{SCHEDULE}.end_weight_decay": 0.2},
    ),
    "falling weight decay": (
        f"{SCHEDULE}.end_weight_decay", "can only grow", "at least start",
        {f"{SCHEDULE}.end_weight_decay": 0.05, f"{SCHEDULE}.weight_decay_incr_style": "linear"},
    ),
    "no training data": ("data.train.data_path", "no data", "file", {"data.train": {}}),
    "no validation data in its section": ("data.validation.data_path", "no data", "file", {"data.validation": {}}),
    "a second validation set called default": (
        "data.val_data_paths.default", "belongs to data.validation", "another name",
        {"data.val_data_paths": {"default": "other.jsonl"}},
    ),
    "generation without held-out data": (
        "dpo.val_generation.num_prompts", "no validation data", "num_prompts=0",
        {"data.validation": None, "dpo.val_generation.num_prompts": 4, "checkpointing.metric_name": None},
    ),
    "time limit in hours": (
        "checkpointing.checkpoint_must_save_by", "'03:45:00' is not a time", "quotes",
        {"checkpointing.checkpoint_must_save_by": "03:45:00"},
    ),
    "recovery checkpoints without a limit": (
        "checkpointing.ft_save_period", "never be pruned", "ft_keep_latest_k", {"checkpointing.ft_save_period": 5},
    ),
    "starting from one's own checkpoints": (
        "checkpointing.pretrained_checkpoint.path", "own", "another output_dir",
        {"checkpointing.pretrained_checkpoint": {"path": "out/checkpoints/step_50"}},
    ),
    "metric without its source": (
        "checkpointing.metric_name", "'val_loss' does not say", "val:validation-default_loss",
        {"checkpointing.metric_name": "val_loss"},
    ),
    "validation metric without data": (
        "checkpointing.metric_name", "needs validation data", "null", {"data.validation": None},
    ),
    "validation metric without validations": (
        "checkpointing.metric_name", "dpo.val_period is 0", "null", {"dpo.val_period": 0},
    ),
    "metric of a set that is not there": (
        "checkpointing.metric_name", "names no validation set", "write val:validation-default_loss",
        {"checkpointing.metric_name": "val:validation-held_out_loss"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("key", "message", "hint", "changes"), WRONG.values(), ids=WRONG.keys())
def test_problem_is_named_once_with_its_remedy(key: str, message: str, hint: str, changes: dict[str, Any]) -> None:
    (problem,) = check("rl/nemo_rl/dpo", config(changes))
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint


RIGHT: dict[str, dict[str, Any]] = {
    "sequence parallel is without effect on one tensor rank": {f"{MEGATRON}.sequence_parallel": True},
    "without sequence parallel no padding is needed": {
        f"{MEGATRON}.tensor_model_parallel_size": 2,
        f"{MEGATRON}.sequence_parallel": False,
    },
    "stages share out beside fixed ends": {
        **INLINE_MODEL,
        f"{MEGATRON}.pipeline_model_parallel_size": 4,
        f"{MEGATRON}.num_layers_in_first_pipeline_stage": 1,
        f"{MEGATRON}.num_layers_in_last_pipeline_stage": 1,
    },
    "two stages with both ends fixed": {
        **INLINE_MODEL,
        f"{MEGATRON}.pipeline_model_parallel_size": 2,
        f"{MEGATRON}.num_layers_in_first_pipeline_stage": 5,
        f"{MEGATRON}.num_layers_in_last_pipeline_stage": 3,
    },
    "a public dataset needs no path": {"data.train": {"dataset_name": "HelpSteer3"}},
    "the path may be in data.default": {
        "data.train": {},
        "data.validation": {"split": "test"},
        "data.default.data_path": "org/pairs",
    },
    "float32 on CPU": {
        "policy.device": "cpu",
        "policy.precision": "float32",
        f"{MEGATRON}.pipeline_dtype": "float32",
        "cluster.gpus_per_node": 0,
        "cluster.procs_per_node": 8,
    },
    "WSD takes a tenth of the steps unless told": {f"{SCHEDULE}.lr_decay_style": "WSD"},
    "a decay that goes on after the run": {
        f"{SCHEDULE}.lr_decay_style": "linear",
        f"{SCHEDULE}.lr_decay_iters": 1_000_000_000,
    },
    "a constant rate may warm up until the last step": {f"{SCHEDULE}.lr_warmup_iters": 100},
    "validation at the end is enough for a metric": {"dpo.val_period": 0, "dpo.val_at_end": True},
    "the metric of a named set": {
        "data.val_data_paths": {"held_out": "other.jsonl"},
        "checkpointing.metric_name": "val:validation-held_out_loss",
    },
    "a metric of the training": {"data.validation": None, "checkpointing.metric_name": "train:loss"},
    "no checkpoints, no metric to find": {"checkpointing.enabled": False, "data.validation": None},
    "days of time": {"checkpointing.checkpoint_must_save_by": "00:03:45:00"},
    "another run's checkpoints": {"checkpointing.pretrained_checkpoint": {"path": "out/checkpoints-of-sft/step_5"}},
    "a warm start that is not given": {"checkpointing.pretrained_checkpoint": {"path": None}},
}


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT.keys())
def test_right_config_is_not_refused(changes: dict[str, Any]) -> None:
    assert check("rl/nemo_rl/dpo", config(changes)) == []


def test_processes_of_a_node_are_its_gpus_unless_set() -> None:
    assert processes(config({"cluster.num_nodes": 2})) == 16
    assert processes(config({"cluster.num_nodes": 2, "cluster.procs_per_node": 3})) == 6


def test_data_parallel_size_is_what_the_model_leaves() -> None:
    split = {f"{MEGATRON}.tensor_model_parallel_size": 2, f"{MEGATRON}.pipeline_model_parallel_size": 2}
    assert data_parallel_size(config(split)) == 2  # 8 processes / (2 x 2)
    assert data_parallel_size(config({**split, "cluster.gpus_per_node": 6})) is None
