"""What every step that trains shares: the model and its parallel layout, precision, schedule, checkpoints.

For the checks of each kind of step (checks.py, checks_grpo.py); pure functions on plain data, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemotron_launch.frozen import frozen

_MUST_SAVE_BY = re.compile(r"\d+:([01]?\d|2[0-3]):[0-5]?\d:[0-5]?\d")


@frozen
class Problem:
    """One thing that is wrong: at which config key, what, and what to do about it."""

    key: str
    message: str
    hint: str


def processes(data: dict[str, Any]) -> int:
    """How many processes train: nodes times `cluster.procs_per_node`, or times GPUs where that is null."""
    cluster = data["cluster"]
    return cluster["num_nodes"] * (cluster.get("procs_per_node") or cluster["gpus_per_node"])


def data_parallel_size(data: dict[str, Any]) -> int | None:
    """Processes that work on different samples; None when the model's parallel sizes do not divide the processes."""
    model = model_parallel_size(data)
    return processes(data) // model if processes(data) >= model and processes(data) % model == 0 else None


def model_parallel_size(data: dict[str, Any]) -> int:
    """Processes that hold one copy of the model: tensor times pipeline times context parallel size."""
    megatron = _megatron(data)
    return (
        megatron["tensor_model_parallel_size"]
        * megatron["pipeline_model_parallel_size"]
        * megatron.get("context_parallel_size", 1)
    )


def check_policy(data: dict[str, Any], loop: str) -> Iterator[Problem]:
    """The model, its parallel layout, precision and schedule. `loop` is the section with the number of steps."""
    yield from _model(data)
    yield from _architecture(data)
    yield from _parallel(data)
    yield from _precision(data)
    yield from _recompute(data)
    yield from _schedule(data, loop)


def _megatron(data: dict[str, Any]) -> dict[str, Any]:
    megatron: dict[str, Any] = data["policy"]["megatron_cfg"]
    return megatron


def _model(data: dict[str, Any]) -> Iterator[Problem]:
    policy = data["policy"]
    if policy.get("model_name") is None and policy.get("architecture") is None:
        yield Problem(
            "policy.model_name",
            "no model: policy.model_name and policy.architecture are both null",
            "set policy.model_name to a hub id or a folder, or write the architecture out",
        )
    if policy.get("model_name") is not None and policy.get("architecture") is not None:
        yield Problem(
            "policy.architecture",
            f"two models: policy.model_name is {policy['model_name']} and policy.architecture is set too",
            "set one of them to null",
        )
    tokenizer = policy["tokenizer"]
    if tokenizer.get("name") is None and policy.get("model_name") is None:
        yield Problem(
            "policy.tokenizer.name",
            "no tokenizer: it follows policy.model_name, which is null",
            "set policy.tokenizer.name to a hub id or a folder, or to bytes",
        )
    if tokenizer.get("chat_template") is None and tokenizer.get("chat_template_kwargs"):
        yield Problem(
            "policy.tokenizer.chat_template_kwargs",
            "there is no chat template to take these arguments",
            "set policy.tokenizer.chat_template=default, or remove them",
        )


def _architecture(data: dict[str, Any]) -> Iterator[Problem]:
    """An inline architecture's own arithmetic, and whether the parallel sizes divide it."""
    shape = data["policy"].get("architecture")
    if shape is None:
        return
    at = "policy.architecture"
    needed = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    missing = [name for name in needed if shape.get(name) is None]
    for name in missing:
        yield Problem(f"{at}.{name}", "is not set", "an inline architecture needs " + ", ".join(needed))
    if missing:
        return
    heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
    groups = shape.get("num_key_value_heads") or heads
    if heads % groups:
        yield Problem(
            f"{at}.num_key_value_heads",
            f"{groups} key/value heads do not divide {heads} query heads",
            f"choose a divisor of {heads}",
        )
    if shape.get("head_dim") is None and hidden % heads:
        yield Problem(
            f"{at}.num_attention_heads",
            f"{heads} heads do not divide the hidden size {hidden}",
            f"choose a divisor of {hidden}, or set {at}.head_dim",
        )
    elif (width := shape.get("head_dim") or hidden // heads) % 2:
        yield Problem(
            f"{at}.head_dim", f"{width} is odd; rotary positions turn pairs of values", f"make {at}.head_dim even"
        )
    tensor = _megatron(data)["tensor_model_parallel_size"]
    for name, size in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", groups),
        ("intermediate_size", shape["intermediate_size"]),
    ):
        if size % tensor:
            yield Problem(
                f"{at}.{name}",
                f"{size} is not a multiple of policy.megatron_cfg.tensor_model_parallel_size={tensor}",
                f"change {at}.{name}, or lower policy.megatron_cfg.tensor_model_parallel_size",
            )
    yield from _stages(data, shape["num_layers"])


