"""A resumed run keeps what decides its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.config_changes import FREE_TO_CHANGE, config_changes, refuse_changes

OLD = {
    "output_dir": "out",
    "dpo": {"reference_policy_kl_penalty": 0.05, "max_num_steps": 100, "val_period": 10},
    "policy": {
        "train_global_batch_size": 16,
        "train_micro_batch_size": 4,
        "megatron_cfg": {"tensor_model_parallel_size": 1, "optimizer": {"lr": 1e-5}},
    },
    "checkpointing": {"save_period": 50, "pretrained_checkpoint": {"path": "sft/checkpoints"}},
    "cluster": {"procs_per_node": 1},
}


def changed(key: str, value: object) -> dict:
    new = json.loads(json.dumps(OLD))
    section = new
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = value
    return new


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dpo.reference_policy_kl_penalty", 0.1),
        ("policy.train_global_batch_size", 32),
        ("policy.megatron_cfg.optimizer.lr", 2e-5),
        ("policy.precision", "bfloat16"),
    ],
)
def test_a_key_that_decides_the_result_is_named(key, value):
    ((name, _, new),) = config_changes(OLD, changed(key, value))
    assert (name, new) == (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "elsewhere"),
        ("dpo.max_num_steps", 200),
        ("dpo.val_period", 5),
        ("policy.train_micro_batch_size", 2),
        ("policy.megatron_cfg.tensor_model_parallel_size", 2),
        ("policy.megatron_cfg.recompute_modules", ["mlp"]),
        ("checkpointing.save_period", 7),
        ("cluster.procs_per_node", 2),
        ("run.make_missing", {"x": 1}),
        ("logger.wandb.project", "mine"),
        ("policy.hf_config_overrides", None),
        # What lies there is compared, not where it lies.
        ("checkpointing.pretrained_checkpoint.path", "other"),
        ("data.train.data_path", "other.jsonl"),
        ("policy.tokenizer.name", "other"),
    ],
)
def test_layout_length_and_places_may_change(key, value):
    assert config_changes(OLD, changed(key, value)) == []


def test_the_error_names_every_changed_key_and_the_way_out():
    new = changed("dpo.reference_policy_kl_penalty", 0.1)
    new["policy"]["train_global_batch_size"] = 32
    with pytest.raises(UserError) as error:
        refuse_changes(config_changes(OLD, new), checkpoint="out/checkpoints/step_50", allow=False)
    text = str(error.value)
    assert "dpo.reference_policy_kl_penalty: 0.05 there, 0.1 here" in text
    assert "policy.train_global_batch_size: 16 there, 32 here" in text
    assert "allow_config_change=true" in text
    assert len(refuse_changes(config_changes(OLD, new), checkpoint="…", allow=True)) == 2


def test_every_free_key_of_our_own_sections_exists_in_the_schemas():
    # A renamed key would otherwise silently start to block every resume, or stop to.
    text = "".join(path.read_text() for path in (Path(__file__).parents[2] / "steps" / "schemas").glob("*.json"))
    for pattern in FREE_TO_CHANGE:
        leaf = pattern.rsplit(".", 1)[-1].strip("*")
        if "." in pattern and "*" not in leaf:
            assert f'"{leaf}' in text or f'{leaf}"' in text, pattern
