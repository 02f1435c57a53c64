"""One step of GRPO: how it is cut changes nothing; who is sampled, who counts, who is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from grpo_tasks import PROMPTS, SAMPLES, SETTINGS, STOPS, Scored, Task, prompts, reward, with_loss

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.advantages import RewardShaping
from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.grpo_batches import micro_batches
from nemotron_launch.trainer.rollouts import Sampling

ROLLOUTS = PROMPTS * SAMPLES
# What log-probabilities before the step are needed for: several updates, and the sequence error mask.
ALL_PASSES = replace(with_loss(reference_policy_kl_penalty=0.1), global_batch=ROLLOUTS // 2, error_threshold=2.0)


@pytest.fixture
def task(layout, byte_tokenizer, tmp_path):
    def task(**options) -> Task:
        return Task(layout, byte_tokenizer, tmp_path, **options)

    return task


def texts(made: Task) -> list[str]:
    return [rollout.text for rollout in made.environment.seen]


CUTS = {
    "micro-batches of one rollout": {"micro_batch": 1},
    "micro-batches of half a group": {"micro_batch": 2},
    "one micro-batch": {"micro_batch": ROLLOUTS},
    "log-probabilities of few at once": {"logprob_batch": 2},
    "log-probabilities of all at once": {"logprob_batch": ROLLOUTS},
    "prompts computed for each answer": {"packing": replace(SETTINGS.packing, share_prompt=False)},
    "micro-batches of so many tokens": {"micro_tokens": 100, "logprob_tokens": 60},
    "padded rows": {"packing": replace(SETTINGS.packing, multiple_of=8)},
    "few rollouts at once": {"generation_batch": 3},
    "rollouts of one prompt at once": {"generation_batch": SAMPLES},
}


@pytest.mark.parametrize("changes", CUTS.values(), ids=CUTS.keys())
def test_how_a_step_is_cut_changes_neither_rollouts_nor_losses(task, whole_steps, changes):
    generation_batch = {key: changes[key] for key in ("generation_batch",) if key in changes}
    settings = replace(ALL_PASSES, **{key: value for key, value in changes.items() if key not in generation_batch})
    made = task(settings=settings, **generation_batch)
    lines = made.steps(2)
    expected_texts, expected = whole_steps
    assert texts(made) == expected_texts
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def whole_steps(layout, byte_tokenizer, tmp_path_factory):
    made = Task(layout, byte_tokenizer, tmp_path_factory.mktemp("whole"), settings=ALL_PASSES)
    lines = made.steps(2)
    assert lines[1]["train/reference_kl"] != 0
    return texts(made), lines


def test_a_prompt_is_computed_once_for_its_answers(task, layout):
    made = task()
    rollouts, _, _ = made.task._collect(made.run.config, made.progress)
    cut = micro_batches(rollouts, np.arange(ROLLOUTS), 2 * SAMPLES, SETTINGS.packing, layout.device)
    assert [(part.batch.rows, part.batch.tails) for part in cut] == [(2, SAMPLES)] * (PROMPTS // 2)
    assert sorted(np.concatenate([part.places for part in cut])) == list(range(ROLLOUTS))
    for part in cut:
        own = [torch.arange(len(rollouts.completions[place].ids)).float() for place in part.places]
        for there, back in zip(own, part.apart(part.beside(own)), strict=True):
            assert torch.equal(there, back)


@pytest.mark.parametrize("tokens", [1, 20, 45, 100, 10_000])
def test_tokens_bound_a_micro_batch(task, layout, tokens):
    made = task()
    rollouts, _, _ = made.task._collect(made.run.config, made.progress)
    cut = micro_batches(rollouts, np.arange(ROLLOUTS), 1, SETTINGS.packing, layout.device, tokens=tokens)
    assert sorted(np.concatenate([part.places for part in cut])) == list(range(ROLLOUTS))
    assert all(part.batch.tokens_BS.numel() <= tokens or len(part.places) == 1 for part in cut)
    assert (len(cut) == 1) == (tokens == 10_000)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(10, stop_ids=STOPS),
        Sampling(10, temperature=0.7, stop_ids=STOPS),
        Sampling(10, top_p=0.9, stop_ids=STOPS),
        Sampling(10, temperature=1.3, top_k=40, stop_ids=STOPS),
    ],
    ids=["plain", "temperature", "top-p", "temperature and top-k"],
)
def test_recorded_log_probabilities_are_those_that_are_trained_on(task, sampling):
    made = task(settings=ALL_PASSES, sampling=sampling)
    first, second = made.steps(2)
    for line in (first, second):
        # exp of a difference of 1e-4 nats
        assert line["train/max_seq_mult_prob_error"] == pytest.approx(1, abs=1e-4)
        assert line["train/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
    assert second["train/reference_kl"] != 0


def test_several_updates_are_one_tick_of_the_schedule(task):
    made = task(settings=replace(SETTINGS, global_batch=ROLLOUTS // 4))
    line = made.steps(1)[0]
    assert made.policy.scheduler.num_steps == 1
    assert line["train/num_valid_samples"] == ROLLOUTS
    assert line["train/probs_ratio_max"] > 1  # later updates train on what earlier ones have moved


def test_what_is_exactly_on_policy_needs_no_pass_before_the_step(task):
    made = task(settings=replace(with_loss(reference_policy_kl_penalty=0.0), needs_reference=False))
    line, before = made.steps(1)[0], task(settings=replace(ALL_PASSES, global_batch=ROLLOUTS)).steps(1)[0]
    assert line["train/probs_ratio"] == pytest.approx(1, abs=1e-9)
    assert line["train/actor_loss"] == pytest.approx(before["train/actor_loss"], abs=1e-6)
    assert "train/reference_kl" not in line


def test_kl_to_the_reference_is_measured_at_its_period_where_it_costs_nothing(task):
    made = task(settings=replace(with_loss(reference_policy_kl_penalty=0.0), kl_period=3))
    measured = [step for step, line in enumerate(made.steps(4), 1) if "train/reference_kl" in line]
    assert measured == [1, 3]


def test_dynamic_sampling_goes_on_until_enough_groups_differ(task):
    """Every other prompt's answers are all worth the same."""

    def of(rollout):
        return reward(rollout) if int(rollout.where.split(":")[1]) % 2 else Score(1.0)

    made = task(settings=replace(SETTINGS, dynamic_sampling_batches=5, leave_one_out=False), environment=Scored(of))
    line = made.step().metrics
    assert line["train/dynamic_sampling_num_gen_batches"] == 2
    assert line["train/groups_without_variance"] == 0.5  # of all that was sampled
    assert line["train/filtered_reward"] != line["train/reward"]
    assert made.progress.position.epoch == 1  # 16 prompts are two batches of 8
    assert line["train/num_valid_samples"] == ROLLOUTS