def _stages(data: dict[str, Any], layers: int) -> Iterator[Problem]:
    """Whether the layers share out over the pipeline stages."""
    megatron = _megatron(data)
    stages = megatron["pipeline_model_parallel_size"]
    ends = ["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"]
    fixed = {name: megatron[name] for name in ends if megatron.get(name) is not None}
    if stages == 1:
        return
    rest, between = layers - sum(fixed.values()), stages - len(fixed)
    even = rest == 0 if between == 0 else rest >= between and rest % between == 0
    if even:
        return
    given = "".join(f", {value} of them in the {name.split('_')[3]} stage" for name, value in fixed.items())
    yield Problem(
        "policy.megatron_cfg.pipeline_model_parallel_size",
        f"{layers} layers{given}, do not share out evenly over {stages} pipeline stages",
        f"change policy.megatron_cfg.pipeline_model_parallel_size, or {ends[0]} and {ends[1]}",
    )


def _parallel(data: dict[str, Any]) -> Iterator[Problem]:
    cluster, megatron = data["cluster"], _megatron(data)
    at = "policy.megatron_cfg"
    nodes, tensor = cluster["num_nodes"], megatron["tensor_model_parallel_size"]
    pipeline, size = megatron["pipeline_model_parallel_size"], model_parallel_size(data)
    if processes(data) == 0:
        yield Problem(
            "cluster.procs_per_node",
            "no processes: cluster.gpus_per_node is 0 and cluster.procs_per_node is null",
            "set cluster.procs_per_node=1 (or more) to train on CPU, or cluster.gpus_per_node",
        )
    elif data_parallel_size(data) is None:
        count = f"{nodes} {'nodes' if nodes > 1 else 'node'} x {processes(data) // nodes}"
        yield Problem(
            f"{at}.tensor_model_parallel_size",
            f"tensor {tensor} x pipeline {pipeline} = {size} does not divide the {processes(data)} processes ({count})",
            f"lower {at}.tensor_model_parallel_size or {at}.pipeline_model_parallel_size,\n"
            f"or make cluster.num_nodes x cluster.{'procs' if cluster.get('procs_per_node') else 'gpus'}_per_node "
            f"a multiple of {size}",
        )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if pipeline == 1 and megatron.get(name) is not None:
            yield Problem(
                f"{at}.{name}",
                "there is one pipeline stage only",
                f"set {at}.{name}=null, or {at}.pipeline_model_parallel_size",
            )
    multiple = data["policy"]["make_sequence_length_divisible_by"]
    if megatron.get("sequence_parallel") and tensor > 1 and multiple % tensor:
        yield Problem(
            "policy.make_sequence_length_divisible_by",
            f"{multiple} is not a multiple of {at}.tensor_model_parallel_size={tensor}, which sequence parallel needs",
            f"set policy.make_sequence_length_divisible_by={-(-multiple // tensor) * tensor},\n"
            f"or {at}.sequence_parallel=false",
        )


