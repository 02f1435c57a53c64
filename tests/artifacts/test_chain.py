"""Links between steps that have not run yet: types, tokenizers, templates and shapes, by their configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_launch.artifacts import chain
from nemotron_launch.artifacts.record import Made
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import Ledger
from tests.artifacts.made import START, byte_tokenizer, composed, ledger

__all__ = ["ledger"]

SFT, DPO = "sft/megatron", "rl/nemo_rl/dpo"


def link(made: list[str], used: list[str], type_name: str = "checkpoint_megatron", key: str = START) -> None:
    chain.check_link(*composed(SFT, *made), type_name, *composed(DPO, *used), key)


def refused(made: list[str], used: list[str], type_name: str = "checkpoint_megatron", key: str = START) -> UserError:
    with pytest.raises(UserError) as raised:
        link(made, used, type_name, key)
    return raised.value


def test_stages_that_agree_pass(ledger: Ledger) -> None:
    link([], [])
    model = [
        "policy.architecture=null",
        "policy.model_name=Qwen/Qwen2.5-0.5B",
        "policy.tokenizer.name=Qwen/Qwen2.5-0.5B",
    ]
    link(model, model)
    link([], [], "preference_jsonl", "data.train.data_path")  # a subtype of what is asked for


def test_a_stage_with_another_tokenizer_is_refused_at_its_own_line(ledger: Ledger) -> None:
    error = refused(["policy.tokenizer.name=gpt2"], [])
    assert (
        error.message == "policy.tokenizer.name: bytes here, but what sft/megatron -c tiny makes was trained with gpt2"
    )
    assert error.where and "dpo/config/tiny.yaml:" in error.where
    assert "run.allow_other_tokenizer=true" in (error.hint or "")
    link(["policy.tokenizer.name=gpt2"], ["run.allow_other_tokenizer=true"])


def test_folders_of_tokenizers_are_compared_by_what_is_in_them(ledger: Ledger, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "same")
    byte_tokenizer(tmp_path / "other", merges=["a b"])
    link([], [f"policy.tokenizer.name={tmp_path / 'same'}"])
    error = refused([], [f"policy.tokenizer.name={tmp_path / 'other'}"])
    assert f"policy.tokenizer.name: {tmp_path / 'other'} here, but" in error.message


def test_what_only_the_job_s_machine_can_read_is_left_to_it(ledger: Ledger) -> None:
    link(["policy.tokenizer.name=/lustre/a"], ["policy.tokenizer.name=/lustre/b"])
    link([], ["policy.tokenizer.name=/lustre/b"])  # it may be the byte-level one, saved there


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ("default", "null"),
        ("null", "default"),
        ("'{{ messages }}'", "'{{ messages[0] }}'"),
        ("'{{ messages }}'", "default"),
    ],
)
def test_another_chat_template_is_refused(ledger: Ledger, made: str, used: str) -> None:
    key = "policy.tokenizer.chat_template"
    error = refused([f"{key}={made}"], [f"{key}={used}"])
    assert error.message.startswith(f"{key}: ") and "here, but what sft/megatron -c tiny makes" in error.message
    link([f"{key}={made}"], [f"{key}={made}"])


def test_a_template_s_file_counts_by_its_text(ledger: Ledger, tmp_path: Path) -> None:
    key = "policy.tokenizer.chat_template"
    for name, text in (("a", "{{ x }}"), ("b", "{{ x }}"), ("c", "{{ y }}")):
        (tmp_path / f"{name}.jinja").write_text(text)
    link([f"{key}={tmp_path / 'a.jinja'}"], [f"{key}={tmp_path / 'b.jinja'}"])
    refused([f"{key}={tmp_path / 'a.jinja'}"], [f"{key}={tmp_path / 'c.jinja'}"])


def test_another_shape_is_refused(ledger: Ledger) -> None:
    error = refused([], ["policy.architecture.hidden_size=64", "policy.architecture.num_key_value_heads=4"])
    lines = (error.hint or "").splitlines()
    assert lines[:2] == ["hidden_size: 128 there, 64 here", "num_key_value_heads: 2 there, 4 here"]


@pytest.mark.parametrize(
    ("type_name", "key", "message", "hint"),
    [
        (
            "checkpoint_hf",
            START,
            f"{START} takes a checkpoint_megatron",
            "nemotron steps run convert/hf_to_megatron hf_path=",
        ),
        ("checkpoint_lora", START, "is a checkpoint_lora", ""),  # no step converts it
        ("prepared_jsonl", "data.train.data_path", "is a prepared_jsonl", "data.manifest_path=… takes it"),
        ("checkpoint_megatron", "data.train.data_path", "takes a training_jsonl", f"{START}=… takes it"),
        ("checkpoint_megatron", "policy.model_name", "takes a checkpoint_hf", "convert/megatron_to_hf megatron_path="),
        ("checkpoint_megatron", "dpo.seed", "consumes no artifact at dpo.seed", START),
    ],
)
def test_types_that_do_not_fit_are_refused(ledger: Ledger, type_name: str, key: str, message: str, hint: str) -> None:
    error = refused([], [], type_name, key)
    assert message in error.message and hint in (error.hint or "")
    assert error.where


def test_a_judge_is_another_model_and_may_have_another_tokenizer(ledger: Ledger) -> None:
    step, config = composed("rl/nemo_rl/rlhf")
    made = composed(SFT, "policy.tokenizer.name=gpt2")
    chain.check_link(*made, "checkpoint_hf", step, config, "env.judge.model")


def test_of_several_artifacts_the_port_s_own_type_is_taken(ledger: Ledger) -> None:
    step, _ = composed(DPO)
    rows, raw = Made("prepared_jsonl", "a", "/a"), Made("raw_jsonl", "b", "/b")
    assert chain.choose([rows, raw], step, "data.manifest_path", what="it") is rows
    assert chain.choose([raw, Made("checkpoint_hf", "c", "/c")], step, "data.train.data_path", what="it") is raw


def test_several_that_fit_are_listed_with_the_way_to_name_one(ledger: Ledger) -> None:
    step, _ = composed(DPO)
    two = [Made("checkpoint_megatron", "a", "/a"), Made("checkpoint_megatron", "b", "/b")]
    with pytest.raises(UserError) as raised:
        chain.choose(two, step, START, what="run x")
    assert raised.value.message == f"{START}: run x made 2 artifacts that fit"
    assert raised.value.hint == f"checkpoint_megatron at a:  {START}=/a\ncheckpoint_megatron at b:  {START}=/b"
    with pytest.raises(UserError, match="made no artifact"):
        chain.choose([], step, START, what="run x")
