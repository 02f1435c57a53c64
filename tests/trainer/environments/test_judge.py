"""A judge over real HTTP (judge_server.py is a stand-in for vLLM): scores, pairs, faults, budget and record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Rollout
from nemotron_launch.trainer.environments.judge import JudgeEnvironment
from tests.trainer.environments.judge_server import JudgeServer, judge_server

SECTION: dict[str, Any] = {
    "model": "judge", "mode": "pointwise", "comparison_strategy": "circular", "num_judges_per_comparison": 1,
    "default_score": 3.0, "default_ranking": 3.5, "prompt_file": None, "principle": None, "score_pattern": None,
    "max_output_tokens": 64, "temperature": 0.6, "top_p": 0.95, "concurrency": 4, "timeout": 5, "retries": 2,
    "cache": True, "max_requests": None, "api_key_env": None,
}  # fmt: skip
Open = Callable[..., JudgeEnvironment]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


@pytest.fixture
def judge(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr("nemotron_launch.trainer.environments.judge_client._FIRST_PAUSE", 0.01)
    opened = []

    def make(**changes: Any) -> JudgeEnvironment:
        section = {**SECTION, "server": server.address, **changes}
        opened.append(JudgeEnvironment(section, step_dir=None, output_dir=tmp_path / "output"))
        return opened[-1]

    yield make
    for environment in opened:
        environment.close()


def group(*texts: str, prompt: str = "Say something.") -> list[Rollout]:
    return [Rollout([{"role": "user", "content": prompt}], text, {}, key=(0, i)) for i, text in enumerate(texts)]


def length_of(tag: str, prompt: str) -> int:
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)
    assert found, prompt
    return len(found[1])


def compare(ranking: int = 3) -> Callable[[str], str]:
    """Scores each answer by its length, at most 5."""

    def judged(prompt: str) -> str:
        first, second = (min(5, length_of(f"answer_{n}", prompt)) for n in (1, 2))
        return f'I think {{so}}.\n{{"score_1": {first}, "score_2": {second}, "ranking": {ranking}}}'

    return judged


def rewards(scores: Any) -> list[list[float]]:
    return [[score.reward for score in one] for one in scores]


def test_each_answer_gets_its_own_score(judge: Open, server: JudgeServer):
    server.judge = lambda prompt: json.dumps({"score": length_of("answer", prompt)})
    assert rewards(judge().score([group("a", "bb"), group("ccc")])) == [[1, 2], [3]]


def test_a_circle_of_pairs_averages_each_answers_two_comparisons(judge: Open, server: JudgeServer):
    server.judge = compare()
    scores = judge(mode="pairwise").score([group("a", "bb", "ccc")])
    assert rewards(scores) == [[1, 2, 3]]
    assert len(server.bodies) == 3  # as many as answers


def test_all_pairs_compare_each_with_each(judge: Open, server: JudgeServer):
    server.judge = compare()
    judge(mode="pairwise", comparison_strategy="all_pairs").score([group("a", "bb", "ccc", "dddd")])
    assert len(server.bodies) == 6  # 4 over 2


def test_equal_scores_are_told_apart_by_the_ranking(judge: Open, server: JudgeServer):
    server.judge = compare(ranking=1)  # the first is much better
    scores = judge(mode="pairwise", comparison_strategy="all_pairs").score([group("aa", "bb")])
    # 2 + (3.5 - 1) and 2 - (3.5 - 1): NeMo Gym's simple_tiebreaker, worked by hand.
    assert rewards(scores) == [[4.5, -0.5]]


def test_an_answer_without_another_is_worth_the_default_and_asks_nobody(judge: Open, server: JudgeServer):
    [[score]] = judge(mode="pairwise").score([group("alone")])
    assert (score.reward, score.error, score.lost) == (3.0, "", False)
    assert not server.bodies


def test_several_judgements_of_a_pair_differ_in_their_seed_and_are_averaged(judge: Open, server: JudgeServer):
    replies = iter([1, 3, 5])
    server.judge = lambda prompt: json.dumps({"score": next(replies)})
    assert rewards(judge(num_judges_per_comparison=3).score([group("a")])) == [[3]]
    assert len({body["seed"] for body in server.bodies}) == 3


def test_a_judgement_that_cannot_be_read_is_worth_the_default_and_counted(judge: Open, server: JudgeServer):
    server.judge = lambda prompt: "Both are fine."
    [[score]] = judge().score([group("a")])
    assert score.reward == 3.0
    assert "score" in score.error
    assert not score.lost


def test_the_last_judgement_of_a_reply_counts(judge: Open, server: JudgeServer):
    server.judge = lambda prompt: 'First {"score": 1}, {"other": 2}, but no: {"score": 4} {broken'
    assert rewards(judge().score([group("a")])) == [[4]]


def test_a_pattern_reads_another_form(judge: Open, server: JudgeServer):
    server.judge = lambda prompt: "A: 2, B: 5"
    environment = judge(mode="pairwise", score_pattern=r"A: (\d), B: (\d)", comparison_strategy="all_pairs")
    assert rewards(environment.score([group("a", "b")])) == [[2, 5]]


def test_an_own_template_and_principle_reach_the_judge(judge: Open, server: JudgeServer, tmp_path: Path):
    template = tmp_path / "judge.j2"
    template.write_text("{{ principle }}|{{ messages[0].content }}|{{ answer }}")
    server.judge = lambda prompt: '{"score": 2}'
    judge(prompt_file=str(template), principle="short").score([group("{{ 7 * 7 }}", prompt="$(id)")])
    assert server.bodies[0]["messages"][0]["content"] == "short|$(id)|{{ 7 * 7 }}"


@pytest.mark.parametrize("fault", [429, 503, "cut", "nonsense"])
def test_a_passing_fault_is_asked_again(judge: Open, server: JudgeServer, fault: Any):
    server.faults, server.judge = [fault], lambda prompt: '{"score": 4}'
    assert rewards(judge().score([group("a")])) == [[4]]


def test_an_answer_that_no_judge_saw_is_lost_not_zero(judge: Open, server: JudgeServer):
    server.faults = [503] * 3  # one try and two retries
    server.judge = lambda prompt: '{"score": 4}'
    scores = judge(concurrency=1).score([group("a", "b")])
    assert [score.lost for score in scores[0]] == [True, False]
    assert "503" in scores[0][0].error


def test_a_judge_that_hangs_costs_its_timeout_only(judge: Open, server: JudgeServer):
    server.faults = ["hang"]
    [[score]] = judge(timeout=0.3, retries=0).score([group("a")])
    assert score.lost
    assert "no answer in time" in score.error


def test_a_resumed_run_does_not_ask_twice(judge: Open, server: JudgeServer, tmp_path: Path):
    server.judge = lambda prompt: json.dumps({"score": length_of("answer", prompt)})
    first = judge().score([group("a", "bb")])
    [record] = (tmp_path / "output" / "judgements").iterdir()
    record.write_text(record.read_text() + '{"key": "cut of')  # as a kill leaves it
    asked = len(server.bodies)
    assert rewards(judge().score([group("a", "bb")])) == rewards(first)
    assert len(server.bodies) == asked


def test_the_budget_ends_the_run_with_what_to_do(judge: Open, server: JudgeServer):
    environment = judge(max_requests=2, concurrency=1)
    environment.score([group("a", "b")])
    with pytest.raises(UserError, match="asked 2 times") as caught:
        environment.score([group("c")])
    assert caught.value.where == "env.judge.max_requests"


def test_a_refused_key_ends_the_run_and_is_not_shown(judge: Open, server: JudgeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "hunter2-very-secret")
    server.faults = [401]
    with pytest.raises(UserError, match="refuses the key") as caught:
        judge(api_key_env="JUDGE_KEY").score([group("a")])
    assert "hunter2" not in str(caught.value)
    assert server.keys == ["Bearer hunter2-very-secret"]


def test_a_server_without_the_model_is_said_before_the_first_rollout(judge: Open, server: JudgeServer):
    server.model = "another"
    with pytest.raises(UserError, match="has another, not judge"):
        judge().check([], [])


def test_a_server_that_is_not_there_is_said_before_the_first_rollout(judge: Open):
    with pytest.raises(UserError, match="not ready"):
        judge(server="http://127.0.0.1:9").check([], [])


def test_a_service_that_the_run_lacks_is_named(judge: Open, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="NEMOTRON_SERVICE_JUDGE is not set"):
        judge(server="judge")
    monkeypatch.setenv("NEMOTRON_SERVICE_JUDGE", "10.0.0.1:8000")
    assert judge(server="judge").client.address == "http://10.0.0.1:8000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_pattern": "(unclosed"}, "is no regular expression"),
        ({"score_pattern": "no groups"}, "has 0 groups"),
        ({"prompt_file": "/nowhere.j2"}, "no such file"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "is not set"),
    ],
)
def test_a_section_that_cannot_work_is_refused_at_the_start(judge: Open, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        judge(**changes)