def _precision(data: dict[str, Any]) -> Iterator[Problem]:
    policy, megatron = data["policy"], _megatron(data)
    precision = policy["precision"]
    if megatron.get("pipeline_dtype", precision) != precision:
        yield Problem(
            "policy.megatron_cfg.pipeline_dtype",
            f"{megatron['pipeline_dtype']} is not policy.precision={precision}",
            "remove it; it follows policy.precision",
        )
    half = megatron["optimizer"].get("bf16")
    if half is not None and half != (precision == "bfloat16"):
        yield Problem(
            "policy.megatron_cfg.optimizer.bf16",
            f"{str(half).lower()} contradicts policy.precision={precision}",
            "remove it; it follows policy.precision",
        )
    if policy.get("device") == "cuda" and data["cluster"]["gpus_per_node"] == 0:
        yield Problem(
            "policy.device", "cuda, but cluster.gpus_per_node is 0", "set cluster.gpus_per_node, or policy.device=auto"
        )
    if policy.get("device") == "cpu" and precision != "float32":
        yield Problem("policy.precision", f"{precision} needs a GPU, and policy.device is cpu", "set it to float32")


def _recompute(data: dict[str, Any]) -> Iterator[Problem]:
    megatron = _megatron(data)
    at = "policy.megatron_cfg"
    if megatron.get("recompute_modules") is None:
        return
    if not megatron.get("activation_checkpointing") or megatron.get("recompute_granularity") != "selective":
        yield Problem(
            f"{at}.recompute_modules",
            "is read only when activations are recomputed selectively",
            f"set {at}.activation_checkpointing=true and {at}.recompute_granularity=selective, or remove it",
        )


def _schedule(data: dict[str, Any], loop: str) -> Iterator[Problem]:
    """The schedule of Megatron's OptimizerParamScheduler; what it would assert on is said here."""
    optimizer, schedule = _megatron(data)["optimizer"], _megatron(data)["scheduler"]
    at = "policy.megatron_cfg.scheduler"
    steps, warmup, style = data[loop]["max_num_steps"], schedule["lr_warmup_iters"], schedule["lr_decay_style"]
    until, named = schedule.get("lr_decay_iters"), f"{at}.lr_decay_iters"
    if until is None:
        until, named = steps, f"{loop}.max_num_steps"
    if warmup > steps:
        yield Problem(
            f"{at}.lr_warmup_iters",
            f"a warm-up of {warmup} steps does not end within {loop}.max_num_steps={steps}",
            f"set {at}.lr_warmup_iters to at most {steps}",
        )
    elif style != "constant" and warmup >= until:
        yield Problem(
            f"{at}.lr_warmup_iters",
            f"a warm-up of {warmup} steps leaves none of {named}={until} for the decay ({style})",
            f"lower {at}.lr_warmup_iters, or set {at}.lr_decay_style=constant",
        )
    for name, key in (("min_lr", "policy.megatron_cfg.optimizer.min_lr"), ("lr_warmup_init", f"{at}.lr_warmup_init")):
        value = (optimizer if name == "min_lr" else schedule).get(name, 0)
        if value > optimizer["lr"]:
            yield Problem(
                key,
                f"{value:g} is more than policy.megatron_cfg.optimizer.lr={optimizer['lr']:g}",
                f"lower {key}, for example to 0",
            )
    if style == "WSD" and (schedule.get("lr_wsd_decay_iters") or 0) > until:
        yield Problem(
            f"{at}.lr_wsd_decay_iters",
            f"{schedule['lr_wsd_decay_iters']} steps of decay are more than {named}={until}",
            "lower it, or leave it null for a tenth of the steps",
        )
    start, end = schedule["start_weight_decay"], schedule["end_weight_decay"]
    if start != end and (schedule["weight_decay_incr_style"] == "constant" or end < start):
        constant = schedule["weight_decay_incr_style"] == "constant"
        yield Problem(
            f"{at}.{'weight_decay_incr_style' if constant else 'end_weight_decay'}",
            f"weight decay {'stays constant' if constant else 'can only grow'}, but goes from {start:g} to {end:g}",
            f"set {at}.weight_decay_incr_style=linear" if constant and end > start else "let end be at least start",
        )


