"""What no schema can say about a composed config: sizes that must divide each other, keys that need each other.

Pure functions on plain data, for the launcher and the trainer; a config comes here after its schema has accepted it.
What the steps share is in checks_policy.py, what makes rollouts in checks_grpo.py, conversion in checks_convert.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemotron_launch.config.checks_policy import (
    Problem,
    check_batch,
    check_checkpointing,
    check_lengths,
    check_manifest,
    check_metric,
    check_policy,
    data_parallel_size,
    model_parallel_size,
    processes,
)

__all__ = ["Problem", "check", "data_parallel_size", "model_parallel_size", "processes", "validation_names"]

# Public datasets that are downloaded by their name alone.
NAMED_DATASETS = ("HelpSteer3", "Tulu3Preference")
# The section of a step that holds its loop, and what its batches count.
LOOPS = {
    "rl/nemo_rl/dpo": ("dpo", "pairs"),
    "sft/megatron": ("sft", "conversations"),
    "rm/hf": ("rm", "pairs"),
}
ROLLOUTS = ("rl/nemo_rl/rlvr", "rl/nemo_rl/rlhf")


def check(step_id: str, data: dict[str, Any]) -> list[Problem]:
    """Every problem of the composed config `data` of a step, in the order of its sections; [] when there is none.

    A step whose loop is not known here has no problems.
    """
    if step_id in ROLLOUTS:
        from nemotron_launch.config.checks_grpo import check_grpo

        return list(check_grpo(data))
    if step_id.startswith("convert/"):
        from nemotron_launch.config.checks_convert import SOURCES, check_conversion

        return list(check_conversion(step_id, data)) if step_id in SOURCES else []
    if step_id not in LOOPS:
        return []
    loop, unit = LOOPS[step_id]
    return [
        *_loop(data, loop),
        *(_data_parallel_only(data) if loop == "rm" else ()),
        *check_policy(data, loop),
        *check_batch(data, "policy", "train", unit),
        *check_batch(data, loop, "val", unit),
        *check_lengths(data),
        *_data(data),
        *_generation(data, loop),
        *check_checkpointing(data),
        *_metric(data, loop),
    ]


def _loop(data: dict[str, Any], loop: str) -> Iterator[Problem]:
    if loop == "dpo" and data["dpo"]["preference_loss_weight"] == 0 and data["dpo"]["sft_loss_weight"] == 0:
        yield Problem(
            "dpo.preference_loss_weight",
            "is 0, and so is dpo.sft_loss_weight: there is nothing to learn from",
            "set one of them, for example dpo.preference_loss_weight=1",
        )
    if (data["policy"].get("dynamic_batching") or {}).get("enabled"):
        yield Problem(
            "policy.dynamic_batching.enabled",
            "this step's batches are not cut by token counts",
            "set it to false; policy.train_micro_batch_size says how many samples are computed at once",
        )
    if (data.get("logger") or {}).get("num_val_samples_to_print"):
        yield Problem(
            "logger.num_val_samples_to_print",
            "this step's validation prints no answers",
            f"set it to 0; {loop}.val_generation says how often generated answers are right",
        )


def _data_parallel_only(data: dict[str, Any]) -> Iterator[Problem]:
    """A reward model is computed by transformers, whole in every process."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        size = data["policy"]["megatron_cfg"][name]
        if size != 1:
            yield Problem(
                f"policy.megatron_cfg.{name}",
                f"{size}, but a reward model is trained data-parallel only",
                "set it to 1; policy.megatron_cfg.activation_checkpointing=true saves memory",
            )


def _section(data: dict[str, Any], name: str) -> dict[str, Any] | None:
    """`data.train` or `data.validation` over `data.default`; None when it is null."""
    section = data["data"].get(name)
    if section is None:
        return None
    return {**(data["data"].get("default") or {}), **section}


def _data(data: dict[str, Any]) -> Iterator[Problem]:
    yield from check_manifest(data)
    for name in ("train", "validation"):
        section = _section(data, name)
        if data["data"].get("manifest_path") or (section is None and name == "validation"):
            continue
        section = section or {}
        if section.get("data_path") is None and section.get("dataset_name") not in NAMED_DATASETS:
            yield Problem(
                f"data.{name}.data_path",
                "no data: it is not set",
                f"set data.{name}.data_path to a file, glob, folder or hub id",
            )
    if data["data"].get("validation") is not None and "default" in (data["data"].get("val_data_paths") or {}):
        yield Problem(
            "data.val_data_paths.default",
            "the name default belongs to data.validation",
            "choose another name, or set data.validation=null",
        )


def validation_names(data: dict[str, Any]) -> list[str]:
    """The validation sets as metrics name them: default for `data.validation`, and those of `data.val_data_paths`."""
    names = ["default"] if data["data"].get("validation") is not None else []
    return names + list(data["data"].get("val_data_paths") or {})


def _generation(data: dict[str, Any], loop: str) -> Iterator[Problem]:
    prompts = (data[loop].get("val_generation") or {}).get("num_prompts", 0)
    if prompts and not validation_names(data):
        yield Problem(
            f"{loop}.val_generation.num_prompts",
            f"{prompts} held-out prompts are to be answered, but there is no validation data",
            f"set data.validation.data_path, or {loop}.val_generation.num_prompts=0",
        )
    longest = data["policy"]["max_total_sequence_length"]
    if prompts and data[loop]["val_generation"]["max_new_tokens"] >= longest:
        yield Problem(
            f"{loop}.val_generation.max_new_tokens",
            f"{data[loop]['val_generation']['max_new_tokens']} leaves no room for a prompt in "
            f"policy.max_total_sequence_length={longest}",
            "lower it, or raise policy.max_total_sequence_length",
        )


def _metric(data: dict[str, Any], loop: str) -> Iterator[Problem]:
    """Whether the metric that ranks checkpoints will ever be there."""
    sets = validation_names(data)
    example = f"validation-{sets[0] if sets else 'default'}_loss"
    found = list(check_metric(data, loop, sets=sets, periods=("val_period", "val_at_end"), example=example))
    yield from found
    source, _, name = (data["checkpointing"].get("metric_name") or "train:").partition(":")
    if source == "train" or found or not data["checkpointing"]["enabled"]:
        return
    if not any(name.startswith(f"validation-{one}_") for one in sets):
        yield Problem(
            "checkpointing.metric_name",
            f"val:{name} names no validation set of this config",
            f"write val:{example}" + (f" (sets: {', '.join(sets)})" if len(sets) > 1 else ""),
        )