def test_dynamic_sampling_gives_up_where_groups_never_differ(task):
    settings = replace(SETTINGS, dynamic_sampling_batches=3, leave_one_out=False)
    made = task(settings=settings, environment=Scored(lambda rollout: Score(1.0)))
    with pytest.raises(UserError, match=r"after 3 batches of rollouts 0 groups differ .*, and a step needs 8"):
        made.step()


def test_a_prompt_seen_again_is_answered_anew(task):
    """Four prompts a batch, the same four in every epoch: a second visit in one step has random numbers of its own."""
    settings = replace(SETTINGS, num_prompts_per_step=4, global_batch=16, dynamic_sampling_batches=2)
    made = task(settings=replace(settings, leave_one_out=False), rows=prompts(4), environment=Scored(_rarely))
    with pytest.raises(UserError):
        made.step()
    seen = [(rollout.where, rollout.text) for rollout in made.environment.seen]
    assert len(seen) == 32
    first, again = sorted(seen[:16]), sorted(seen[16:])
    assert [where for where, _ in first] == [where for where, _ in again]
    assert first != again


def _rarely(rollout):
    return Score(1.0)


def test_truncated_answers_are_left_out_but_vote(task):
    made = task(settings=replace(SETTINGS, overlong_filtering=True))
    line = made.step().metrics
    cut = sum(rollout.truncated for rollout in made.environment.seen)
    assert 0 < cut < ROLLOUTS
    assert line["train/num_valid_samples"] == ROLLOUTS - cut
    assert line["train/truncation_rate"] == cut / ROLLOUTS
    lengths = sum(rollout.tokens for rollout in made.environment.seen if not rollout.truncated)
    assert line["train/global_valid_toks"] == lengths


def test_rollouts_without_a_reward_are_left_out_up_to_a_share(task):
    def of(rollout):
        return Score(0.0, error="gone", lost=True) if rollout.key[3] == 0 else reward(rollout)

    line = task(environment=Scored(of), max_failed=0.25).step().metrics
    assert line["train/num_valid_samples"] == ROLLOUTS - PROMPTS
    assert line["train/lost_rollouts"] == 0.25
    with pytest.raises(UserError, match=r"8 of 32 rollouts have no reward: 25% where .* allows 20%") as raised:
        task(environment=Scored(of), max_failed=0.2).step()
    assert raised.value.exit_code == 1
    assert "gone" in str(raised.value)


def test_long_answers_cost_what_shaping_says(task):
    shaping = RewardShaping(max_response_length=10, overlong_buffer_length=5, overlong_buffer_penalty=2.0)
    plain, shaped = task().step().metrics, task(settings=replace(SETTINGS, shaping=shaping)).step().metrics
    assert shaped["train/reward"] == plain["train/reward"] == plain["train/shaped_reward"]
    assert shaped["train/shaped_reward"] < plain["train/shaped_reward"]


def test_best_and_worst_answer_of_each_step_can_be_read(task, tmp_path):
    made = task()
    made.steps(2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(1, "train")] * 2 + [(2, "train")] * 2
    rewards = [reward(rollout).reward for rollout in made.environment.seen[:ROLLOUTS]]
    assert [line["reward"] for line in lines[:2]] == [max(rewards), min(rewards)]
    assert lines[0]["source"].startswith("rows.jsonl:")


def test_reward_rises(task):
    """Twelve steps towards characters below 64, from a random model that writes two of them an answer."""
    made = task(settings=with_loss(reference_policy_kl_penalty=0.0), lr=1e-2)
    made.run.config = replace(made.run.config, max_epochs=50)
    rewards = [line["train/reward"] for line in made.steps(12)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5


def test_an_answer_whose_tool_calls_cannot_be_read_has_its_own_advantage(task):
    def of(rollout):
        unreadable = rollout.key[-1] == 0
        return Score(reward(rollout).reward, components={"valid_calls": 0.0} if unreadable else {})

    made = task(settings=replace(SETTINGS, invalid_tool_call=-5.0, clip=(-4.0, None)), environment=Scored(of))
    rollouts, _, _ = made.task._collect(made.run.config, made.progress)
    advantages = made.task._judged(rollouts).advantages_B.view(PROMPTS, SAMPLES)
    assert (advantages[:, 0] == -4).all()  # clipped last
    assert (advantages[:, 1:] > -4).all()


def test_it_is_said_once_when_nothing_is_learnt(task, caplog):
    made = task(environment=Scored(lambda rollout: Score(0.0)))
    made.steps(4)
    said = [record.message for record in caplog.records if "nothing is learnt" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 3: for 3 steps now all answers to a prompt have had the same reward (0 on average)")