def check_batch(data: dict[str, Any], section: str, prefix: str, unit: str) -> Iterator[Problem]:
    """Whether `<section>.<prefix>_global_batch_size` is whole micro-batches on every data-parallel rank."""
    ranks = data_parallel_size(data)
    if not ranks:
        return
    whole, micro = f"{section}.{prefix}_global_batch_size", f"{section}.{prefix}_micro_batch_size"
    size = data[section][f"{prefix}_global_batch_size"]
    part = data[section][f"{prefix}_micro_batch_size"] * ranks
    if size % part:
        below, above = size // part * part, -(-size // part) * part
        yield Problem(
            whole,
            f"{size} {unit} do not divide into micro-batches of {part // ranks} on {ranks} data-parallel "
            f"{'ranks' if ranks > 1 else 'rank'} ({part} {unit} at a time)",
            f"set {whole} to {f'{below} or ' if below else ''}{above}, or change {micro}",
        )


def check_lengths(data: dict[str, Any]) -> Iterator[Problem]:
    """Whether inputs and the model's positions fit the longest sequence."""
    policy = data["policy"]
    longest = policy["max_total_sequence_length"]
    limit = data["data"].get("max_input_seq_length")
    if limit is not None and limit > longest:
        yield Problem(
            "data.max_input_seq_length",
            f"{limit} is more than policy.max_total_sequence_length={longest}",
            "lower it, or raise policy.max_total_sequence_length",
        )
    meant = (policy.get("architecture") or {}).get("max_position_embeddings")
    if meant is not None and meant < longest:
        yield Problem(
            "policy.architecture.max_position_embeddings",
            f"{meant} is less than policy.max_total_sequence_length={longest}",
            "raise it, or lower policy.max_total_sequence_length",
        )


def check_checkpointing(data: dict[str, Any]) -> Iterator[Problem]:
    """When checkpoints are written and where the run starts from; not the metric that ranks them."""
    saving = data["checkpointing"]
    limit = saving.get("checkpoint_must_save_by")
    if limit is not None and not _MUST_SAVE_BY.fullmatch(limit):
        yield Problem(
            "checkpointing.checkpoint_must_save_by",
            f"{limit!r} is not a time as DD:HH:MM:SS",
            'write it like "00:03:45:00" (three hours and three quarters), in quotes',
        )
    if not saving["enabled"]:
        return
    if saving.get("ft_save_period") is not None and saving.get("ft_keep_latest_k") is None:
        yield Problem(
            "checkpointing.ft_save_period",
            "checkpoints for crash recovery would never be pruned",
            "set checkpointing.ft_keep_latest_k, for example to 1",
        )
    path = (saving.get("pretrained_checkpoint") or {}).get("path")
    own = saving["checkpoint_dir"].rstrip("/")
    if path is not None and (path.rstrip("/") + "/").startswith(own + "/"):
        yield Problem(
            "checkpointing.pretrained_checkpoint.path",
            f"{path} is this run's own checkpointing.checkpoint_dir",
            "choose another output_dir; a run finds its own checkpoints without being told",
        )


def check_manifest(data: dict[str, Any]) -> Iterator[Problem]:
    """One source for the rows: a manifest, or data paths."""
    if not data["data"].get("manifest_path"):
        return
    for name in ("train", "validation", "default"):
        if (data["data"].get(name) or {}).get("data_path"):
            yield Problem(
                "data.manifest_path",
                f"names the rows, and so does data.{name}.data_path",
                f"give one of them; data.{name}.data_path=null takes the manifest's",
            )


def check_metric(
    data: dict[str, Any], loop: str, *, sets: list[str], periods: tuple[str, ...], example: str
) -> Iterator[Problem]:
    """Whether the metric that ranks checkpoints has a source. sets: the validation sets; periods: what validates."""
    key, metric = "checkpointing.metric_name", data["checkpointing"].get("metric_name")
    if metric is None or not data["checkpointing"]["enabled"]:
        return
    source, _, name = metric.partition(":")
    if source not in ("train", "val") or not name:
        yield Problem(
            key,
            f"{metric!r} does not say where the metric comes from",
            f"write train:loss or val:{example} for example, or null to keep the newest",
        )
    elif source == "val" and not sets:
        yield Problem(key, f"{metric} needs validation data", f"set data.validation.data_path, or {key}=null")
    elif source == "val" and not any(data[loop].get(period) for period in periods):
        yield Problem(
            key, f"{metric} needs validations, and {loop}.val_period is 0", f"set {loop}.val_period, or {key}=null"
        )
