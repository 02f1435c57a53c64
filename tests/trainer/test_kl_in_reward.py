"""loss_fn.use_kl_in_reward in a whole step: the KL reaches the weights through the advantages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from grpo_tasks import PROMPTS, SAMPLES, SETTINGS, Scored, Task, with_loss

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.grpo_batches import micro_batches
from nemotron_launch.trainer.rollouts import Sampling

IN_REWARD = with_loss(use_kl_in_reward=True, reference_policy_kl_penalty=0.5)
ALL_EQUAL = Scored(lambda rollout: Score(1.0))


@pytest.fixture
def task(layout, byte_tokenizer, tmp_path):
    def task(**options) -> Task:
        made = Task(layout, byte_tokenizer, tmp_path, **options)
        with torch.no_grad():  # away from the reference
            noise = torch.Generator().manual_seed(5)
            for value in made.policy.gpt.parameters():
                value += 0.03 * torch.randn(value.shape, generator=noise)
        made.policy.optimizer.reload_model_params()
        return made

    return task


def test_rewards_that_are_all_equal_still_draw_the_policy_to_its_reference(task):
    """Advantages are the KL alone; without it there is no gradient at all."""
    with_kl = task(settings=IN_REWARD, environment=ALL_EQUAL).step().metrics
    without = task(settings=with_loss(reference_policy_kl_penalty=0.0), environment=ALL_EQUAL).step().metrics
    assert with_kl["train/grad_norm"] > 1e-3
    assert without["train/grad_norm"] == 0
    assert with_kl["train/loss"] == with_kl["train/actor_loss"] != 0


@pytest.mark.parametrize(
    "sampling", [Sampling(10, stop_ids=(97,)), Sampling(10, top_k=40, stop_ids=(97,))], ids=["plain", "top-k"]
)
def test_each_token_pays_its_own_kl_and_clips_come_last(task, sampling):
    """Of the whole distributions, also where top-k filters the one that was sampled from."""
    made = task(settings=replace(IN_REWARD, clip=(-0.8, 0.9)), sampling=sampling)
    rollouts, _, _ = made.task._collect(made.run.config, made.progress)
    batch = made.task._judged(rollouts)
    assert batch.advantages_B.abs().max() > 0.9
    _, _, batch, _ = made.task._logps(made.policy, batch, 1)
    frozen = made.task.reference
    assert batch.token_advantages is not None
    assert sorted(batch.token_advantages) == list(range(PROMPTS * SAMPLES))
    # Every rollout a row of its own, in fp64: the definition.
    alone = replace(SETTINGS.packing, share_prompt=False)
    cut = micro_batches(rollouts, np.arange(PROMPTS * SAMPLES), PROMPTS * SAMPLES, alone, made.policy.layout.device)
    policy, reference = (score([part.batch for part in cut], sampling.whole) for score in (made.policy.logps, frozen))
    for part, own, other in zip(cut, policy, reference, strict=True):
        for place, logps, ref in zip(part.places, part.apart(own), part.apart(other), strict=True):
            difference = (ref - logps).double()
            kl = difference.exp() - 1 - difference
            expected = (batch.advantages_B[place] - 0.5 * kl).clamp(-0.8, 0.9)
            torch.testing.assert_close(batch.token_advantages[place].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_step_of_several_updates_keeps_the_kl_of_its_start(task):
    made = task(settings=replace(IN_REWARD, global_batch=PROMPTS * SAMPLES // 2))
    line = made.step().metrics
    assert line["train/num_valid_samples"] == PROMPTS * SAMPLES
    assert line["train/kl_penalty"] > 0
    assert line["train/loss"] == pytest.approx(line["train/actor_loss"])
