"""What is said of held-out answers, which prompts are held out, and which rewards are refused before they are used."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from grpo_tasks import Scored, Task, prompts

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.prompts import Prompt
from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.grpo_data import _held_out, try_reward
from nemotron_launch.trainer.grpo_validation import Validation, pass_at


def test_pass_at_is_the_chance_that_one_of_so_many_is_right() -> None:
    right_PG = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    # One right of four: 1/4, then 1 - C(3,2)/C(4,2) = 1/2, then 1; the mean with a prompt of 1 and one of 0.
    assert [pass_at(right_PG, j) for j in (1, 2, 4)] == pytest.approx([1.25 / 3, 1.5 / 3, 2 / 3])


def test_validation_says_the_same_however_it_is_cut_and_draws_the_same_each_time(layout, byte_tokenizer, tmp_path):
    right = Scored(lambda rollout: Score(float(len(rollout.text) % 2)))
    made = Task(layout, byte_tokenizer, tmp_path, environment=right)
    whole = Validation(prompts(10), made.task.sampling, samples=4, batch=10, greedy=True, shown=2)
    once, again, cut = (
        each.run(made.task.roller, step, made.task.samples)
        for each, step in ((whole, 1), (whole, 2), (replace(whole, batch=3), 3))
    )
    names = [name for name in once if name.startswith("validation/")]
    assert {name: once[name] for name in names} == {name: again[name] for name in names}
    assert {name: once[name] for name in names} == {name: cut[name] for name in names}
    assert once["validation/pass_at_1"] == pytest.approx(once["validation/accuracy"])
    assert once["validation/accuracy"] < once["validation/pass_at_2"] < once["validation/pass_at_4"]
    assert once["validation/pass_k"] == once["validation/pass_at_4"]
    assert 0 <= once["validation/greedy_accuracy"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines if line["step"] == 1][:2] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert {line["kind"] for line in lines} == {"validation"}


def row(number: int, **columns: object) -> Prompt:
    return Prompt(np.array([65], np.int32), [{"role": "user", "content": "A"}], columns, f"rows.jsonl:{number}")


def test_a_share_of_the_prompts_is_held_out_with_all_its_copies() -> None:
    rows = [row(i) for i in range(20) for _ in range(3)]
    training, held_out = _held_out(rows, 0.25, seed=1)
    assert (len(training), len(held_out)) == (45, 5)
    assert not {prompt.source for prompt in training} & {prompt.source for prompt in held_out}
    again = _held_out(rows, 0.25, seed=1)[1]
    assert [prompt.source for prompt in again] == [prompt.source for prompt in held_out]


MATHS = [row(i, env_name="math", expected_answer=str(i)) for i in range(1, 4)]


def test_a_reward_that_knows_right_answers_in_any_form_passes() -> None:
    try_reward(
        Scored(lambda rollout: Score(float(rollout.text == f"\\boxed{{{rollout.row['expected_answer']}}}"))), MATHS
    )


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (lambda rollout: Score(1.0), "right answer '1' is rewarded with 1, an empty one with 1"),
        (lambda rollout: Score(0.0, error="boom"), "the verifier fails on all 3 rows tried: boom"),
        (lambda rollout: Score(float(not rollout.text)), "right answer '1' is rewarded with 0, an empty one with 1"),
    ],
    ids=["always right", "always fails", "upside down"],
)
def test_a_reward_that_tells_nothing_is_refused(of, said) -> None:
    with pytest.raises(UserError) as raised:
        try_reward(Scored(of), MATHS)
    assert str(raised.value).startswith("error: rows.jsonl:1: math: ")
    assert said in str(raised.value)


def test_what_a_function_of_the_users_own_rewards_is_not_known() -> None:
    own = [row(1, env_name="python:mine.brevity", expected_answer="1")]
    try_reward(Scored(lambda rollout: Score(-float(len(rollout.text)))), own)
    try_reward(Scored(lambda rollout: Score(0.5)), own)
    with pytest.raises(UserError, match="python:mine.brevity: the verifier fails"):
        try_reward(Scored(lambda rollout: Score(0.0, error="boom")), own)
