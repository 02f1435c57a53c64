"""What scores the rollouts, and the data for it: rows, held-out rows, environments, NeMo Gym, judge, reward model.

A part of the cross-checks of the steps that make rollouts (checks_grpo.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemotron_launch.config.checks_policy import Problem, check_manifest

# Public datasets that are downloaded by their name alone.
NAMED_DATASETS = ("gsm8k", "OpenMathInstruct-2", "DAPOMath17K", "DeepScaler", "AIME2024", "AIME2025", "AIME2026")
# What `env_name` may say beside python:module.function.
ENVIRONMENTS = (
    *("math", "exact", "regex", "json_schema", "multiple_choice", "code", "tool_call", "instruction_following"),
    *("reasoning_gym", "nemo_gym", "reward_model", "judge"),
)
_FILES = (".jsonl", ".zst", ".json", ".csv", ".parquet", ".arrow", ".txt")


def check_rewards(data: dict[str, Any]) -> Iterator[Problem]:
    """The data, and that what scores the rollouts is there and is not the policy itself."""
    yield from _data(data)
    yield from _validation(data)
    yield from _environments(data)
    yield from _nemo_gym(data)
    yield from _rewarding_models(data)


def validates(data: dict[str, Any]) -> bool:
    """Whether there are held-out prompts."""
    return data["data"].get("validation") is not None or bool(
        (section(data, "train") or {}).get("split_validation_size")
    )


def section(data: dict[str, Any], name: str) -> dict[str, Any] | None:
    """`data.train` or `data.validation` over `data.default`, null entries left out; None when the section is null."""
    own = data["data"].get(name)
    if own is None:
        return None
    over = {key: value for key, value in own.items() if value is not None}
    return {**(data["data"].get("default") or {}), **over}


def _entries(part: dict[str, Any]) -> list[str]:
    path = part.get("data_path")
    return [] if path is None else [path] if isinstance(path, str) else list(path)


def _data(data: dict[str, Any]) -> Iterator[Problem]:
    yield from check_manifest(data)
    for name in ("train", "validation") if not data["data"].get("manifest_path") else ():
        part = section(data, name)
        if part is not None and not _entries(part) and part.get("dataset_name") not in NAMED_DATASETS:
            yield Problem(
                f"data.{name}.data_path",
                "no data: it is not set",
                f"set data.{name}.data_path to a file, glob, folder or hub id",
            )


def _validation(data: dict[str, Any]) -> Iterator[Problem]:
    grpo = data["grpo"]
    most, batch = grpo["max_val_samples"], grpo["val_batch_size"]
    if (most is None) != (batch is None):
        absent, other = ("max_val_samples", batch) if most is None else ("val_batch_size", most)
        yield Problem(
            f"grpo.{absent}",
            f"null, while the other of the two is {other}",
            "give grpo.max_val_samples and grpo.val_batch_size both; both null is all held-out prompts at once",
        )
    train, held_out = section(data, "train"), section(data, "validation")
    if train is None or held_out is None or data["data"].get("allow_train_as_validation"):
        return
    if data["data"].get("manifest_path"):
        return  # its files are compared when it is read
    common = [name for name in _sources(train, "train") if name in _sources(held_out, "validation")]
    if common:
        yield Problem(
            "data.validation.data_path",
            f"{common[0][0]} is the training data too: validation would show how well it is remembered",
            "name held-out data, set data.train.split_validation_size, or data.allow_train_as_validation=true",
        )


def _sources(part: dict[str, Any], default_split: str) -> list[tuple[str, str]]:
    """(what, split) of each source; a file has no splits."""
    split = part.get("split") or default_split
    if not _entries(part):
        return [(str(part.get("dataset_name")), split)]
    return [(entry, "" if entry.endswith(_FILES) else split) for entry in _entries(part)]


def _environments(data: dict[str, Any]) -> Iterator[Problem]:
    """What scores the rollouts must exist."""
    for name in ("train", "validation"):
        part = section(data, name)
        if part is None:
            continue
        chosen = part.get("env_name")
        own = (data["data"][name] or {}).get("env_name") is not None
        key = f"data.{name if own else 'default'}.env_name"
        if chosen is None and not data["env"]["should_use_nemo_gym"] and name == "train":
            yield Problem(key, "nothing scores the rollouts", "set it, for example to math, or to judge")
        elif chosen is not None and chosen not in ENVIRONMENTS and not _is_function(chosen):
            yield Problem(key, f"there is no environment {chosen}", _near(chosen))
        if not own:
            return


def _is_function(name: str) -> bool:
    module, _, function = name.removeprefix("python:").rpartition(".")
    return name.startswith("python:") and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


def _near(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.5)
    known = f"there are: {', '.join(ENVIRONMENTS)}, python:module.function"
    return f"did you mean {near[0]}?\n{known}" if near else known


def _nemo_gym(data: dict[str, Any]) -> Iterator[Problem]:
    env, gym = data["env"], data["env"]["nemo_gym"]
    for name in ("train", "validation"):
        part = section(data, name) or {}
        rows = "NemoGymDataset" if part.get("dataset_name") == "NemoGymDataset" else part.get("env_name")
        if rows in ("NemoGymDataset", "nemo_gym") and not env["should_use_nemo_gym"]:
            yield Problem(
                "env.should_use_nemo_gym",
                f"false, but data.{name} is scored by NeMo Gym ({rows})",
                "set env.should_use_nemo_gym=true, or another dataset_name and env_name",
            )
            return
    if not env["should_use_nemo_gym"]:
        return
    train = section(data, "train") or {}
    if train.get("env_name") not in (None, "nemo_gym"):
        yield Problem(
            "env.should_use_nemo_gym",
            f"true, but the rollouts are scored by {train['env_name']} (env_name): two ways to score are mixed",
            "start from the config nemo_gym, or set env.should_use_nemo_gym=false",
        )
        return
    if not _entries(train) and train.get("dataset_name") in NAMED_DATASETS:
        yield Problem(
            "data.train.dataset_name",
            f"{train['dataset_name']} has no rows for NeMo Gym (responses_create_params, agent_ref)",
            "set data.train.dataset_name=NemoGymDataset and data.train.data_path",
        )
    placed = any("port" in server for block in gym.values() for _, server in _resource_servers(block))
    if gym["server"] is None and not placed:
        yield Problem(
            "env.nemo_gym.server",
            "no servers to score with",
            "name one of run.services, or give the address of a head server that runs already",
        )
    group = data["grpo"]["num_generations_per_prompt"]
    for instance, block in gym.items():
        for name, server in _resource_servers(block):
            at = f"env.nemo_gym.{instance}.resources_servers.{name}"
            waits = server.get("num_rollouts_per_prompt")
            if waits is not None and waits != group:
                yield Problem(
                    f"{at}.num_rollouts_per_prompt",
                    f"{waits}, but grpo.num_generations_per_prompt={group}: the server would wait for rollouts "
                    "that never come",
                    "write ${grpo.num_generations_per_prompt}",
                )


def _resource_servers(block: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    servers = block.get("resources_servers") if isinstance(block, dict) else None
    for name, server in (servers if isinstance(servers, dict) else {}).items():
        if isinstance(server, dict):
            yield name, server


def _rewarding_models(data: dict[str, Any]) -> Iterator[Problem]:
    """A judge and a reward model that are asked must be there, and be another model than the policy."""
    policy, env = data["policy"], data["env"]
    warm = (data["checkpointing"].get("pretrained_checkpoint") or {}).get("path")
    used = {(section(data, name) or {}).get("env_name") for name in ("train", "validation")}
    if "judge" in used and env["judge"]["model"] is None:
        yield Problem(
            "env.judge.model", "there is no judge", "set it to a hub id or a folder; RL_REWARD_MODEL names it too"
        )
    if "judge" in used and env["judge"]["server"] is None:
        yield Problem(
            "env.judge.server",
            "the judge answers from a server, and none is named",
            "name one of run.services, or give the address of an OpenAI-compatible server",
        )
    held_out = section(data, "validation") or {}
    alone = data["grpo"]["val_num_generations_per_prompt"] == 1
    if held_out.get("env_name") == "judge" and env["judge"]["mode"] == "pairwise" and alone:
        yield Problem(
            "grpo.val_num_generations_per_prompt",
            "1 answer to each held-out prompt has none that the judge could compare it with (env.judge.mode=pairwise)",
            "set it to 2 or more, or env.judge.mode=pointwise",
        )
    for name, key, model in (
        ("judge", "env.judge.model", env["judge"]["model"]),
        ("reward_model", "env.reward_model.model_name", env["reward_model"]["model_name"]),
    ):
        same = next((at for at, own in _policy_places(policy, warm) if model is not None and own == model), None)
        if name in used and same and not env["allow_policy_as_judge"]:
            yield Problem(
                key,
                f"{model} is {same} too: the policy would score itself",
                f"name the {name.replace('_', ' ')}'s own checkpoint, or set env.allow_policy_as_judge=true",
            )


def _policy_places(policy: dict[str, Any], warm: str | None) -> list[tuple[str, str | None]]:
    return [("policy.model_name", policy.get("model_name")), ("checkpointing.pretrained_checkpoint.path", warm)]
