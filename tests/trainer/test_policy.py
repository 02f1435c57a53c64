"""A policy's passes over micro-batches of unusual shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models import batch_of, hf_model, megatron_section, pairs, policy_of

from nemotron_launch.trainer.batch import Group
from nemotron_launch.trainer.losses import sft_loss

NAMES = ("loss", "num_valid_tokens")


def first_step(layout, batches):
    """Loss and gradient norm of one step on these micro-batches, normalised by 100 tokens."""
    policy = policy_of(hf_model("qwen2"), layout)
    policy.make_trainable(megatron_section(), total_steps=10)

    def loss(logps, i):
        return sft_loss(logps, batches[i].mask_NR, valid_tokens=torch.tensor(100.0))

    return policy.train_step(batches, loss, NAMES)


def test_a_micro_batch_in_which_nothing_counts_changes_no_gradient(layout):
    counted = batch_of(pairs(3))
    nothing = batch_of([dataclasses.replace(group, valid=False) for group in pairs(2, seed=1)])
    alone, beside = first_step(layout, [counted]), first_step(layout, [nothing, counted])
    assert beside["loss"] == alone["loss"]
    assert beside["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6)
    assert beside["num_valid_tokens"] == alone["num_valid_tokens"]


def test_a_step_in_which_nothing_counts_has_no_gradient(layout):
    nothing = batch_of([dataclasses.replace(group, valid=False) for group in pairs(2)])
    values = first_step(layout, [nothing])
    assert values["loss"] == values["grad_norm"] == values["num_valid_tokens"] == 0


@pytest.mark.parametrize("share_prompt", [True, False])
def test_one_pair_at_a_time_gives_the_loss_of_all_at_once(layout, share_prompt):
    groups = pairs(4)
    whole = first_step(layout, [batch_of(groups, share_prompt=share_prompt)])
    single = first_step(layout, [batch_of([group], share_prompt=share_prompt) for group in groups])
    assert single["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert single["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_one_answer_token_behind_a_one_token_prompt_is_scored(layout):
    policy = policy_of(hf_model("llama"), layout)
    group = Group(1, (np.array([5, 9]), np.array([5, 7])))
    shared = policy.logps([batch_of([group])])[0]
    apart = policy.logps([batch_of([group], share_prompt=False)])[0]
    assert shared.shape == (2, 1)
    torch.testing.assert_close(shared[:, 0], apart[:, 1])
    assert (shared < 0).all()
